"""A circular pipeline: the recurrent layers spread over stages, through which micro-batches go around once a loop.

Stage 0 has prelude, coda, injection, halting and the first layers, and runs the model as ever: where its layers end,
the state travels around the ring and comes back through the others'. So no stage waits for a last one, and with as many
micro-batches as stages all are busy: L loops of M micro-batches take L·M + P − 1 turns of P stages (the circular
schedule of MaxText; GPipe 1811.06965 within a loop). The other stages serve: each message says what a layer needs to
know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Condition, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ritornello.config import require
from ritornello.model.cache import Passing
from ritornello.model.context import Context
from ritornello.model.layers import Pass
from ritornello.model.moe import Routed
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.noise import Key
from ritornello.ops.routing import Chosen, expert_load
from ritornello.train.ring import TYPES, Call, Ring
from ritornello.train.watch import Helper


def divide(model: RecurrentDepthTransformer, stage: "Stage") -> None:
    """Leave of the model what this stage has, under the names it had."""
    n, n_layers = stage.n, model.config.n_recurrent_layers
    require(
        not model.config.value_embeddings, "parallel.pipeline", n, "1 with model.value_embeddings, which read tokens"
    )
    ok = n_layers >= n and n_layers % n == 0
    require(ok, "parallel.pipeline", n, f"a divisor of model.n_recurrent_layers ({n_layers})")
    own = nn.ModuleList()
    for i in range(stage.stage * n_layers // n, (stage.stage + 1) * n_layers // n):
        own._modules[str(i)] = model.recurrent[i]
        model.recurrent[i].forward = partial(_layer, stage, model.recurrent[i].forward)  # pyrefly: ignore
    model.recurrent = own
    if stage.stage:
        for name in ("embed_tokens", "prelude_layers", "coda_layers"):
            setattr(model, name, nn.ModuleList())
        model.forward = lambda work: work()  # pyrefly: ignore  # opaque: FSDP2's hooks copy what they can look into
        for name in (
            "head",
            "norm",
            "input_norm",
            "injection",
            "read_matrix",
            "carry",
            "anchor_norm",
            "probe",
            "halting",
        ):
            setattr(model, name, None)


def _layer(stage: "Stage", forward: Callable[..., Any], x: Tensor, now: Pass) -> Any:
    """A layer's activations are computed again by itself: around a whole loop the state would travel twice."""
    if stage.recomputes and torch.is_grad_enabled():
        return recompute(forward, x, now, use_reentrant=False, preserve_rng_state=False)
    return forward(x, now)


def everywhere(model: RecurrentDepthTransformer) -> dict[str, nn.Parameter]:
    """What every stage has and reads: the loop-index embedding, in its layers' branches."""
    return {name: p for name, p in model.named_parameters() if name.startswith("loop_embedding")}


class Turns:
    """Threads of which one runs at a time, each until it passes its turn on to the next that is not done."""

    def __init__(self, n: int) -> None:
        self._waiting, self._now = list(range(n)), 0
        self._changed = Condition()

    def wait(self, who: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[self._now] == who)

    def next(self, who: int, *, done: bool = False) -> None:
        with self._changed:
            assert self._waiting[self._now] == who
            if done:
                self._waiting.pop(self._now)
            else:
                self._now += 1
            self._now = self._now % len(self._waiting) if self._waiting else 0
            self._changed.notify_all()


@dataclass
class Chain:
    """A micro-batch on its way, at stage 0."""

    index: int = 0
    turns: Turns | None = None
    known: int = 0


class Stage(Ring):
    """A stage after the first: does what stage 0 asks for."""

    recomputes = False  # layers, on the way back
    visitors: "dict[int, Visitor]"

    def led(self, model: RecurrentDepthTransformer, work: Callable[[], Any]) -> Any:
        """Serve while stage 0 does `work`, whose result is there."""
        serve(model, self)


class Conductor(Stage):
    """Stage 0: sends what its last layer gives around the ring."""

    def lead(self, model: RecurrentDepthTransformer) -> None:
        """The model's loop goes around from now on."""
        self.model = model
        forward: Any = model.forward
        model.forward = lambda *args, **how: args[0]() if args and callable(args[0]) else forward(*args, **how)
        self._chains: dict[int, Chain] = {}  # by thread
        model.iterate = self._iterate  # pyrefly: ignore
        model.prelude = self._prelude  # pyrefly: ignore
        for layer in model.recurrent:
            layer.register_forward_hook(lambda _, inputs, found: (found[0], self._in_turn(found[1])))
        layers = list(model.recurrent)
        # a loop that is the first with a gradient has no state that came: its way back waits for its turn here
        layers[0].register_forward_pre_hook(lambda _, inputs: (self.passed(inputs[0]), *inputs[1:]))
        layers[-1].register_forward_hook(lambda _, inputs, found: (self._around(found[0], inputs[1]), found[1]))

    def _in_turn(self, routed: Routed | None) -> Routed | None:
        """Its loss is undone with its layer, which else would be computed again before its turn."""
        if routed is None or not routed.balance.requires_grad:
            return routed
        return Routed(routed.indices, self.passed(routed.balance))

    def _prelude(self, x: Tensor, *rest: Any) -> Tensor:
        return type(self.model).prelude(self.model, self.passed(x), *rest)

    def _iterate(self, e: Tensor, context: Context, run: Any) -> Iterator[Any]:
        self._chain.known = 0
        self.recomputes = run.checkpoint
        # tokens that leave the batch would have to be named to every stage
        run = replace(run, checkpoint=False, compact=False)
        yield from type(self.model).iterate(self.model, self.passed(e), context, run)

    @property
    def _chain(self) -> Chain:
        return self._chains.setdefault(get_ident(), Chain())

    def _around(self, x: Tensor, now: Pass) -> Tensor:
        """x (m, T, D) through the layers of all other stages."""
        chain = self._chain
        self.say(*_described(x, now, chain, self.model.training, self.recomputes))
        chain.known = len(x)
        self.give(x)
        if chain.turns is not None:
            chain.turns.next(chain.index)
            chain.turns.wait(chain.index)
        return self.take(x)

    def together(self, works: Sequence[Callable[[], tuple[Tensor, Any, Any]]]) -> list[Any]:
        """What each of some calls of `model.forward` returns, which take turns while their states are on their way:
        first what is to be differentiated.

        FSDP2's hooks surround all of them together: it does not know of passes that overlap.
        """
        return self.model(partial(self._threads, works))

    def _threads(self, works: Sequence[Callable[[], tuple[Tensor, Any, Any]]]) -> list[Any]:
        turns, errors = Turns(len(works)), []
        found: list[Any] = [None] * len(works)

        def run(i: int) -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of each thread
            self._chains[get_ident()] = Chain(i, turns)
            turns.wait(i)
            try:
                total, *others = works[i]()
                # FSDP2 lets go of a layer's weights behind its backward pass: no other one's may have begun
                found[i] = self.passed(total), *others
            except BaseException as error:  # noqa: BLE001 - raised again by who waits for this thread
                errors.append(error)
            finally:
                self._chains.pop(get_ident())
                turns.next(i, done=True)

        threads = [Helper(target=run, args=(i,)) for i in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with self._dismissing():
            if errors:
                raise errors[0]
        return found

    def led(self, model: RecurrentDepthTransformer, work: Callable[[], Any]) -> Any:
        """What `work` gives, which runs the model; the other stages serve until then."""
        with self._dismissing():
            return work()

    @contextmanager
    def _dismissing(self) -> Iterator[None]:
        """No more calls after this; its own error says more than that another stage is gone."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                self.dismiss()
            raise
        self.dismiss()

    def dismiss(self) -> None:
        self.say(Call(), torch.empty(0, dtype=torch.int64))


def _described(x: Tensor, now: Pass, chain: Chain, training: bool, recomputes: bool) -> tuple[Call, Tensor]:
    c, new = now.context, slice(chain.known, len(x))
    assert c.some is None and not c.exact
    sequences = None if c.key is None else c.key.sequences
    rows = [None if t is None else t[new] for t in (c.documents, sequences)]
    numbers = [t.reshape(-1).to(torch.int64) for t in (now.loop, now.running, *rows) if isinstance(t, Tensor)]
    call = Call(
        kind=1,
        chain=chain.index,
        rows=x.shape[0],
        tokens=x.shape[1],
        width=x.shape[2],
        dtype=TYPES.index(x.dtype),
        gradients=int(torch.is_grad_enabled()),
        bf16=int(torch.is_autocast_enabled(x.device.type)),
        training=int(training),
        recomputes=int(recomputes),
        known=chain.known,
        loop=now.loop if isinstance(now.loop, int) else -1 if now.loop.shape[1] == 1 else -2,
        running=0 if now.running is None else 1 if now.running.shape[1] == 1 else 2,
        documents=int(c.documents is not None),
        key=int(sequences is not None),
        seed=0 if c.key is None else c.key.seed,
        step=0 if c.key is None else c.key.step,
    )
    return call, torch.cat([torch.empty(0, dtype=torch.int64, device=x.device), *numbers])


@dataclass
class Visitor:
    """A micro-batch on its way, at another stage: what its tokens are, and what has become of them here."""

    documents: Tensor | None
    key: Key | None
    entries: dict[int, Tensor] | None = None
    context: Context | None = None
    routed: list[Chosen] = field(default_factory=list)
    balances: list[Tensor] = field(default_factory=list)
    n_rows: int = 0

    def load(self, model: RecurrentDepthTransformer, device: torch.device) -> Tensor | None:
        """(n_loops, R, E), see `Routing`: of the layers that are here."""
        c, places = model.config, [int(name) for name, _ in model.recurrent.named_children()]
        if c.ffn != "moe":
            return None
        found = torch.zeros(c.n_loops, c.n_recurrent_layers, c.n_experts, dtype=torch.int64, device=device)
        found[:, places] = expert_load((c.n_loops, len(places), c.n_experts), self.routed)
        return found


def serve(model: RecurrentDepthTransformer, ring: Stage) -> list[Visitor]:
    """Do what stage 0 asks for, until it asks for no more: the micro-batches that came, in order."""
    ring.visitors = {}
    while True:
        call, numbers = ring.hear()
        if ring.stage + 1 < ring.n:
            ring.say(call, numbers)
        if not call.kind:
            visitors, ring.visitors = ring.visitors, {}
            return [visitors[i] for i in sorted(visitors)]
        ring.recomputes = bool(call.recomputes)
        if model.training != bool(call.training):
            model.train(bool(call.training))
        where, bf16 = ring.device.type, bool(call.bf16)
        with torch.set_grad_enabled(bool(call.gradients)), torch.autocast(where, torch.bfloat16, enabled=bf16):
            model(partial(receive, model, ring, call, numbers))


def receive(model: RecurrentDepthTransformer, ring: Stage, call: Call, numbers: Tensor) -> None:
    """One call at another stage than 0."""
    loops, running, documents, sequences = numbers.split(call.lengths)
    before = ring.visitors[call.chain] if call.known else None
    visitor = ring.visitors[call.chain] = _grown(before, call, documents, sequences)
    x = ring.take(torch.empty(call.rows, call.tokens, call.width, dtype=TYPES[call.dtype], device=ring.device))
    if visitor.context is None:
        visitor.context = model.context(x, documents=visitor.documents, key=visitor.key)
    loop = call.loop if call.loop >= 0 else loops.view(call.rows, call.width_of(-call.loop))
    some = running.view(call.rows, call.width_of(call.running)).bool() if call.running else None
    last = model.config.n_loops - 1
    table = min(loop, last) if isinstance(loop, int) else loop.clamp(max=last)
    kv = Passing(visitor.entries, share_first=model.config.kv_sharing == "first")
    now = Pass(loop, table, visitor.context, kv, some, model._shift(table))
    routed = []
    for layer in model.recurrent:
        x, layer_routed = layer(x, now)
        if layer_routed is not None:
            routed.append(layer_routed)
    ring.give(x)
    visitor.entries = kv.entries
    visitor.routed.append((loop, [each.indices for each in routed], (some, visitor.context.real())))
    found = [each.balance for each in routed if each.balance.requires_grad]
    visitor.balances += [call.rows * each for each in found]
    visitor.n_rows += call.rows * len(found)


def _grown(visitor: Visitor | None, call: Call, documents: Tensor, sequences: Tensor) -> Visitor:
    """With the rows that join in this call."""
    ids = documents.view(-1, call.tokens) if call.documents else None
    key = Key(call.seed, call.step, sequences) if call.key else None
    n_new = call.rows - call.known
    if visitor is None:
        return Visitor(ids, key)
    if n_new:
        visitor.context = None
        visitor.documents = None if ids is None or visitor.documents is None else torch.cat((visitor.documents, ids))
        if key is not None and visitor.key is not None and visitor.key.sequences is not None:
            visitor.key = replace(key, sequences=torch.cat((visitor.key.sequences, sequences)))
        entries = visitor.entries or {}
        visitor.entries = {i: torch.cat((x, x.new_zeros(n_new, *x.shape[1:]))) for i, x in entries.items()}
    return visitor
