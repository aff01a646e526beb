"""What the engine is asked for, and what it tells."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ritornello.config import ExitRule, ModelConfig, require, require_int
from ritornello.engine.constraints import Constraint
from ritornello.engine.sampling import Sampling
from ritornello.limits import check
from ritornello.model.halting import check_exit

CHUNK = 64  # tokens of a prompt that enter the loop at once


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Self-speculation: the first `n_loops` guess `n_tokens`, which then run their other loops together, from where
    they are (LayerSkip 2404.16710). The guesses that full depth agrees with stand. It takes the token that it would
    take anyway, by the same random number, so the text is what it is without a draft, greedy or sampled."""

    n_loops: int
    n_tokens: int = 4

    def __post_init__(self) -> None:
        check("draft_loops", self.n_loops, "draft.n_loops")
        check("draft_tokens", self.n_tokens, "draft.n_tokens")


@dataclass(frozen=True, kw_only=True)
class Request:
    """prompt: token ids, or tuples of them for a model with several token tables, which gives one answer: max_tokens
    is 1. n_loops: of each token, with `exit` the most it may take; None: the model's own. loop_budget: loops in the
    mean of those that Events of written tokens tell, at any time; a token may take what those before it left, n_loops
    at most, and those of the prompt but its last take all. constraint: what the text is;
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
    prefix: bool = False  # the prompt's tokens see each other, both ways, as a prefix LM is trained: they enter at once
    n_logprobs: int | None = None  # the token's log-probability comes back, and so many of the likeliest
    scores_prompt: bool = False  # and those of the prompt's tokens but the first, before the text

    def __post_init__(self) -> None:
        kinds = {"exit": ExitRule, "draft": Draft, "constraint": Constraint, "sampling": Sampling, "stop": frozenset}
        for name, kind in kinds.items():
            value = getattr(self, name)
            ok = isinstance(value, kind) or (value is None and name in ("exit", "draft", "constraint"))
            require(ok, name, value, f"a {kind.__name__}")
        require(len(self.prompt) > 0, "prompt", self.prompt, "at least one token")
        check("max_tokens", self.max_tokens)
        for name in ("n_logprobs", "loop_budget"):
            if getattr(self, name) is not None:
                check(name, getattr(self, name))
        ok = isinstance(self.scores_prompt, bool) and not (self.scores_prompt and self.n_logprobs is None)
        require(ok, "scores_prompt", self.scores_prompt, "False, or True with n_logprobs")
        ok = isinstance(self.prefix, bool) and not (self.prefix and self.scores_prompt)
        require(ok, "prefix", self.prefix, "False, or True without scores_prompt: each token would see the next one")
        least = self.min_loops
        ok = self.loop_budget is None or self.loop_budget >= least
        require(ok, "loop_budget", self.loop_budget, f"at least min_loops ({least})")
        if self.draft is not None:
            even = self.exit is None and self.loop_budget is None
            require(even, "draft", self.draft, "without exit and loop_budget: all tokens of a draft go equally deep")

    @property
    def needs_engine(self) -> bool:
        """Whether the engine alone can do it."""
        return self.sampling.reads_text or any(
            (self.constraint, self.loop_budget, self.draft, self.scores_prompt, self.prefix)
        )

    def room(self, max_seq_len: int) -> int:
        """Tokens of it that are computed with at most: the last is not."""
        return min(len(self.prompt) + self.max_tokens, max_seq_len) - 1

    @property
    def min_loops(self) -> int:
        return 1 if self.exit is None else self.exit.min_loops


def check_request(config: ModelConfig, request: Request, *, n_loops: int, vocab_size: int, chunk: int = CHUNK) -> None:
    """Whether a model of this kind can do what is asked, with n_loops at most and ids below vocab_size. Raises
    ValueError."""
    for token, _ in request.sampling.logit_bias:
        require_int("logit_bias", token, 0, vocab_size - 1)
    require_int("n_logprobs", request.n_logprobs or 0, 0, vocab_size)
    check_exit(config, request.exit)
    require(request.min_loops <= n_loops, "min_loops", request.min_loops, f"<= n_loops ({n_loops})")
    layers = config.n_coda_layers  # whose tokens leave the loop one after the other
    require(not (request.prefix and layers), "prefix", request.prefix, f"False with n_coda_layers = {layers}")
    if request.loop_budget is not None:
        ok = not config.is_plain and request.loop_budget <= n_loops
        require(ok, "loop_budget", request.loop_budget, f"at most n_loops ({n_loops}), of a model that loops")
    if request.draft is not None:
        ok = config.read_out == "last" and not config.is_plain and request.draft.n_loops < n_loops
        allowed = f"fewer than n_loops ({n_loops}), of a model that loops and reads out the last state"
        require(ok, "draft.n_loops", request.draft.n_loops, allowed)
        require_int("draft.n_tokens", request.draft.n_tokens, 1, chunk - 1)


@dataclass(frozen=True)
class Event:
    """A token of a request and the loops that led to it. reason: why the text ends here, or nothing: `length`, with its
    last token; `stop`, before a token of the request's; `failed`, where logits are not numbers.

    logprob: of the token, in nats, and `likeliest` tokens with theirs: by the model over the ids that may be chosen,
    before anything else changed them; NaN where logits are not numbers.

    prompt: a token of the prompt, where the request `scores_prompt`; the loops are those of the token before it.
    """

    number: int
    token: int | None
    loops: int
    reason: str = ""
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    prompt: bool = False


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
