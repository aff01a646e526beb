"""What may be asked for a text: one table for Python, the command line, files of requests and HTTP."""

from dataclasses import dataclass

from ritornello.config import MAX_LOOPS, require_float, require_int


@dataclass(frozen=True)
class Limit:
    """A value is an int or a finite float in [low, high], or in (low, high] if open_low; high None: no bound."""

    kind: type[int] | type[float]
    low: int | float
    high: int | float | None
    open_low: bool = False


LIMITS: dict[str, Limit] = {
    "loops": Limit(int, 1, MAX_LOOPS),
    "min_loops": Limit(int, 1, MAX_LOOPS),
    "loop_budget": Limit(float, 1, MAX_LOOPS),
    "exit_threshold": Limit(float, 0, None),  # a rule that reads a probability has 1
    "draft_loops": Limit(int, 1, MAX_LOOPS),
    "draft_tokens": Limit(int, 1, 2**10),
    "max_tokens": Limit(int, 1, 2**20),
    "n": Limit(int, 1, 128),  # texts for one prompt
    "n_logprobs": Limit(int, 0, 20),
    "temperature": Limit(float, 0, 100),
    "top_k": Limit(int, 1, 2**20),
    "top_p": Limit(float, 0, 1, open_low=True),
    "min_p": Limit(float, 0, 1),
    "seed": Limit(int, 0, 2**63 - 1),
    "repetition_penalty": Limit(float, 0, 100, open_low=True),
    "frequency_penalty": Limit(float, -100, 100),
    "presence_penalty": Limit(float, -100, 100),
    "logit_bias": Limit(float, -100, 100),
}


def check(name: str, value: object, field: str | None = None) -> None:
    """Raise ValueError where a value is not within LIMITS[name]; field: what the user calls it, if not by this name."""
    limit, field = LIMITS[name], name if field is None else field
    if limit.kind is int:
        assert isinstance(limit.low, int) and not isinstance(limit.high, float)
        require_int(field, value, limit.low, limit.high)
    else:
        high = float("inf") if limit.high is None else limit.high
        require_float(field, value, limit.low, high, limit.open_low)
