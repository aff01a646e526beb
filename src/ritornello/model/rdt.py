"""The recurrent-depth transformer: embed → prelude → loop → coda.

    e    = norm(prelude(embed(tokens)))        once
    h    = initial state
    loop:  u = inject(h, e);  h = block(u)     the same weights every time
    logits = head(norm(coda(h)))               once

h stays in float32 or better throughout: in bfloat16 a decay near 1 would leave it unchanged for ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ritornello.config import MAX_LOOPS, ExitRule, ModelConfig, require, require_int
from ritornello.model.bound import state_bound
from ritornello.model.cache import Cache, KeyValues, Passing
from ritornello.model.carry import HyperConnections, SingleStream, damped, initial_state
from ritornello.model.context import Capture, Context, Loop, build_context
from ritornello.model.depth import Depth, Turn
from ritornello.model.halting import Halting, Probe, Signals, check_exit
from ritornello.model.initialize import initialize
from ritornello.model.injection import INJECTIONS
from ritornello.model.layers import Layer, Pass
from ritornello.model.lora import Linear, table_of
from ritornello.model.moe import Routed
from ritornello.model.norm import RMSNorm
from ritornello.model.state import LoopState, Output
from ritornello.ops.linear import linear
from ritornello.ops.noise import Key
from ritornello.ops.precision import at_least_float32
from ritornello.ops.routing import Routing
from ritornello.ops.subset import Subset


@dataclass(frozen=True)
class Run:
    """How one recurrence runs: `forward`'s arguments."""

    depth: Depth
    cache: Cache | None = None
    exit: ExitRule | None = None
    backprop_loops: int = 0
    checkpoint: bool = False
    weigh: bool = False
    compact: bool = False

    def __post_init__(self) -> None:
        cut = 0 < self.backprop_loops < self.depth.n_iterations
        whole = not cut or (self.depth.budgets is None and not self.weigh)
        require(whole, "backprop_loops", self.backprop_loops, "0 where halting is learned, or budgets end apart")
        aligned = self.cache is None or self.depth.starts is None
        require(aligned, "n_loops", "right-aligned", "an int or a tensor with a cache, whose tokens start together")


class RecurrentDepthTransformer(nn.Module):
    """`config.n_recurrent_layers = 0` gives a plain transformer, Llama's block, without injection or e's norm."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embed_tokens = nn.ModuleList(table_of(c.vocab_size, c.dim) for _ in range(c.n_token_tables))
        start, coda = c.n_prelude_layers, c.n_prelude_layers + c.n_recurrent_layers
        layers = [Layer(c, layer=i, looped=start <= i < coda) for i in range(c.n_layers)]
        self.prelude_layers = nn.ModuleList(layers[:start])
        self.recurrent = nn.ModuleList(layers[start:coda])
        self.coda_layers = nn.ModuleList(layers[coda:])
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = None if c.tie_embeddings else Linear(c.dim, c.vocab_size)
        self.read_matrix = Linear(c.dim, c.dim) if c.read_matrix else None
        if not c.is_plain:
            self.input_norm = RMSNorm(c.dim, c.norm_eps) if c.normalize_input else None
            self.injection = INJECTIONS[c.injection](c)
            self.carry = SingleStream() if c.carry_streams == 1 else HyperConnections(c.carry_streams)
            self.loop_embedding = table_of(c.n_loops, c.dim) if c.loop_embedding else None
            self.loop_embedding_scale = nn.Parameter(torch.empty(())) if c.loop_embedding else None
            self.anchor_norm = RMSNorm(c.dim, c.norm_eps) if c.anchored else None
            self.probe = Probe(c) if c.needs_probe else None
            self.halting = Halting(c)
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    state_bound = state_bound  # (n_loops) -> the largest ‖h‖ that any tokens can reach
    init_weights = initialize  # (seed = 0): draws every parameter anew, in place

    def compile(self, *, unroll: bool = False, **options: Any) -> None:
        """Compile prelude, loop and coda in place, without graph breaks: one graph of the loop serves every loop count.

        unroll: one graph of everything instead, compiled anew for each depth; without exit rules. Faster where a loop
            is short, as for one token. options: torch.compile's.
        """
        torch.compiler.config.dynamic_sources = "L['turn'].loop, L['run'].cache.length, L['kv'].length"
        lean = {} if "mode" in options else {"options": {"size_asserts": False, "alignment_asserts": False}}
        how: Any = {"fullgraph": True, "isolate_recompiles": True, "recompile_limit": 64, **lean, **options}
        for name in ("_compute", "logits") if unroll else ("prelude", "_step", "coda", "logits"):
            setattr(self, name, partial(torch.compile(getattr(type(self), name), **how), self))

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed_tokens[0].weight if self.head is None else self.head.weight  # pyrefly: ignore

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        hidden = hidden.to(self.head_weight.dtype)
        return linear(hidden, self.head_weight) if self.head is None else self.head(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) or (B, T, C) -> (B, T, D): the sum over C tables, scaled."""
        ids = tokens if tokens.ndim == 3 else tokens[..., None]
        x = reduce(torch.add, (table(ids[..., i]) for i, table in enumerate(self.embed_tokens)))
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def prelude(self, x: Tensor, context: Context, kv: KeyValues) -> Tensor:
        """Embeddings (B, T, D) -> e (B, T, D)."""
        x, _ = self._run(self.prelude_layers, x, Pass(0, 0, context, kv))
        return x if self.config.is_plain or self.input_norm is None else self.input_norm(x)

    def coda(self, h: Tensor, context: Context, kv: KeyValues) -> Tensor:
        """State (B, T, D) -> hidden (B, T, D), in which the logits are linear."""
        h = self.norm(h) if self.config.state_norm == "read" else h
        h = h if self.read_matrix is None else self.read_matrix(h)
        x, _ = self._run(self.coda_layers, h, Pass(0, 0, context, kv))
        return x if self.config.state_norm == "loop" and not self.config.n_coda_layers else self.norm(x)

    def _run(self, layers: nn.ModuleList, x: Tensor, now: Pass) -> tuple[Tensor, tuple[Routed, ...]]:
        routed = []
        for layer in layers:
            x, found = layer(x, now)
            routed += [] if found is None else [found]
        return x, tuple(routed)

    def loop_once(
        self, h: Tensor, e: Tensor, loop: Loop, context: Context, kv: KeyValues, running: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        """One pass through the recurrent block: h (m, T, D) -> the next h, and the routing of each layer.

        `loop`: the index of every token, of each sequence (m, 1), or of each token (m, T).
        """
        last = self.config.n_loops - 1
        table = min(loop, last) if isinstance(loop, int) else loop.clamp(max=last)
        u = self.injection(h, self.carry.inputs(e))
        read = self.carry.read(u)
        x, routed = self._run(self.recurrent, read, Pass(loop, table, context, kv, running, self._shift(table)))
        x = x if self.config.loop_scale == (1, 1) else damped(read, x, loop, *self.config.loop_scale)
        h = self.carry.write(u, read, x)
        h = self.norm(h) if self.config.state_norm == "loop" else h
        return (self._anchor(h) if self.anchor_norm is not None else h), routed

    def _shift(self, table: Loop) -> Tensor | None:
        """The loop-index embedding, which branches read and the carry never holds."""
        if self.loop_embedding is None or self.loop_embedding_scale is None:
            return None
        return self.loop_embedding_scale * self.loop_embedding.weight[table]

    def _anchor(self, h: Tensor) -> Tensor:
        """h -> norm(softmax(logits) · embedding): the state becomes a mean of token embeddings, a key for look-ups."""
        assert self.anchor_norm is not None
        weights = self.logits(self.norm(h)).softmax(-1)
        return self.anchor_norm(weights @ self.embed_tokens[0].weight.to(weights.dtype)).to(h.dtype)  # pyrefly: ignore

    def context(self, x: Tensor, **options: Any) -> Context:
        """What the layers need to know about the tokens embedded as x (B, T, D); see build_context."""
        return build_context(self.config, x, **options)

    def start(self, e: Tensor, context: Context, rows: Tensor, run: Run) -> LoopState:
        """The state before loop 0 of e (m, T, D), which lies in the given rows (m,) of the batch."""
        h = initial_state(self.config.initial_state, e, context, self.config.noise_std)
        used = torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
        halts = run.exit is not None or (run.weigh and self.halting.head is not None)
        real = None if run.exit is None else context.real()
        halt = self.halting.start(h, self._predict(h, run.exit), real) if halts else None
        return LoopState(self.carry.expand(h), used, rows, halt=halt)

    def _predict(self, h: Tensor, exit: ExitRule | None) -> Tensor | None:
        """The probe's log-probabilities (m, T, V), where something reads them."""
        if self.probe is None or not self.halting.reads_predictions(exit):
            return None
        with torch.no_grad():
            return at_least_float32(self.logits(self.probe(h))).log_softmax(-1)

    def iterate(self, e: Tensor, context: Context, run: Run) -> Iterator[LoopState]:
        """The recurrence over e (B, T, D): the state after each loop, its rows in running order.

        Gradients pass through the last `backprop_loops` iterations, 0: all; before them only h is cut off, e never.
        Without gradients an exit rule ends the recurrence when all tokens have halted.
        """
        depth, gradients = run.depth, torch.is_grad_enabled()
        first = depth.n_iterations - run.backprop_loops if run.backprop_loops else 0
        rows = torch.arange(e.shape[0], device=e.device) if depth.order is None else depth.order
        if depth.order is not None:
            e, context = e[rows], context.select(rows)
        state, started = None, 0
        for i in range(depth.n_iterations):
            with torch.set_grad_enabled(gradients and i >= first):
                m = depth.rows(i, e.shape[0])
                if state is None or m > started:
                    new = slice(started, m)
                    joining = self.start(e[new], context.select(new), rows[new], run)
                    state, started = joining if state is None else state.join(joining), m
                assert state is not None
                here = (e, context) if m == len(e) else (e[:m], context.select(slice(m)))
                state = self._advance(state, *here, i, run)
            yield state
            may_end = run.exit is not None and not gradients and m == len(e)
            if may_end and state.halt is not None and bool(state.halt.halted.all()):
                return

    def _advance(self, state: LoopState, e: Tensor, context: Context, iteration: int, run: Run) -> LoopState:
        """One loop: who runs, who stays frozen; compacted, those who stay leave the batch."""
        halted = None if state.halt is None or run.exit is None else state.halt.halted
        turn = run.depth.turn(iteration, len(e), halted)
        if run.cache is not None:
            run.cache.start_loop(turn.loop, turn.running)
        some = Subset.of(turn.running, e.shape[1]) if run.compact and turn.running is not None else None
        if some is None:
            return self._step(state, e, context, turn, run)
        new = self._step(state.take(some), some.take(e), context.take(some), turn.take(some), run)
        return state.put(some, new, turn)

    def _step(self, state: LoopState, e: Tensor, context: Context, turn: Turn, run: Run) -> LoopState:
        """The block with everything around it, and who stops now."""
        running = turn.running
        h, routed, entries = self._block(state, e, context, turn, run)
        if running is not None:
            h = torch.where(running.view(*running.shape, *[1] * (h.ndim - 2)), h, state.h)
        halt = None
        if state.halt is not None:
            merged, before = self.carry.mean(h), self.carry.mean(state.h)
            signals = Signals(merged, before, self._predict(merged, run.exit), state.halt.log_probs)
            idle = state.halt.halted if running is None else state.halt.halted | ~running
            halt = self.halting.step(state.halt, signals, run.exit, turn.loop, idle, turn.last)
        if context.capture is not None:
            context.capture.add("h", turn.loop, h)
        used = state.loops_used + (1 if running is None else running.to(torch.int64))
        halts = running is not None or turn.partial or run.exit is not None
        kept = entries if halts or self.config.kv_sharing == "first" else None
        return LoopState(h, used, state.rows, turn.loop, running, routed, kept, halt)

    def _block(
        self, state: LoopState, e: Tensor, context: Context, turn: Turn, run: Run
    ) -> tuple[Tensor, tuple[Routed, ...], dict[int, Tensor] | None]:
        """`loop_once` with its keys and values: in the cache, or handed on from loop to loop as a value."""
        if run.cache is not None:
            return *self.loop_once(state.h, e, turn.loop, context, run.cache, turn.running), None

        def block(h: Tensor, e: Tensor) -> tuple[Tensor, tuple[Routed, ...], dict[int, Tensor]]:
            kv = Passing(state.entries, share_first=self.config.kv_sharing == "first")
            h, routed = self.loop_once(h, e, turn.loop, context, kv, turn.running)
            return h, routed, kv.entries

        if run.checkpoint and torch.is_grad_enabled():
            return recompute(block, state.h, e, use_reentrant=False, preserve_rng_state=False)
        return block(state.h, e)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        n_loops: int | Tensor | Depth | None = None,
        exit: ExitRule | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        key: Key | None = None,
        capture: Capture | None = None,
        backprop_loops: int = 0,
        checkpoint: bool = False,
        trajectory: bool = False,
        weigh: bool = False,
        compact: bool | None = None,
        return_logits: bool = True,
    ) -> Output:
        """Predict the next token of every position.

        Args:
            tokens: (B, T) ids, or (B, T, C) with C token tables; or inputs_embeds (B, T, D) instead.
            n_loops: of all tokens, or a budget by sequence (B,) or token (B, T), or a Depth; default config.n_loops.
            exit: lets tokens stop before their budget ends; None forces the depth.
            documents: (B, T) ids; tokens see their own document only; negative ids are padding.
            positions: (B, T); by default they count up, from 0 in each document.
            cache: holds the tokens before these, and takes these in.
            key: the address of randomness: noise states, dropout.
            backprop_loops: gradients pass through the last so many loops of each sequence; 0: all.
            checkpoint: recompute each loop in the backward pass instead of keeping its activations.
            trajectory: keep the state after each loop.
            weigh: let the halting head weigh each loop, exit rule or not (act: always).
            compact: leave tokens that have halted out of the block, at one count a loop; None: where that waits for no
                device and nothing is captured.
        Raises:
            ValueError: an argument out of range, naming it.
        """
        require_int("backprop_loops", backprop_loops, 0, MAX_LOOPS)
        check_exit(self.config, exit)
        keyed = key is not None or not (self.training and self.config.dropout)
        require(keyed, "key", None, "given in training when dropout > 0")
        x = self._check(tokens, inputs_embeds, cache)
        depth = Depth.of(self.config.n_loops if n_loops is None else n_loops, (x.shape[0], x.shape[1])).to(x.device)
        late = depth.starts is not None and depth.starts.shape[1] > 1
        require(not late or documents is not None, "documents", None, "given where budgets start late within a row")
        shared = {"positions": positions, "documents": documents, "cache": cache, "key": key, "capture": capture}
        context = self.context(x, tokens=tokens, **shared)
        weigh = weigh or self.config.halting == "act"
        compact = (x.device.type == "cpu" if compact is None else compact) and capture is None
        run = Run(depth, cache, exit, backprop_loops, checkpoint, weigh, compact)
        out = Output(None, x, torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
        out.trajectory = [] if trajectory and not self.config.is_plain else None
        self._compute(x, context, run, out, return_logits)
        if cache is not None:
            cache.commit()
        return out

    def _compute(self, x: Tensor, context: Context, run: Run, out: Output, return_logits: bool) -> None:
        """From embeddings to logits, into `out`."""
        kv = run.cache if run.cache is not None else Passing()
        h = self.prelude(x, context, kv)
        if not self.config.is_plain:
            h = self._recur(h, context, run, out)
        out.hidden = self.coda(h, context, kv)
        out.logits = self.logits(out.hidden) if return_logits else None

    def _recur(self, e: Tensor, context: Context, run: Run, out: Output) -> Tensor:
        """Run the recurrence, note in `out` what happened, and return what the coda reads, in the batch's order."""
        c, real = self.config, context.real()
        if c.ffn == "moe":
            out.routing = Routing(c.n_loops, c.n_recurrent_layers, c.n_experts)
        if context.capture is not None:
            context.capture.add("e", 0, e)
        balance, n_rows, state = [], 0, None
        for state in self.iterate(e, context, run):
            if out.routing is not None:
                masks = state.running, None if real is None else real[state.rows]
                out.routing.add(state.loop, [routed.indices for routed in state.routed], masks)
            if out.trajectory is not None:
                out.trajectory.append(state)
            found = [routed.balance for routed in state.routed if routed.balance.requires_grad]
            balance += [len(state.rows) * x for x in found]
            n_rows += len(state.rows) * len(found)
        assert state is not None
        if balance:
            out.aux["balance"] = torch.stack(balance).sum() / n_rows
        out.loops_used = run.depth.restore(state.loops_used)
        if state.halt is not None and c.halting == "act":
            ponder = out.loops_used + run.depth.restore(state.halt.remainder)
            out.aux["ponder"] = ponder.mean() if real is None else (ponder * real).sum() / real.sum().clamp(min=1)
        return run.depth.restore(self.read_out(state))

    def read_out(self, state: LoopState) -> Tensor:
        """What the coda reads of a state: (m, T, D)."""
        if state.halt is not None and state.halt.mixture is not None:
            return state.halt.mixture
        return self.carry.mean(state.h)

    def _check(self, tokens: Tensor | None, inputs_embeds: Tensor | None, cache: Cache | None) -> Tensor:
        """The embedded input (B, T, D). Ids are checked on a CPU only: elsewhere that would wait for the device."""
        c = self.config
        both = None if tokens is None else "beside inputs_embeds"
        require((tokens is None) != (inputs_embeds is None), "tokens", both, "given, or else inputs_embeds")
        if tokens is None:
            assert inputs_embeds is not None
            x = inputs_embeds
            ok = x.ndim == 3 and x.shape[-1] == c.dim and x.numel() > 0
            require(ok, "inputs_embeds", tuple(x.shape), f"of shape (B, T, {c.dim}), not empty")
            require(x.is_floating_point(), "inputs_embeds", x.dtype, "of a floating-point type")
        else:
            require(isinstance(tokens, Tensor), "tokens", type(tokens).__name__, "a tensor")
            require(tokens.dtype in (torch.int64, torch.int32), "tokens", tokens.dtype, "int64 or int32")
            shape = "(B, T)" if c.n_token_tables == 1 else f"(B, T, {c.n_token_tables})"
            ok = tokens.shape[2:] == (() if c.n_token_tables == 1 else (c.n_token_tables,)) and tokens.ndim >= 2
            require(ok and tokens.numel() > 0, "tokens", tuple(tokens.shape), f"of shape {shape}, not empty")
            if tokens.device.type == "cpu":
                low, high = (int(x) for x in tokens.aminmax())
                bad = low if low < 0 else high
                require(low >= 0 and high < c.vocab_size, "tokens", bad, f"in [0, {c.vocab_size - 1}]")
            x = self.embed(tokens)
        length = x.shape[1] + (cache.length if cache is not None else 0)
        require(length <= c.max_seq_len, "tokens", f"{length} positions", f"at most max_seq_len = {c.max_seq_len}")
        return x
