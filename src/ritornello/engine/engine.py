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

from ritornello.config import MAX_LOOPS, ExitRule, require, require_int
from ritornello.engine.constraints import Grammars
from ritornello.engine.lanes import Lanes
from ritornello.engine.pages import FullError, Layout, Pages, Rows, Table
from ritornello.engine.prefixes import BLOCK, Prefixes
from ritornello.engine.request import Event, Request, Stats
from ritornello.engine.sampling import NO_TOKEN, Sampling, adjusted, draw, likeliest
from ritornello.engine.sequence import Flight, Sequence
from ritornello.engine.tick import Plan, Segment, Tick, planned, to_device
from ritornello.model.carry import initial_state
from ritornello.model.context import Context
from ritornello.model.halting import Signals, check_exit
from ritornello.model.rdt import RecurrentDepthTransformer

EXACT = 16  # in whose multiples an exact pass has tokens
COUNTS = "n_ticks", "n_token_loops", "n_preempted", "n_drafted", "n_agreed"


@dataclass(frozen=True)
class _Rules:
    """Exit rules of one kind, thresholds and least loops of each token (1, n)."""

    rule: str
    threshold: Tensor
    min_loops: Tensor


@dataclass(frozen=True)
class _Together:
    """What tokens that run side by side share, whatever their loops: it is made once and serves until one of them
    leaves or another joins."""

    members: list[tuple[Sequence, Flight]]
    flights: list[tuple[Flight, int]]  # without what fills the pass up
    lanes: Tensor
    context: Context
    plans: list[Plan]

    def runs_again(self, chosen: list[tuple[Sequence, Flight]]) -> bool:
        return self.flights == [(flight, len(flight.places)) for _, flight in chosen]


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


class Engine:
    """Requests enter and leave at any time; `step` is one tick.

    A request gives the same tokens alone or in any company, up to rounding (where two tokens, experts or exits are as
    good as equal, another may be chosen), or bit for bit if `exact`. Its randomness is addressed by its own seed.

    Args:
        n_rows: rows of keys and values: each token has one in each layer, in recurrent layers one for each loop it ran;
            default: enough for four texts of max_seq_len. Where they run out, the youngest text starts over.
        n_loops: the deepest that a request may ask for; default config.n_loops.
        tick_tokens: how many tokens one tick takes through the block; chunk: how many of a prompt enter at once.
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
        chunk: int = 64,
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
        require_int("n_loops", n_loops, 1, MAX_LOOPS)
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
        self.prefixes = Prefixes(self.pages)
        self.lanes = Lanes(4 * tick_tokens + exact)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._before: _Together | None = None  # of the tick before this one
        self.n_ticks = self.n_token_loops = self.n_preempted = self.n_drafted = self.n_agreed = 0
        self._numbers = iter(range(1 << 62))
        self._idle: Sequence | None = None
        if exact:
            token: Any = 0 if model.config.n_token_tables == 1 else (0,) * model.config.n_token_tables
            self._idle = Sequence(-1, Request(prompt=[token], max_tokens=1), 1, 1)
            self._idle.table = Table(self.layout, self.pages, 1)
            self._idle.table.rows[:] = self.pages.take(1)
            self._idle.lanes[:] = self.lanes.take(1)

    def submit(self, request: Request) -> int:
        """Returns the request's number.

        Raises:
            ValueError: what this model or the memory cannot do, before anything is computed.
        """
        config = self.model.config
        check_exit(config, request.exit)
        n_loops = min(config.n_loops, self.layout.n_loops) if request.n_loops is None else request.n_loops
        require_int("n_loops", n_loops, 1, self.layout.n_loops)
        if request.exit is not None:
            require_int("min_loops", request.exit.min_loops, 1, n_loops)
        limit, length = config.max_seq_len, len(request.prompt)
        require(length < limit, "prompt", f"{length} tokens", f"fewer than max_seq_len = {limit}")
        several = config.n_token_tables > 1
        shape = (length, config.n_token_tables) if several else (length,)
        try:
            ids = np.asarray(request.prompt)
        except ValueError:  # rows of different lengths
            ids = np.empty(0)
        ok = ids.dtype.kind in "iu" and ids.shape == shape and ids.min() >= 0 and ids.max() < config.vocab_size
        require(ok, "prompt", list(request.prompt[:3]), f"integers of shape {shape} in [0, {config.vocab_size - 1}]")
        require(not several or request.max_tokens == 1, "max_tokens", request.max_tokens, "1 with several token tables")
        plain = not (several and request.sampling.reads_text)
        require(plain, "sampling", request.sampling, "without penalties with several token tables")
        for token, _ in request.sampling.logit_bias:
            require_int("logit_bias", token, 0, self.vocab_size - 1)
        require_int("n_logprobs", request.n_logprobs or 0, 0, self.vocab_size)
        if request.loop_budget is not None:
            ok = not config.is_plain and request.loop_budget <= n_loops
            require(ok, "loop_budget", request.loop_budget, f"at most n_loops ({n_loops}), of a model that loops")
        if request.draft is not None:
            ok = config.read_out == "last" and not config.is_plain and request.draft.n_loops < n_loops
            allowed = f"fewer than n_loops ({n_loops}), of a model that loops and reads out the last state"
            require(ok, "draft.n_loops", request.draft.n_loops, allowed)
            require_int("draft.n_tokens", request.draft.n_tokens, 1, self.chunk - 1)
        room = min(length + request.max_tokens, limit) - 1  # the last token is never computed with
        needed, have = self.layout.most_rows(room), self.pages.n_free + self.pages.n_used - self.exact
        require(needed <= have, "prompt and max_tokens", f"{room} tokens, {needed} rows", f"at most {have} rows")
        matcher = None
        if request.constraint is not None:
            ok = self.grammars is not None and self.grammars.vocab_size == self.vocab_size and not several
            require(ok, "constraint", request.constraint, "served with grammars of the same vocab_size, and one table")
            assert self.grammars is not None
            matcher = self.grammars.start(request.constraint)
        sequence = Sequence(next(self._numbers), request, n_loops, room, matcher)
        self.waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> bool:
        """Whether it was still there."""
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
        return bool(self.waiting or self.running)

    def run(self) -> Iterator[Event]:
        """Until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One tick: new tokens through the prelude, all that may through the block, those that are done to the coda."""
        self.n_ticks += 1
        try:
            self._enter()
            self._loop()
            return self._leave()
        except BaseException:  # in the middle of something: all start over, should this be called again
            self._before = None
            for sequence in list(self.running):
                self._preempt(sequence)
            raise

    def _enter(self) -> None:
        """One chunk of each sequence, where the one before has left loop 0; those that decode come first."""
        entering: list[tuple[Sequence, Flight]] = []
        room = min(self.tick_tokens, self.lanes.n_free)
        full = False
        for sequence in [*sorted(self.running, key=lambda s: not s.decodes), *self.waiting]:
            n = min(self.chunk, len(sequence.tokens) - sequence.entered, room)
            if not room and sequence.n_drafted:
                sequence.cut_draft()
            if n <= 0 or (sequence.flights and sequence.flights[-1].loop == 0):
                continue
            if sequence.table is None:
                full = full or not self._has_room(sequence)  # nobody overtakes one for whom there is none
                if full or not self._begin(sequence):
                    continue
                n = min(n, len(sequence.tokens) - sequence.entered)
            places = np.arange(sequence.entered, sequence.entered + n)
            if not self._take(sequence, self.layout.prelude, 0, places):
                continue
            room -= n
            entering.append((sequence, sequence.enter(self.lanes.take(n))))
            if sequence in self.waiting:
                self.waiting.remove(sequence)
                self.running.append(sequence)
        entering = [(s, f) for s, f in entering if f in s.flights]
        if not entering:
            return
        entering = self._filled(entering)
        tokens = [s.tokens[place] for s, f in entering for place in f.places]
        x = self.model.embed(self._tensor(np.array(tokens))[None])
        together = self._together(entering, x)
        lanes, context = together.lanes, together.context
        e = self.model.prelude(x, context, self._tick(together))
        if self.model.config.is_plain:
            self.lanes.put("out", lanes, e)
            self._sort_out(entering, np.ones(len(tokens), np.bool_))
            return
        h = initial_state(self.model.config.initial_state, e, context)
        self.lanes.put("h", lanes, self.model.carry.expand(h))
        self.lanes.put("e", lanes, e)
        rules = [s.request.exit for s, _ in entering]
        reading = next((rule for rule in rules if self.model.halting.reads_predictions(rule)), None)
        if self._halts or any(rules):
            self.lanes.put_halt(lanes, self.model.halting.start(h, self.model._predict(h, reading), None))

    def _begin(self, sequence: Sequence) -> bool:
        """Let a waiting sequence begin, with what is known of its prompt; not yet, where another computes more of that
        now."""
        keys = sequence.keys[: (len(sequence.tokens) - 1) // BLOCK]  # the last token has to run
        known = self.prefixes.known(keys)
        end = (known + 1) * BLOCK
        if known < len(keys) and any(s.left < end and keys[known] in s.keys for s in self.running):
            return False
        sequence.table = Table(self.layout, self.pages, sequence.room)
        sequence.entered = sequence.left = self.prefixes.give(keys, sequence.table)
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether rows are there for its tokens and one more, beside those that others under way still take; or nobody
        else is."""
        coming = sum(len(s.tokens) + 1 - s.left for s in self.running)
        needed = self.layout.most_rows(coming + len(sequence.tokens) + 1)
        missing = needed - self.pages.n_free
        if missing > 0 and self.prefixes.n_idle() >= missing:
            while self.pages.n_free < needed and self.prefixes.drop_one():
                pass
        return self.pages.n_free >= needed or not self.running

    @property
    def _halts(self) -> bool:
        """Whether the model's own head weighs every loop."""
        return self.model.config.halting == "act"

    def _loop(self) -> None:
        """The block, once."""
        chosen = [(s, f) for s, f in self._runnable() if f in s.flights]
        if not chosen:
            return
        self.n_token_loops += sum(len(f.places) for _, f in chosen)
        if self._before is None or not self._before.runs_again(chosen):
            self._before = self._together(self._filled(chosen))
        together = self._before
        chosen, lanes = together.members, together.lanes
        loops = np.concatenate([np.full(len(f.places), f.loop) for _, f in chosen])
        budgets = np.concatenate([s.depths[f.places] for s, f in chosen])
        loop, last = self._tensor(loops)[None], self._tensor(loops + 1 >= budgets)[None]
        before, e = self.lanes.get("h", lanes), self.lanes.get("e", lanes)
        alike = not self.exact and bool((loops == loops[0]).all())  # low-rank deltas are then a slice
        now, _ = self.model.loop_once(
            before, e, int(loops[0]) if alike else loop, together.context, self._tick(together)
        )
        self.lanes.put("h", lanes, now)
        ends, out = last, self.model.carry.mean(now)
        if self._halts or any(s.request.exit for s, _ in chosen):
            ends, out = self._halt(chosen, lanes, now, before, loop, last)
        self.lanes.put("out", lanes, out)
        self._sort_out(chosen, ends[0].cpu().numpy())

    def _runnable(self) -> list[tuple[Sequence, Flight]]:
        """Flights whose sequence's earlier tokens are a loop ahead, each with rows for its entries."""
        chosen, room = [], self.tick_tokens
        for sequence in sorted(self.running, key=lambda s: not s.decodes):
            sequence.join()
            ahead = self.layout.n_loops + 1
            for flight in list(sequence.flights):
                loop, ahead_of_it = flight.loop, ahead
                ahead = loop
                if loop >= ahead_of_it or not room or sequence.waits(flight):
                    continue
                if len(flight.places) > room:
                    if sequence.n_drafted:  # stays whole
                        continue
                    # as many as may run, which are then a loop ahead of the others
                    sequence.flights.insert(sequence.flights.index(flight) + 1, flight.cut(room))
                if flight in sequence.flights and self._take(sequence, self.layout.recurrent, loop, flight.places):
                    room -= len(flight.places)
                    chosen.append((sequence, flight))
        return chosen

    def _halt(
        self,
        chosen: list[tuple[Sequence, Flight]],
        lanes: Tensor,
        now: Tensor,
        before: Tensor,
        loop: Tensor,
        last: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Who leaves the loop, (1, N) bool, and what the coda would read of each, (1, N, D)."""
        model, ends, out = self.model, last.clone(), self.model.carry.mean(now)
        kinds: dict[str, list[tuple[int, ExitRule | None]]] = defaultdict(list)
        place = 0
        for sequence, flight in chosen:
            rule = sequence.request.exit
            n = len(flight.places)
            if rule is not None or self._halts:
                kinds["" if rule is None else rule.rule] += [(place + i, rule) for i in range(n)]
            place += n
        for kind, members in kinds.items():
            if self.exact:  # as many as in every pass
                members += members[:1] * (self.tick_tokens - len(members))
            some = self._tensor(np.array([place for place, _ in members]))
            rule: Any = None
            if kind:
                rules = [rule for _, rule in members if rule is not None]
                threshold = torch.tensor([rule.threshold for rule in rules], device=self.device)[None]
                rule = _Rules(kind, threshold, self._tensor(np.array([rule.min_loops for rule in rules]))[None])
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

    def _sort_out(self, chosen: list[tuple[Sequence, Flight]], ends: np.ndarray) -> None:
        """Tokens that have left the loop wait for the coda; the others go on."""
        place = 0
        for sequence, flight in chosen:
            mine = ends[place : place + len(flight.places)]
            place += len(flight.places)
            if sequence is self._idle:
                continue
            done = flight.places[mine]
            assert sequence.table is not None
            sequence.table.halt(flight.loop, done)
            sequence.lanes[done] = flight.lanes[mine]
            sequence.loops[done] = 0 if self.model.config.is_plain else flight.loop + 1
            flight.places, flight.lanes, flight.loop = flight.places[~mine], flight.lanes[~mine], flight.loop + 1
            if not len(flight.places):
                sequence.flights.remove(flight)

    def _leave(self) -> list[Event]:
        """Tokens whose predecessors have all left the loop go through the coda, and those that a draft goes on from;
        after the last of a text a token is sampled."""
        leaving: list[tuple[Sequence, Flight]] = []
        room = self.tick_tokens
        for sequence in list(self.running):
            flight = sequence.guesses() or sequence.arrived(room)
            n = len(flight.places)
            if 0 < n <= room and sequence in self.running and self._take(sequence, self.layout.coda, 0, flight.places):
                leaving.append((sequence, flight))
                room -= n
        leaving = [(s, f) for s, f in leaving if s in self.running]
        if not leaving:
            return []
        together = self._together(self._filled(leaving), held="out")
        h = self.lanes.get("out", together.lanes)
        hidden = self.model.coda(h, together.context, self._tick(together))[0]
        found: list[_Found] = []
        start = 0
        for sequence, flight in leaving:
            found += self._gone(sequence, flight, start)
            start += len(flight.places)
        if not found:
            return []
        ends = np.array([each.end for each in found])
        ends = np.resize(ends, self.tick_tokens) if self.exact else ends
        logits = self.model.logits(hidden[self._tensor(ends)])[: len(found), : self.vocab_size]
        return self._sampled(found, logits)

    def _gone(self, sequence: Sequence, flight: Flight, start: int) -> "Iterator[_Found]":
        """These have passed the coda, the first of them at `start` of the row: what is to be sampled from them."""
        guess = sequence.lanes[flight.places[0]] < 0  # it has not left the loop
        if not guess:
            self.lanes.drop(flight.lanes)
            sequence.lanes[flight.places] = -1
            sequence.left += len(flight.places)
            if flight.places[0] < len(sequence.request.prompt):  # later tokens complete no block of it
                assert sequence.table is not None
                self.prefixes.keep(sequence.keys[: sequence.left // BLOCK], sequence.table)
        if guess or sequence.left == len(sequence.tokens):
            for place in flight.places:
                if guess or place >= sequence.n_sure - 1:
                    yield _Found(sequence, int(place), int(start + place - flight.places[0]), guess)

    def _sampled(self, found: "list[_Found]", logits: Tensor) -> list[Event]:
        """The token that follows each; those that sample alike at once."""
        alike: dict[Sampling, list[int]] = defaultdict(list)
        rows = list(logits)
        for i, (sequence, place, _, _) in enumerate(found):
            n, sampling = len(sequence.request.prompt), sequence.request.sampling
            rows[i] = adjusted(rows[i], sampling, sequence.tokens[:n], sequence.tokens[n : place + 1])
            allowed = self._allowed(sequence, place)
            rows[i] = rows[i] if allowed is None else rows[i].masked_fill(~allowed, -torch.inf)
            alike[replace(sampling, seed=0)].append(i)
        chosen = [NO_TOKEN] * len(found)
        for sampling, members in alike.items():
            seeds = self._tensor(np.array([found[i].sequence.request.sampling.seed for i in members]))
            index = self._tensor(np.array([found[i].n_before for i in members]))
            tokens = draw(torch.stack([rows[i] for i in members]), sampling, seeds, index)
            for i, token in zip(members, tokens.tolist(), strict=True):
                chosen[i] = token
        events = []
        for each, token, row in zip(found, chosen, logits, strict=True):
            if each.guess:
                each.sequence.tokens.append(max(token, 0))  # NO_TOKEN comes back at full depth
            elif each.place < each.sequence.left and each.sequence in self.running:  # else a guess before it was wrong
                events.append(self._push(each.sequence, token, row))
        return events

    def _allowed(self, sequence: Sequence, place: int) -> Tensor | None:
        """(V,) bool: which ids may follow the token at this place; none, where its constraint can't be followed."""
        try:
            allowed = sequence.allowed(place)
        except ValueError:
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        return None if allowed is None else allowed.to(self.device)

    def _push(self, sequence: Sequence, token: int, logits: Tensor) -> Event:
        """The sequence's next token, which these logits gave."""
        place, request = sequence.n_sure - 1, sequence.request
        loops = int(sequence.loops[place])
        logprob, likely = likeliest(logits, token, request.n_logprobs)
        reason = "failed" if token == NO_TOKEN else "stop" if token in request.stop else ""
        if not reason:
            if sequence.n_drafted:
                self.n_drafted += 1
                self.n_agreed += sequence.tokens[sequence.n_sure] == token
            sequence.learn(token)
            written = sequence.n_sure - len(request.prompt)
            full = written >= request.max_tokens or sequence.n_sure >= self.model.config.max_seq_len
            reason = "length" if full else ""
        if reason:
            self._release(sequence)
            self.running.remove(sequence)
        kept = None if reason in ("failed", "stop") else token
        return Event(sequence.number, kept, loops, reason, logprob, likely)

    def _take(self, sequence: Sequence, layers: list[int], loop: int, places: Rows) -> bool:
        """Rows for these tokens. Where none are free, the youngest sequence gives up what it has and starts over later;
        False if that is this one."""
        while True:
            assert sequence.table is not None
            try:
                sequence.table.take(layers, loop, places)
            except FullError:
                if self.prefixes.drop_one():
                    continue
                holding = [s for s in self.running if s.table is not None]
                victim = max((*holding, sequence), key=lambda s: s.number)
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        if sequence in self.running:
            self.n_preempted += 1
            self.running.remove(sequence)
            self.waiting = sorted((*self.waiting, sequence), key=lambda s: s.number)

    def _release(self, sequence: Sequence) -> None:
        for flight in sequence.flights:
            self.lanes.drop(flight.lanes)
        self.lanes.drop(sequence.lanes[sequence.lanes >= 0])
        if sequence.table is not None:
            sequence.table.forget(0)
        sequence.start_over()

    def _filled(self, chosen: list[tuple[Sequence, Flight]]) -> list[tuple[Sequence, Flight]]:
        """With an idle token, as often as an exact pass needs it."""
        n = self.tick_tokens - sum(len(f.places) for _, f in chosen)
        if self._idle is None or not n:
            return chosen
        return [*chosen, (self._idle, Flight(np.zeros(n, np.int64), np.repeat(self._idle.lanes, n)))]

    def _together(
        self, members: list[tuple[Sequence, Flight]], x: Tensor | None = None, held: str = "e"
    ) -> "_Together":
        """x (1, N, D): anything of theirs, for its type; else what lanes hold by this name."""
        lanes = self._tensor(np.concatenate([f.lanes for _, f in members]))
        positions = self._tensor(np.concatenate([f.places for _, f in members]))[None]
        context = self.model.context(self.lanes.get(held, lanes) if x is None else x, positions=positions)
        context = replace(context, exact=self.exact)
        plans = planned(self._segments(members), self.device, apart=self.exact)
        flights = [(f, len(f.places)) for s, f in members if s is not self._idle]
        return _Together(members, flights, lanes, context, plans)

    def _tick(self, together: "_Together") -> Tick:
        return Tick(self.pages, self._segments(together.members), together.plans)

    def _segments(self, members: list[tuple[Sequence, Flight]]) -> list[Segment]:
        return [Segment(s.table, f.places, f.loop) for s, f in members if s.table is not None]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


def is_compiled(model: RecurrentDepthTransformer) -> bool:
    """Whether `model.compile` has replaced its parts."""
    return any(name in vars(model) for name in ("_step", "_compute"))
