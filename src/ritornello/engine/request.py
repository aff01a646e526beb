"""What the engine is asked for, and what it tells."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ritornello.config import ExitRule, require, require_float, require_int
from ritornello.engine.constraints import Constraint
from ritornello.engine.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Self-speculation: the first `n_loops` guess `n_tokens`, which then run their other loops together, from where
    they are (LayerSkip 2404.16710). The guesses that full depth agrees with stand. It takes the token that it would
    take anyway, by the same random number, so the text is what it is without a draft, greedy or sampled."""

    n_loops: int
    n_tokens: int = 4

    def __post_init__(self) -> None:
        require_int("draft.n_loops", self.n_loops, 1)
        require_int("draft.n_tokens", self.n_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """prompt: token ids, or tuples of them for a model with several token tables, which gives one answer: max_tokens
    is 1. n_loops: of each token, with `exit` the most it may take; None: the model's own. loop_budget: loops of a
    written token in the mean; one may take what those before it left, n_loops at most. constraint: what the text is;
    where it may end, the end of the document is among the tokens. The text ends before one of the `stop` tokens, or
    after max_tokens."""

    prompt: Sequence[Any]
    max_tokens: int = 256
    n_loops: int | None = None
    exit: ExitRule | None = None
    loop_budget: float | None = None
    draft: Draft | None = None
    constraint: Constraint | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    n_logprobs: int | None = None  # the token's log-probability comes back, and so many of the likeliest

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt", self.prompt, "at least one token")
        require_int("max_tokens", self.max_tokens, 1)
        if self.n_logprobs is not None:
            require_int("n_logprobs", self.n_logprobs, 0, 20)
        if self.loop_budget is not None:
            require_float("loop_budget", self.loop_budget, self.min_loops)
        if self.draft is not None:
            even = self.exit is None and self.loop_budget is None
            require(even, "draft", self.draft, "without exit and loop_budget: all tokens of a draft go equally deep")

    @property
    def needs_engine(self) -> bool:
        """Whether the engine alone can do it."""
        return self.sampling.reads_text or any((self.constraint, self.loop_budget, self.draft))

    @property
    def min_loops(self) -> int:
        return 1 if self.exit is None else self.exit.min_loops


@dataclass(frozen=True)
class Event:
    """A token of a request and the loops that led to it. reason: why the text ends here, or nothing: `length`, with its
    last token; `stop`, before a token of the request's; `failed`, where logits are not numbers.

    logprob: of the token, in nats, and `likeliest` tokens with theirs: by the model over the ids that may be chosen,
    before anything else changed them.
    """

    number: int
    token: int | None
    loops: int
    reason: str = ""
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Of an engine: requests; bytes of keys and values, of which those that only a later prompt may want are idle;
    ticks, passes of single tokens through the block, texts that started over; tokens guessed and agreed with."""

    n_waiting: int
    n_running: int
    bytes_used: int
    bytes_idle: int
    bytes_total: int
    n_ticks: int
    n_token_loops: int
    n_preempted: int
    n_drafted: int
    n_agreed: int
