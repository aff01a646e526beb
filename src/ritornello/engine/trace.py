"""What each loop of a written token's state would have answered, read through coda and head (logit lens)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ritornello.config import ExitRule, require, require_int
from ritornello.engine.engine import is_compiled
from ritornello.engine.request import CHUNK
from ritornello.engine.sampling import largest, log_shares
from ritornello.limits import check
from ritornello.model.cache import Cache, KeyValues
from ritornello.model.context import Loop
from ritornello.model.depth import Depth
from ritornello.model.halting import check_exit
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.model.state import LoopState
from ritornello.ops.subset import Subset

MOST_STATES = 1024  # held at once: a chunk's tokens in each of their loops


@dataclass(frozen=True)
class LoopReading:
    """The next token after one loop: entropy in nats, the `likeliest` ids with their log-probabilities in nats."""

    entropy: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenTrace:
    """A token of the completion; the loops that the state before it took, 0 of a plain model; what each of them read,
    once for a plain model. The last is what decoding saw."""

    token: int
    loops: int
    by_loop: tuple[LoopReading, ...]


def trace(
    model: RecurrentDepthTransformer,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    n_top: int = 5,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[list[TokenTrace]]:
    """Read what every loop would have said of each token of `completion`, given all before it: if its state had ended
    there, and those before as deep as they went. Of a mixture, the weight that was left falls on that loop.

    Yields some tokens at a time, in order, none while the prompt is computed: `chunk` tokens, fewer in deep loops.
    Memory: keys and values of one text, and logits of `chunk` states. Numbers are NaN where logits are.

    Args:
        n_loops: of each token, with `exit` the most it may take; None: the model's own.
        n_top: likeliest ids told of each reading.
        vocab_size: ids from here on are never chosen; None: of the embedding.
    Raises:
        ValueError: an argument out of range, or a compiled model; before anything is computed.
    """
    c = model.config
    n_loops = c.n_loops if n_loops is None else n_loops
    vocab_size = c.vocab_size if vocab_size is None else vocab_size
    require(not is_compiled(model), "model", "compiled", "as `load` gives it")
    require(c.n_token_tables == 1, "model", f"{c.n_token_tables} token tables", "one with a single token table")
    check("loops", n_loops, "n_loops")
    check_exit(c, exit)
    least = 1 if exit is None else exit.min_loops
    require(least <= n_loops, "min_loops", least, f"<= n_loops ({n_loops})")
    require_int("vocab_size", vocab_size, 1, c.vocab_size)
    require_int("n_top", n_top, 0, vocab_size)
    require_int("chunk", chunk, 1)
    for name, ids, high in (("prompt", prompt, c.vocab_size - 1), ("completion", completion, vocab_size - 1)):
        require(len(ids) > 0, name, ids, "at least one token")
        for token in ids:
            require_int(name, token, 0, high)
    text = [*prompt, *completion]
    require(len(text) - 1 <= c.max_seq_len, "tokens", len(text), f"at most max_seq_len + 1 = {c.max_seq_len + 1}")
    return _traces(model, text, len(prompt), Run(Depth.uniform(n_loops), exit=exit), n_top, vocab_size, chunk)


@torch.inference_mode()
def _traces(
    model: RecurrentDepthTransformer, text: list[int], n_prompt: int, run: Run, n_top: int, vocab_size: int, chunk: int
) -> Iterator[list[TokenTrace]]:
    """Chunk by chunk. The state of the prompt's last token gives the completion's first."""
    weight, n_loops = model.head_weight, run.depth.n_iterations
    how = {"n_loops": n_loops, "dtype": weight.dtype, "device": weight.device}
    cache = Cache(model.config, batch_size=1, max_len=len(text) - 1, **how)
    run = replace(run, cache=cache, weigh=model.config.halting == "act", compact=weight.device.type == "cpu")
    few = max(1, min(chunk, MOST_STATES // n_loops))
    start, first, end = 0, n_prompt - 1, len(text) - 1
    while start < end:
        stop = min(start + chunk, first) if start < first else min(start + few, end)
        states, used, hidden = _pass(model, torch.tensor([text[start:stop]], device=weight.device), run, start >= first)
        if start < first:
            yield []
        else:
            ids = torch.tensor(text[start:stop], device=weight.device)
            found = _readings(model, cache, states, used, hidden, start, ids, (n_top, vocab_size, chunk))
            rows = zip(text[start + 1 : stop + 1], used, found, strict=True)
            yield [TokenTrace(token, loops, tuple(readings)) for token, loops, readings in rows]
        start = stop


def _pass(
    model: RecurrentDepthTransformer, ids: Tensor, run: Run, keep: bool
) -> tuple[list[Tensor], list[int], Tensor]:
    """The next tokens (1, T) into the cache: what the coda would read after each loop, L times (T, D), if kept; loops
    taken, T; hidden (T, D), of the last."""
    cache = run.cache
    assert cache is not None
    x = model.embed(ids)
    context = model.context(x, tokens=ids, cache=cache)
    h, states, used = model.prelude(x, context, cache), [], [0] * ids.shape[1]
    if not model.config.is_plain:
        state = None
        for state in model.iterate(h, context, run):
            states += [_so_far(model, state)[0]] if keep else []
        assert state is not None
        h, used = model.read_out(state), state.loops_used[0].tolist()
    hidden = model.coda(h, context, cache)[0]
    cache.commit()
    return states, used, hidden


def _so_far(model: RecurrentDepthTransformer, state: LoopState) -> Tensor:
    """What the coda would read (1, T, D) if this loop had been the last: it gets the weight that is left."""
    out = model.read_out(state)
    if state.halt is None or state.halt.mixture is None:
        return out
    return out + state.halt.survival[..., None] * model.carry.mean(state.h)


def _readings(
    model: RecurrentDepthTransformer,
    cache: Cache,
    states: list[Tensor],
    used: list[int],
    hidden: Tensor,
    start: int,
    ids: Tensor,
    how: tuple[int, int, int],
) -> list[list[LoopReading]]:
    """By token, then by loop. The last is read of `hidden`; those before pass the coda, `size` states at a time."""
    n_top, vocab_size, size = how
    found: list[list[LoopReading]] = [[] for _ in used]
    early = [(loop, i) for i, n in enumerate(used) for loop in range(n - 1)]
    for some in (early[at : at + size] for at in range(0, len(early), size)):
        h = torch.stack([states[loop][i] for loop, i in some])
        here = torch.tensor([i for _, i in some], device=h.device)
        read = _read(model, _beside(model, h, ids[here], start + here, cache), n_top, vocab_size)
        for (_, i), reading in zip(some, read, strict=True):
            found[i].append(reading)
    for i, reading in enumerate(_read(model, hidden, n_top, vocab_size)):
        found[i].append(reading)
    return found


class _Beside(KeyValues):
    """Each token sees itself beside those in the cache: (1, S + T, W)."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Tensor:
        before = self.cache.slots[layer][0, :, : self.cache.length]
        return torch.cat((before, entry.to(before.dtype)), 1)


def _beside(model: RecurrentDepthTransformer, h: Tensor, ids: Tensor, places: Tensor, cache: Cache) -> Tensor:
    """States h (N, D) of tokens with these ids (N,) and places (N,) through the coda: hidden (N, D). Each sees what the
    tokens before it left in the cache, and itself as it is here."""
    context = model.context(h[None], tokens=ids[None], positions=places[None])
    before = torch.arange(cache.length, device=h.device) < places[:, None]
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    context = replace(context, mask=torch.cat((before, itself), 1)[None, None])
    return model.coda(h[None], context, _Beside(cache))[0]


def _read(model: RecurrentDepthTransformer, hidden: Tensor, n_top: int, vocab_size: int) -> Iterator[LoopReading]:
    """Of each row of hidden (N, D)."""
    shares = log_shares(model.logits(hidden)[:, :vocab_size])
    entropies = torch.special.entr(shares.exp()).sum(-1).tolist()
    yield from map(LoopReading, entropies, largest(shares, n_top))
