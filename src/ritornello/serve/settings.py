"""What one server may be asked for, and how long it waits for whom."""

from dataclasses import dataclass

from ritornello.config import MAX_LOOPS, ModelConfig, require, require_float, require_int

MAX_HEAD, MAX_BODY = 16_384, 2_000_000  # bytes of a request's headers, and of what follows
MAX_FIELDS, MAX_TEXTS, MAX_IDS = 64, 2048, 2**20  # of an object; prompts, messages, parts of one; ids of a prompt
MAX_GRAMMAR = 64_000  # characters of a JSON schema or a regular expression
MAX_READINGS = 50_000  # numbers that one trace may tell
MAX_STOPS, MAX_STOP = 16, 1000  # stop strings, and characters of one


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Bounds of one server, beside those of `limits.LIMITS` that hold everywhere.

    Args:
        name: the model's, as clients ask for it.
        max_loops: the deepest that a request may ask for.
        max_cost: of one request, in tokens × texts × loops; what it might compute at most.
        max_requests: texts under way and waiting; with more, a client is told to come back (429).
        header_seconds, body_seconds: until a request's head, and then its body, have to be there (closed; 408).
        write_seconds: how long a client may leave what it was sent unread; the system then ends the connection.
        drain_seconds: how long texts under way may go on after SIGTERM or Ctrl-C.
        stall_seconds: without a sign of the engine's thread, `/health` says that it is stuck.
        chunk_seconds: tokens of a stream that come within this time share a chunk, the first excepted.
    """

    name: str
    max_loops: int
    max_cost: int
    max_requests: int = 128
    header_seconds: float = 10
    body_seconds: float = 10
    write_seconds: float = 30
    drain_seconds: float = 60
    stall_seconds: float = 60
    chunk_seconds: float = 0.05

    def __post_init__(self) -> None:
        plain = self.name.isprintable() and 0 < len(self.name) <= 200
        require(plain, "name", self.name, "1 to 200 printable characters")
        require_int("max_loops", self.max_loops, 1, MAX_LOOPS)
        for name in ("max_cost", "max_requests"):
            require_int(name, getattr(self, name), 1)
        for name in ("header", "body", "write", "drain", "stall", "chunk"):
            require_float(
                f"{name}_seconds", getattr(self, f"{name}_seconds"), 0, open_low=name not in ("drain", "chunk")
            )


def settings_for(config: ModelConfig, name: str, *, max_loops: int | None = None, **others: float) -> Settings:
    """Where nothing is said: four times the model's own depth, and of one request what fills four texts at it."""
    deepest = min(4 * config.n_loops, MAX_LOOPS) if max_loops is None else max_loops
    deepest = 1 if config.is_plain else deepest
    given: dict[str, float] = {"max_cost": 4 * config.max_seq_len * deepest, **others}
    return Settings(name=name, max_loops=deepest, **given)  # type: ignore[arg-type]
