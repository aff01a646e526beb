"""Depth-wise continuous batching: all tokens share the recurrent block, whatever loop they are in.

A tick applies the block once to tokens of many requests, each at its own loop. A token that leaves the loop early makes
room at once. Prompts enter in chunks: one follows as soon as the one before is a loop ahead. The coda takes a
sequence's tokens in their order; where it takes the last one, a token is sampled, which enters at loop 0.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ritornello.config import require, require_int
from ritornello.engine.constraints import Grammars
from ritornello.engine.lanes import Lanes
from ritornello.engine.pages import NONE, FullError, Layout, Pages, Tables
from ritornello.engine.prefixes import BLOCK, Prefixes
from ritornello.engine.request import CHUNK, Event, Request, Stats, check_request
from ritornello.engine.sampling import NO_TOKEN, Sampling, adjusted, draw, likeliest
from ritornello.engine.sequence import RULES, Sequence
from ritornello.engine.tick import Plan, Tick, planned, to_device
from ritornello.engine.tokens import NOBODY, Part, Tokens
from ritornello.limits import check
from ritornello.model.carry import initial_state
from ritornello.model.context import Context
from ritornello.model.halting import Signals
from ritornello.model.rdt import RecurrentDepthTransformer

EXACT = 16  # in whose multiples an exact pass has tokens
COUNTS = "n_ticks", "n_token_loops", "n_preempted", "n_drafted", "n_agreed"


@dataclass(frozen=True)
class _Rules:
    """Exit rules of one kind, thresholds and least loops of each token (1, n)."""

    rule: str
    threshold: Any = None
    min_loops: Any = None


@dataclass(frozen=True)
class _Together:
    """What tokens that run side by side share, whatever their loops: it is made once and serves until one of them
    leaves or another joins."""

    tokens: Tokens
    lanes: Tensor
    context: Context
    plans: list[Plan]


class _Leaving(NamedTuple):
    """Tokens of one sequence on their way into the coda: n from place `first` on; guess: the lane of the one token
    that a draft goes on from, which stays in the loop."""

    sequence: Sequence
    first: int
    n: int
    guess: int | None = None


class _Found(NamedTuple):
    """A token after which the next one is sampled: its place in the sequence, in the row that passed the coda, and
    whether it has taken a draft's few loops only."""

    sequence: Sequence
    place: int
    end: int
    guess: bool

    @property
    def n_before(self) -> int:
        """Tokens of the text before the next one."""
        return self.place + 1 - len(self.sequence.request.prompt)


class _Scored(NamedTuple):
    """Tokens of a prompt that score the next one: n from place `first` on, in the row that passed the coda from `start`
    on."""

    sequence: Sequence
    first: int
    start: int
    n: int


class Engine:
    """Requests enter and leave at any time; `step` is one tick.

    A request gives the same tokens alone or in any company, up to rounding (where two tokens, experts or exits are as
    good as equal, another may be chosen), or bit for bit if `exact`. Its randomness is addressed by its own seed.

    Args:
        n_rows: rows of keys and values: each token has one in each layer, in recurrent layers one for each loop it ran;
            default: enough for four texts of max_seq_len. Where they run out, the youngest text starts over.
        n_loops: the deepest that a request may ask for; default config.n_loops.
        tick_tokens: how many tokens are in the loop at most; chunk: how many of a prompt enter at once.
        vocab_size: ids from here on are never chosen.
        grammars: of the tokenizer, for requests with a constraint.
        exact: every pass has tick_tokens tokens, some of them idle, each token attends by itself, and each pair of
            token and expert is multiplied by itself: no sum depends on company, chunks or memory. Slower. Tested on
            CPUs; holds for equal tick_tokens.
    Raises:
        ValueError: an argument out of range, or a compiled model.
    """

    def __init__(
        self,
        model: RecurrentDepthTransformer,
        *,
        n_rows: int | None = None,
        n_loops: int | None = None,
        tick_tokens: int = 256,
        chunk: int = CHUNK,
        vocab_size: int | None = None,
        grammars: Grammars | None = None,
        exact: bool = False,
    ) -> None:
        require(not is_compiled(model), "model", "compiled", "as `load` gives it")
        require_int("chunk", chunk, 1)
        require_int("tick_tokens", tick_tokens, chunk)
        even = not exact or tick_tokens % EXACT == 0  # BLAS multiplies other last rows otherwise
        require(even, "tick_tokens", tick_tokens, f"a multiple of {EXACT} if exact")
        n_loops = model.config.n_loops if n_loops is None else n_loops
        check("loops", n_loops, "n_loops")
        vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        require_int("vocab_size", vocab_size, 1, model.config.vocab_size)
        self.model, self.chunk, self.tick_tokens, self.vocab_size = model, chunk, tick_tokens, vocab_size
        self.grammars, self.exact = grammars, exact
        weight = model.head_weight
        self.device = weight.device
        self.layout = Layout(model.config, n_loops=n_loops)
        n_rows = self.layout.most_rows(4 * model.config.max_seq_len) if n_rows is None else n_rows
        require_int("n_rows", n_rows, 1)
        self.pages = Pages(n_rows + exact, model.config.kv_width, dtype=weight.dtype, device=self.device)
        one = model.config.carry_streams == 1 and model.config.read_out == "last"
        self.read = "h" if one else "out"  # what the coda reads of a lane
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._events: list[Event] = []  # not told yet
        self.n_ticks = self.n_token_loops = self.n_preempted = self.n_drafted = self.n_agreed = 0
        self._numbers = iter(range(1 << 62))
        self._clear()

    def _clear(self) -> None:
        """Nothing is held by anyone, but one row and one lane by the token that stands idle in an exact pass."""
        self.pages.free_all()
        self.tables, self.prefixes = Tables(self.layout, self.pages), Prefixes(self.pages)
        self.lanes = Lanes(4 * self.tick_tokens + self.exact)
        self.active = NOBODY  # tokens in the loop
        self._arrivals: set[int] = set()  # slots where some may have left it
        self._before: _Together | None = None  # of the tick before this one
        self._idle: Tokens | None = None
        if self.exact:
            slot = self.tables.open(1)
            self.tables.rows[slot, :, 0] = self.pages.take(1)
            self._idle = Tokens.made([Part(slot, np.zeros(1, np.int64), 1)], self.lanes.take(1))

    def submit(self, request: Request) -> int:
        """Returns the request's number.

        Raises:
            ValueError: what this model or the memory cannot do, before anything is computed.
        """
        config = self.model.config
        n_loops = min(config.n_loops, self.layout.n_loops) if request.n_loops is None else request.n_loops
        require_int("n_loops", n_loops, 1, self.layout.n_loops)
        check_request(config, request, n_loops=n_loops, vocab_size=self.vocab_size, chunk=self.chunk)
        limit, length = config.max_seq_len, len(request.prompt)
        require(length < limit, "prompt", f"{length} tokens", f"fewer than max_seq_len = {limit}")
        several = config.n_token_tables > 1
        shape = (length, config.n_token_tables) if several else (length,)
        try:
            ids = np.asarray(request.prompt)
        except ValueError:  # rows of different lengths
            ids = np.empty(0)
        highest = (self.vocab_size if request.scores_prompt else config.vocab_size) - 1  # others have no probability
        ok = ids.dtype.kind in "iu" and ids.shape == shape and ids.min() >= 0 and ids.max() <= highest
        require(ok, "prompt", list(request.prompt[:3]), f"integers of shape {shape} in [0, {highest}]")
        require(not several or request.max_tokens == 1, "max_tokens", request.max_tokens, "1 with several token tables")
        plain = not (several and request.sampling.reads_text)
        require(plain, "sampling", request.sampling, "without penalties with several token tables")
        require(not (several and request.scores_prompt), "scores_prompt", True, "False with several token tables")
        fits = not request.prefix or length <= self.tick_tokens
        require(fits, "prompt", f"{length} tokens", f"at most tick_tokens ({self.tick_tokens}) with prefix")
        room = request.room(limit)
        needed, have = self.layout.most_rows(room), self.pages.n_free + self.pages.n_used - self.exact
        require(needed <= have, "prompt and max_tokens", f"{room} tokens, {needed} rows", f"at most {have} rows")
        matcher = None
        if request.constraint is not None:
            ok = self.grammars is not None and self.grammars.vocab_size == self.vocab_size and not several
            allowed = "asked of an Engine(…, grammars=Grammars(tokenizer), vocab_size=tokenizer.vocab_size)"
            require(ok, "constraint", request.constraint, allowed)
            assert self.grammars is not None
            matcher = self.grammars.start(request.constraint)
        sequence = Sequence(next(self._numbers), request, ids.astype(np.int64), n_loops, room, matcher)
        self.waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> bool:
        """Whether it was still there. Events of the step that is being read may still tell of it."""
        found = [s for s in (*self.running, *self.waiting) if s.number == number]
        for sequence in found:
            self._release(sequence)
            (self.running if sequence in self.running else self.waiting).remove(sequence)
        return bool(found)

    def stats(self) -> Stats:
        """What is held, and what has been done so far."""
        row = self.pages.entries[0].nbytes
        return Stats(
            n_waiting=len(self.waiting),
            n_running=len(self.running),
            bytes_used=row * self.pages.n_used,
            bytes_idle=row * self.prefixes.n_idle(),
            bytes_total=self.pages.entries.nbytes,
            **{name: getattr(self, name) for name in COUNTS},
        )

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._events)

    def run(self) -> Iterator[Event]:
        """Until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One tick: new tokens through the prelude, all that may through the block, those that are done to the coda.
        If anything is raised, no token is lost: what was found so far comes with the next step."""
        self.n_ticks += 1
        try:
            self._enter()
            self._loop()
            self._leave()
            events, self._events = self._events, []
            return events
        except BaseException:  # in the middle of something: all start over, should this be called again
            self.n_preempted += len(self.running)
            self.waiting = sorted({*self.waiting, *self.running}, key=lambda s: s.number)
            self.running = []
            for sequence in self.waiting:
                sequence.start_over()
            self._clear()
            raise

    def _enter(self) -> None:
        """One chunk of each sequence; those that decode come first. No more are in the loop than a tick takes."""
        room = min(self.tick_tokens - len(self.active), self.lanes.n_free)
        words: list[np.ndarray] = []
        parts: list[Part] = []

        def enter(sequence: Sequence) -> int:
            """How much room that takes: all, where a prefix waits for more."""
            n = sequence.n_together or min(self.chunk, len(sequence.tokens) - sequence.entered, room)
            if n > room:
                return room
            if n > 0:
                assert sequence.slot is not None
                words.append(sequence.ids(n))
                parts.append(Part(sequence.slot, *sequence.enter(n), sequence.rule))
            return n

        for sequence in sorted(self.running, key=lambda s: not s.decodes):
            if not room and sequence.n_guessed:
                sequence.cut_draft()
            room -= enter(sequence)
        for sequence in self._beginning() if room > 0 else ():
            room -= enter(sequence)
            if room <= 0:
                break
        if not parts:
            return
        ids = np.concatenate(words)
        new = Tokens.made(parts, self.lanes.take(len(ids)))
        self.active = Tokens.joined([self.active, new])
        kept = self._take(self.layout.prelude, new)
        if len(kept) < len(new):
            ids = ids[np.isin(new.slot, kept.slot)]
        if len(kept):
            self._prelude(kept, ids)

    def _beginning(self) -> Iterator[Sequence]:
        """Sequences that begin now, one by one; nobody overtakes one for whom there are no rows."""
        if not self.waiting:
            return
        coming = sum(len(s.tokens) + 1 - s.left for s in self.running)
        computing = {key for s in self.running for key in s.keys[s.left // BLOCK :]}
        for sequence in self.waiting.copy():
            if not self._has_room(coming + len(sequence.tokens) + 1):
                return
            keys = sequence.known_keys
            known = self.prefixes.known(keys)
            if known < len(keys) and keys[known] in computing:  # another computes more of its prompt now
                continue
            sequence.slot = slot = self.tables.open(sequence.room, sequence.n_prefix)
            self.running.append(sequence)
            self.waiting.remove(sequence)
            sequence.entered = sequence.left = self.prefixes.give(keys, self.tables.rows[slot])
            coming += len(sequence.tokens) + 1 - sequence.left
            computing.update(sequence.keys[known:])
            yield sequence

    def _has_room(self, n_tokens: int) -> bool:
        """Whether rows are there for so many more tokens; or nobody else is."""
        needed = self.layout.most_rows(n_tokens)
        missing = needed - self.pages.n_free
        if missing > 0 and self.prefixes.n_idle() >= missing:
            while self.pages.n_free < needed and self.prefixes.drop_one():
                pass
        return self.pages.n_free >= needed or not self.running

    def _prelude(self, new: Tokens, ids: np.ndarray) -> None:
        model, all_new = self.model, self._filled(new)
        ids = np.concatenate((ids, np.zeros((len(all_new) - len(new), *ids.shape[1:]), ids.dtype)))
        x = model.embed(self._tensor(ids)[None])
        if model.config.value_embeddings:
            self.lanes.put("ids", self._tensor(all_new.lane), self._tensor(ids)[None])
            self._before = None  # its lanes may have other tokens now
        together = self._together(all_new, self.layout.prelude, x)
        lanes, context = together.lanes, together.context
        e = model.prelude(x, context, Tick(self.tables, all_new, together.plans, self.layout.prelude))
        if model.config.is_plain:
            self.lanes.put(self.read, lanes, e)
            self._sort_out(np.isin(self.active.lane, new.lane), np.ones(len(new), np.bool_))
            return
        h = initial_state(model.config.initial_state, e, context, model.config.noise_std)
        self.lanes.put("h", lanes, model.carry.expand(h))
        self.lanes.put("e", lanes, e)
        kinds = np.unique(new.rule)
        if self._halts or kinds[-1] >= 0:
            rules: list[Any] = [_Rules(RULES[kind]) for kind in kinds if kind >= 0]
            rules += [None] if self._halts else []
            reading = [rule for rule in rules if model.halting.reads_predictions(rule)]
            self.lanes.put_halt(lanes, model.halting.start(h, model._predict(h, reading[0]) if reading else None, None))

    @property
    def _halts(self) -> bool:
        """Whether the model's own head weighs every loop."""
        return self.model.config.halting == "act"

    def _loop(self) -> None:
        """The block, once."""
        n, runs = len(self.active), self._runs()
        moving = self._take(self.layout.recurrent, self.active if runs.all() else self.active.where(runs))
        if len(self.active) < n:  # whoever starts over has left
            runs = self._runs()
        if not len(moving):
            return
        self.n_token_loops += len(moving)
        everything = self._filled(moving)
        if self._before is None or not self._before.tokens.are(everything):
            self._before = self._together(everything, self.layout.recurrent)
        together = self._before
        lanes, loops = together.lanes, everything.loop
        ends = loops + 1 >= everything.depth
        before, e = self.lanes.get("h", lanes), self.lanes.get("e", lanes)
        alike = not self.exact and bool((loops == loops[0]).all())  # low-rank deltas are then a slice
        loop: Any = int(loops[0]) if alike else self._tensor(loops)[None]
        tick = Tick(self.tables, everything, together.plans, self.layout.recurrent)
        now, _ = self.model.loop_once(before, e, loop, together.context, tick)
        self.lanes.put("h", lanes, now)
        out = self.model.carry.mean(now)
        if self._halts or (moving.rule >= 0).any():
            halted, out = self._halt(
                everything, lanes, out, before, self._tensor(loops)[None], self._tensor(ends)[None]
            )
            ends = halted[0].cpu().numpy()
        if self.read != "h":
            self.lanes.put(self.read, lanes, out)
        self._sort_out(runs, ends[: len(moving)])

    def _runs(self) -> np.ndarray:
        """Which of the active tokens run: those of a draft wait after its few loops until it is complete."""
        runs = np.ones(len(self.active), np.bool_)
        for sequence in self.running:
            draft = sequence.request.draft
            if draft is not None and sequence.drafts:
                mine = np.flatnonzero(self.active.slot == sequence.slot)
                loops = self.active.loop[mine]
                there = sequence.entered == len(sequence.tokens) and len(loops) and loops[-1] >= draft.n_loops
                if sequence.n_missing or not there:
                    runs[mine[loops == draft.n_loops]] = False
        return runs

    def _halt(
        self, tokens: Tokens, lanes: Tensor, out: Tensor, before: Tensor, loop: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Who leaves the loop, (1, N) bool, and what the coda would read of each, (1, N, D); out: what it would read
        without a mixture."""
        model, ends = self.model, last.clone()
        for kind in np.unique(tokens.rule).tolist():
            if kind < 0 and not self._halts:
                continue
            members = np.flatnonzero(tokens.rule == kind)
            members = np.resize(members, len(tokens)) if self.exact else members  # as many as in every pass
            alike = len(members) == len(tokens) and not self.exact
            some: Any = slice(None) if alike else self._tensor(members)  # a slice copies nothing
            rule: Any = None
            if kind >= 0:
                threshold = self._tensor(tokens.threshold[members]).to(out.dtype)[None]
                rule = _Rules(RULES[kind], threshold, self._tensor(tokens.min_loops[members])[None])
            state = self.lanes.get_halt(lanes[some])
            h = out[:, some]
            signals = Signals(h, model.carry.mean(before[:, some]), model._predict(h, rule), state.log_probs)
            idle = torch.zeros_like(state.halted)
            state = model.halting.step(state, signals, rule, loop[:, some], idle, last[:, some])
            self.lanes.put_halt(lanes[some], state)
            ends[:, some] = state.halted
            if state.mixture is not None:
                out[:, some] = state.mixture
        return ends, out

    def _sort_out(self, ran: np.ndarray, ends: np.ndarray) -> None:
        """Of the active tokens those that `ran` are a loop further; those that have left the loop wait for the coda."""
        active = self.active
        self.active = replace(active, loop=active.loop + ran)
        if not ends.any():
            return
        done = ran.copy()
        done[ran] = ends
        left = active.where(done)
        self.tables.halt(left.slot, left.place, left.loop)
        self.tables.lanes[left.slot, left.place] = left.lane
        self.tables.loops[left.slot, left.place] = 0 if self.model.config.is_plain else left.loop + 1
        self._arrivals.update(left.slot.tolist())
        self.active = self.active.where(~done)

    def _leave(self) -> None:
        """Tokens whose predecessors have all left the loop go through the coda, and those that a draft goes on from;
        after the last of a text a token is sampled, others of a prompt may be asked what follows them."""
        leaving: list[_Leaving] = []
        room, arrived = self.tick_tokens, self._arrived()
        for sequence in self.running:
            guessing = None if sequence.request.draft is None else self._guessing(sequence)
            if guessing is not None:
                each = _Leaving(sequence, *guessing)
            elif sequence.slot in arrived:
                n = arrived[sequence.slot]
                n = min(n, room) if n <= room or not sequence.n_guessed else 0  # a draft's tokens: all or none
                each = _Leaving(sequence, sequence.left, n)
            else:
                continue
            if 0 < each.n <= room:
                leaving.append(each)
                room -= each.n
        if not leaving:
            return
        tokens = self._take(self.layout.coda, self._of(leaving))
        leaving = [each for each in leaving if each.sequence.slot is not None]
        if not leaving:
            return
        hidden = self._coda(tokens) if self.layout.coda else None
        found, scored = self._gone(leaving, tokens)
        if not found and not scored:
            return
        read = [each.end for each in found]
        for each in scored:
            read += range(each.start, each.start + each.n)
        ends = np.resize(read, self.tick_tokens) if self.exact else np.array(read)
        if hidden is None:  # no layers: only those that are read have anything to pass
            hidden = self._coda(tokens.where(ends))
        else:
            hidden = hidden[self._tensor(ends)]
        logits = self.model.logits(hidden)[: len(read), : self.vocab_size]
        self._score(scored, logits[len(found) :])
        self._sample(found, logits[: len(found)])

    def _coda(self, tokens: Tokens) -> Tensor:
        """(N, D), in which the logits are linear; in an exact pass of those that fill it too."""
        everything = self._filled(tokens)
        together = self._together(everything, self.layout.coda, held=self.read)
        h = self.lanes.get(self.read, together.lanes)
        tick = Tick(self.tables, everything, together.plans, self.layout.coda)
        return self.model.coda(h, together.context, tick)[0]

    def _of(self, leaving: list[_Leaving]) -> Tokens:
        """In the order of `leaving`, each sequence's side by side."""
        some = [each for each in leaving if each.sequence.slot is not None]
        slots, first, n = (np.array(each) for each in zip(*((s.slot, at, n) for s, at, n, _ in some), strict=True))
        slots, ends = np.repeat(slots, n), n.cumsum()
        places = np.arange(ends[-1]) + np.repeat(first - ends + n, n)
        lanes = self.tables.lanes[slots, places]
        for each, end in zip(some, ends.tolist(), strict=True):
            if each.guess is not None:
                lanes[end - 1] = each.guess
        return Tokens.of_coda(slots, places, lanes)

    def _guessing(self, sequence: Sequence) -> tuple[int, int, int] | None:
        """Place, 1 and lane of the token that the next one of a draft is guessed from, where its few loops are done."""
        draft = sequence.request.draft
        if draft is None or not sequence.drafts or not sequence.n_missing or sequence.entered < len(sequence.tokens):
            return None
        newest = np.flatnonzero(self.active.slot == sequence.slot)[-1:]
        there = (self.active.loop[newest] == draft.n_loops).any()
        return (int(self.active.place[newest[0]]), 1, int(self.active.lane[newest[0]])) if there else None

    def _arrived(self) -> dict[int, int]:
        """By slot: how many tokens wait for the coda that no predecessor in the loop holds up."""
        some = [sequence for sequence in self.running if sequence.slot in self._arrivals]
        if not some:
            return {}
        slots, left, entered = (
            np.array(each) for each in zip(*((s.slot, s.left, s.entered) for s in some), strict=True)
        )
        first, last = left.min(), entered.max()
        there = self.tables.lanes[slots, first:last] >= 0
        gaps = ~there & (np.arange(first, last) >= left[:, None])
        n = np.where(gaps.any(1), gaps.argmax(1) + first, last) - left
        return dict(zip(slots.tolist(), n.tolist(), strict=True))

    def _gone(self, leaving: list[_Leaving], tokens: Tokens) -> tuple[list[_Found], list[_Scored]]:
        """These have passed the coda: what is to be sampled from them, and what they score."""
        held = self.tables.lanes
        stay = np.repeat([each.guess is not None for each in leaving], [each.n for each in leaving])
        slots, places = tokens.slot[~stay], tokens.place[~stay]
        self.lanes.drop(tokens.lane[~stay])
        held[slots, places] = NONE
        found: list[_Found] = []
        scored: list[_Scored] = []
        start = 0
        for sequence, first, n, guess in leaving:
            if guess is None:
                self._pass(sequence, n)
            if guess is not None or sequence.left == len(sequence.tokens):
                sampled = range(first if guess is not None else max(first, sequence.n_sure - 1), first + n)
                found += [_Found(sequence, place, start + place - first, guess is not None) for place in sampled]
            if sequence.n_scored < sequence.n_prompt:
                here = range(max(first, sequence.n_scored - 1), min(first + n, sequence.n_prompt - 1))
                if here:  # else these were told before the text started over
                    scored.append(_Scored(sequence, here[0], start + here[0] - first, len(here)))
            start += n
        return found, scored

    def _pass(self, sequence: Sequence, n: int) -> None:
        """Its next n tokens are through."""
        slot, first, last = sequence.slot, sequence.left, sequence.left + n
        assert slot is not None
        sequence.left = last
        sequence.loops[first:last] = self.tables.loops[slot, first:last]
        if first // BLOCK < min(last // BLOCK, len(sequence.keys)):
            self.prefixes.keep(sequence.keys[: last // BLOCK], self.tables.rows[slot])
        if last == sequence.entered or not (self.tables.lanes[slot, last : sequence.entered] >= 0).any():
            self._arrivals.discard(slot)

    def _score(self, scored: list[_Scored], logits: Tensor) -> None:
        """Tell what the logits (m, V) say of the tokens that the prompts have."""
        for sequence, first, _, n in scored:
            tokens, n_logprobs = sequence.tokens[first + 1 : first + 1 + n], sequence.request.n_logprobs
            assert n_logprobs is not None
            rows, logits = logits[:n], logits[n:]
            told = zip(
                tokens, sequence.loops[first : first + n].tolist(), likeliest(rows, tokens, n_logprobs), strict=True
            )
            self._events += [Event(sequence.number, token, loops, "", *by, prompt=True) for token, loops, by in told]
            sequence.n_scored = first + 1 + n

    def _sample(self, found: list[_Found], logits: Tensor) -> None:
        """The token that follows each; those that sample alike at once."""
        alike: dict[Sampling, list[int]] = defaultdict(list)
        rows = list(logits)
        for i, (sequence, place, _, _) in enumerate(found):
            n, sampling = sequence.n_prompt, sequence.request.sampling
            if sampling.reads_text:
                rows[i] = adjusted(rows[i], sampling, sequence.tokens[:n], sequence.tokens[n : place + 1])
            allowed = self._allowed(sequence, place)
            rows[i] = rows[i] if allowed is None else rows[i].masked_fill(~allowed, -torch.inf)
            alike[sequence.kind].append(i)
        chosen = [NO_TOKEN] * len(found)
        for sampling, members in alike.items():
            seeds = self._tensor(np.array([found[i].sequence.request.sampling.seed for i in members]))
            index = self._tensor(np.array([found[i].n_before for i in members]))
            tokens = draw(torch.stack([rows[i] for i in members]), sampling, seeds, index)
            for i, token in zip(members, tokens.tolist(), strict=True):
                chosen[i] = token
        for each, token, row in zip(found, chosen, logits, strict=True):
            if each.guess:
                each.sequence.tokens.append(max(token, 0))  # NO_TOKEN comes back at full depth
            elif each.place < each.sequence.left and each.sequence in self.running:  # else a guess before it was wrong
                self._push(each.sequence, token, row)

    def _allowed(self, sequence: Sequence, place: int) -> Tensor | None:
        """(V,) bool: which ids may follow the token at this place; none, where its constraint can't be followed."""
        try:
            allowed = sequence.allowed(place)
        except ValueError:
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        return None if allowed is None else allowed.to(self.device)

    def _push(self, sequence: Sequence, token: int, logits: Tensor) -> None:
        """The sequence's next token, which these logits gave. It is told before anything that it held is given up."""
        place, request = sequence.n_sure - 1, sequence.request
        loops = int(sequence.loops[place])
        logprob, likely = None, ()
        if request.n_logprobs is not None and token != NO_TOKEN:
            ((logprob, likely),) = likeliest(logits[None], [token], request.n_logprobs)
        reason = "failed" if token == NO_TOKEN else "stop" if token in request.stop else ""
        wrong = False
        if not reason:
            reason, wrong = self._learn(sequence, token)
        kept = None if reason in ("failed", "stop") else token
        self._events.append(Event(sequence.number, kept, loops, reason, logprob, likely))
        if reason:
            self.running.remove(sequence)
            self._release(sequence)
        elif wrong:
            assert sequence.slot is not None
            self.tables.forget(sequence.slot, sequence.left)

    def _learn(self, sequence: Sequence, token: int) -> tuple[str, bool]:
        """Go on with this token: the reason why the text ends with it, if it does; whether a draft guessed another."""
        guessed = sequence.tokens[sequence.n_sure : sequence.n_sure + 1]
        try:
            wrong = sequence.learn(token)
        except ValueError:  # its constraint can't be followed any more
            return "failed", False
        self.n_drafted += len(guessed)
        self.n_agreed += guessed == [token]
        written = sequence.n_sure - sequence.n_prompt
        full = written >= sequence.request.max_tokens or sequence.n_sure >= self.model.config.max_seq_len
        return "length" if full else "", wrong

    def _take(self, layers: list[int], tokens: Tokens) -> Tokens:
        """Rows for these tokens. Where too few are free, the youngest sequence gives up what it has and starts over
        later: those of the tokens that are left."""
        while True:
            try:
                self.tables.take(layers, tokens.slot, tokens.place, tokens.loop)
            except FullError:
                if not self.prefixes.drop_one():
                    victim = max(self.running, key=lambda s: s.number)
                    tokens = tokens.where(tokens.slot != victim.slot)
                    self._preempt(victim)
            else:
                return tokens

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        if sequence in self.running:
            self.n_preempted += 1
            self.running.remove(sequence)
            self.waiting = sorted((*self.waiting, sequence), key=lambda s: s.number)

    def _release(self, sequence: Sequence) -> None:
        slot = sequence.slot
        if slot is not None:
            mine = self.active.slot == slot
            waiting = self.tables.lanes[slot]
            self.lanes.drop(np.concatenate((self.active.lane[mine], waiting[waiting >= 0])))
            self.active = self.active.where(~mine)
            self._arrivals.discard(slot)
            self.tables.close(slot)
        sequence.start_over()

    def _filled(self, tokens: Tokens) -> Tokens:
        """With an idle token as often as an exact pass needs it."""
        n = self.tick_tokens - len(tokens)
        if self._idle is None or not n:
            return tokens
        return Tokens.joined([tokens, self._idle.where(np.zeros(n, np.int64))])

    def _together(self, tokens: Tokens, layers: list[int], x: Tensor | None = None, held: str = "e") -> _Together:
        """Before these layers. x (1, N, D): anything of theirs, for its shape and type; else a lane's by this name."""
        lanes, positions = self._tensor(tokens.lane), self._tensor(tokens.place)[None]
        x = self.lanes.get(held, lanes[:1]).expand(-1, len(tokens), -1) if x is None else x
        ids = self.lanes.get("ids", lanes) if self.model.config.value_embeddings else None
        context = self.model.context(x, tokens=ids, positions=positions)
        context = replace(context, exact=self.exact)
        how: Any = {"width": self.model.config.kv_width, "prefix": self.tables.prefix, "apart": self.exact}
        return _Together(tokens, lanes, context, planned(tokens, self.device, **how) if layers else [])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


def is_compiled(model: RecurrentDepthTransformer) -> bool:
    """Whether `model.compile` has replaced its parts."""
    return any(name in vars(model) for name in ("_step", "_compute"))
