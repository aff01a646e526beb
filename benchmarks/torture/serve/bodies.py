"""Requests that no well-meaning client would send, from a seed, and which answers each may get."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import client

MEGABYTE = 1 << 20
SMALL: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
PATHS = "/v1/completions", "/v1/chat/completions", "/v1/trace"
VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 1.5, 1e308, -0.0, "5", "", "x" * 5000, True, False, None),
    *([], {}, [[]], [{}], [None], {"a": 1}, float("nan"), float("inf"), -float("inf"), "\ud800", "\0", 10**400),
)
INTEGERS = "max_tokens", "n", "logprobs", "loops", "min_loops", "draft_loops", "draft_tokens", "top_k"
NUMBERS = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("exit_threshold", "loop_budget"),
)
SWITCHES = "stream", "echo", "loops_per_token"
OTHERS = "model", "prompt", "stop", "seed", "stream_options", "logit_bias", "user", "exit", "regex"
COMMON = (*INTEGERS, *NUMBERS, *SWITCHES, *OTHERS, "response_format")
FIELDS = {
    "/v1/completions": COMMON,
    "/v1/chat/completions": (*COMMON, "messages", "max_completion_tokens", "top_logprobs"),
    "/v1/trace": ("model", "prompt", "messages", "completion", "loops", "exit", "exit_threshold", "min_loops", "top"),
}
REFUSED = frozenset({400})


@dataclass(frozen=True)
class Case:
    """allowed: statuses; nothing: any below 500. bare: its answer has no body, or comes from below HTTP."""

    name: str
    data: bytes
    allowed: frozenset[int] = frozenset()
    bare: bool = False


@dataclass(frozen=True)
class Fuzz:
    """model: the name of the one that is served; vocab_size: its ids."""

    model: str
    vocab_size: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def base(self, path: str) -> dict[str, Any]:
        """A body that is taken."""
        if path == "/v1/trace":
            return {"model": self.model, "prompt": "def f(", "completion": [40, 41], "top": 2}
        if path == "/v1/chat/completions":
            return {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], **SMALL}
        return {"model": self.model, "prompt": "def f(", **SMALL}

    def case(self) -> Case:
        return self.rng.choices(tuple(KINDS), weights=tuple(KINDS.values()))[0](self)

    def post(self, name: str, path: str, body: Any, allowed: frozenset[int] = frozenset(), **headers: str) -> Case:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Case(f"{path} {name}", client.request("POST", path, data, **headers), allowed)


def one_field(fuzz: Fuzz) -> Case:
    """Of a valid body."""
    path = fuzz.rng.choice(PATHS)
    name, value = fuzz.rng.choice(FIELDS[path]), fuzz.rng.choice(VALUES)
    allowed = REFUSED if wrong(path, name, value) else frozenset()
    return fuzz.post(f"{name}={value!r:.60}", path, fuzz.base(path) | {name: value}, allowed)


def wrong(path: str, name: str, value: Any) -> bool:
    """Whether a value is none of JSON, or cannot be taken for the field's kind, whatever the model."""
    if isinstance(value, float) and not math.isfinite(value):
        return True
    if value is None:
        return False
    if name in SWITCHES or (path, name) == ("/v1/chat/completions", "logprobs"):
        return not isinstance(value, bool)
    if name in INTEGERS:
        whole = not isinstance(value, bool) and isinstance(value, int | float) and value == int(value)
        return not whole or not 0 <= value < 2**31
    return (name in NUMBERS and isinstance(value, str | bool | list | dict)) or (
        name == "model" and value != str(value)
    )


def several_fields(fuzz: Fuzz) -> Case:
    path, rng = fuzz.rng.choice(PATHS), fuzz.rng
    changed = {rng.choice(FIELDS[path]): rng.choice(VALUES) for _ in range(rng.randint(2, 5))}
    refused = any(wrong(path, name, value) for name, value in changed.items())
    return fuzz.post(f"{changed!r:.100}", path, fuzz.base(path) | changed, REFUSED if refused else frozenset())


def left_out(fuzz: Fuzz) -> Case:
    path = fuzz.rng.choice(PATHS)
    body = fuzz.base(path)
    name = fuzz.rng.choice(list(body))
    del body[name]
    return fuzz.post(f"without {name}", path, body)


def unknown_field(fuzz: Fuzz) -> Case:
    path = fuzz.rng.choice(PATHS)
    name = fuzz.rng.choice(("best_of", "suffix", "tools", "functions", "store", "__class__", "", "a\0b", "Model", "ü"))
    return fuzz.post(f"unknown {name!r}", path, fuzz.base(path) | {name: fuzz.rng.choice((1, None, {}))}, REFUSED)


def no_object(fuzz: Fuzz) -> Case:
    """JSON of another kind, and what is no JSON."""
    rng, depth = fuzz.rng, fuzz.rng.choice((100, 10_000, 100_000))
    found: tuple[tuple[str, bytes], ...] = (
        *((text, text.encode()) for text in ("[]", "42", "null", '"x"', "true", "{", "}", "", "{'a': 1}", "NaN")),
        *((f"{depth} deep {left}", left * depth + right * depth) for left, right in ((b"[", b"]"), (b'{"a":', b"}"))),
        ("10⁶ digits", b'{"max_tokens": ' + b"9" * 10**6 + b"}"),
        ("a huge exponent", b'{"temperature": 1e999999}'),
        ("broken UTF-8", b'{"prompt": "\xff\xfe\xc3"}'),
        ("UTF-16", '{"prompt": "a"}'.encode("utf-16")),
        ("NULs", b"\0" * 1000),
        ("random bytes", rng.randbytes(rng.randint(1, 4096))),
    )
    name, data = rng.choice(found)
    return fuzz.post(name, rng.choice(PATHS), data, REFUSED)


def nested_value(fuzz: Fuzz) -> Case:
    """Deep or long numbers inside of a valid body."""
    path, rng = fuzz.rng.choice(PATHS), fuzz.rng
    name, left = rng.choice(FIELDS[path]), rng.choice((b"[", b'{"a":'))
    depth = rng.choice((1000, 100_000))
    value = rng.choice((left * depth + (b"]" if left == b"[" else b"}") * depth, b"1" * 10**6, b"-" + b"9" * 5000))
    plain = json.dumps(fuzz.base(path)).encode()
    return fuzz.post(f"{name} of {len(value)} bytes", path, plain[:-1] + b', "%b": %b}' % (name.encode(), value))


def duplicated(fuzz: Fuzz) -> Case:
    """A key that is there twice."""
    path = fuzz.rng.choice(PATHS)
    name, value = fuzz.rng.choice(FIELDS[path]), json.dumps(fuzz.rng.choice(VALUES[:12]))
    plain = json.dumps(fuzz.base(path))
    return fuzz.post(f"{name} twice", path, f'{plain[:-1]}, "{name}": {value}, "{name}": 1}}'.encode())


def spoilt(fuzz: Fuzz) -> Case:
    """Bytes of a valid body, changed, cut or put in."""
    path, rng = fuzz.rng.choice(PATHS), fuzz.rng
    data = bytearray(json.dumps(fuzz.base(path)).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        rng.choice((lambda: data.__setitem__(at, rng.randrange(256)), lambda: data.insert(at, rng.randrange(256))))()  # noqa: B023
    return fuzz.post("spoilt", path, bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))


def prompt(fuzz: Fuzz) -> Case:
    """Kinds of prompts, most of them wrong."""
    rng, v = fuzz.rng, fuzz.vocab_size
    wrong: tuple[Any, ...] = (
        *([-1], [v], [2**63], [0, v + 1, 3], [1.0], [True], ["a", 1], [1, "a"], [[1], "a"], [[1], 2], [[]], [[[1]]]),
        *([[-1]], [[1], [v]], [None], {"a": 1}, 5, [1] * 100_000, ["a"] * 100_000, "a b " * 200_000),
    )
    fine: tuple[Any, ...] = ("\ud800", ["a", "b"], [1, 2], [[1], [2]], "\0", "ü€😀", "", [], [""])
    return (
        fuzz.post(f"prompt {value!r:.40}", "/v1/completions", fuzz.base("/v1/completions") | {"prompt": value}, REFUSED)
        if (value := rng.choice(wrong + fine)) in wrong
        else fuzz.post(f"prompt {value!r:.40}", "/v1/completions", fuzz.base("/v1/completions") | {"prompt": value})
    )


def heavy(fuzz: Fuzz) -> Case:
    """Within the limit of bytes, and as much work as it can make: others are to be served meanwhile."""
    n = 100_000
    found: dict[str, dict[str, Any]] = {
        "objects": {"prompt": [{}] * 3 * n},
        "fractions": {"prompt": [1.5] * n},
        "lists": {"prompt": [[1]] * n},
        "texts": {"prompt": ["a"] * n},
        "stops": {"stop": ["x"] * n},
        "biases": {"logit_bias": {str(i): 1.5 for i in range(n)}},
        "fields": {f"u{i}": 1 for i in range(n)},
        "alternatives": {"regex": "(x+x+)+y" * 50},
    }
    name = fuzz.rng.choice(list(found))
    body = fuzz.base("/v1/completions") | found[name]
    return fuzz.post(f"many {name}", "/v1/completions", body, frozenset({200}) if name == "alternatives" else REFUSED)


def messages(fuzz: Fuzz) -> Case:
    rng = fuzz.rng
    content = rng.choice(("a", "", "\ud800", None, 5, [], [{}], [{"type": "text"}], [{"type": "text", "text": "a"}]))
    one = {"role": rng.choice(("user", "system", "assistant", "tool", "", None, 5)), "content": content}
    value = rng.choice(([one], [one] * 2000, [one, {}], [], {}, None, "a", [[one]], [{**one, "name": "x"}]))
    path = rng.choice(PATHS[1:])
    body = {name: value for name, value in fuzz.base(path).items() if name != "prompt"}
    return fuzz.post(f"messages {value!r:.60}", path, body | {"messages": value})


def trace(fuzz: Fuzz) -> Case:
    rng, v = fuzz.rng, fuzz.vocab_size
    wrong: tuple[Any, ...] = ([-1], [v], [1.0], ["a"], [True], "a", None, [[1]], [2**63], [1] * 100_000)
    value = rng.choice((*wrong, [], [1, 2, 3], [0] * 200))
    body = fuzz.base("/v1/trace") | {"completion": value}
    return fuzz.post(f"completion {value!r:.40}", "/v1/trace", body, REFUSED if value in wrong else frozenset())


def model_name(fuzz: Fuzz) -> Case:
    names = ("../../etc", "../../etc/passwd", "", "/", "python\0", "a" * 10_000, "\ud800", "PYTHON", ".")
    name = fuzz.rng.choice(names)
    path = fuzz.rng.choice(PATHS)
    return fuzz.post(f"model {name!r:.40}", path, fuzz.base(path) | {"model": name}, frozenset({400, 404}))


def content_type(fuzz: Fuzz) -> Case:
    path = fuzz.rng.choice(PATHS)
    kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", "text/json")
    kind = fuzz.rng.choice(kinds)
    return fuzz.post(kind, path, fuzz.base(path), frozenset({415}), Content_Type=kind)


def too_large(fuzz: Fuzz) -> Case:
    path, size = fuzz.rng.choice(PATHS), fuzz.rng.choice((2 * MEGABYTE + 1, 4 * MEGABYTE))
    body = json.dumps(fuzz.base(path)).encode()
    return fuzz.post(f"{size} bytes", path, body + b" " * (size - len(body)), frozenset({413}))


def claimed_length(fuzz: Fuzz) -> Case:
    """A length that is no length, or one that is refused before anything is sent."""
    value = fuzz.rng.choice(("-1", "1e3", "abc", "1, 2", "0x10", str(10**30), str(3 * MEGABYTE)))
    path = fuzz.rng.choice(PATHS)
    return Case(f"Content-Length: {value}", client.request("POST", path, b"", Content_Length=value), bare=True)


def chunked(fuzz: Fuzz) -> Case:
    """In pieces: as it should be, too large, or broken."""
    path, rng = fuzz.rng.choice(PATHS[:1]), fuzz.rng
    body = json.dumps(fuzz.base(path)).encode()
    head = client.request("POST", path, b"", Transfer_Encoding="chunked", Content_Length=None)  # pyrefly: ignore
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    whole = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    blank = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    large = Case("chunks above the limit", head + blank * 40 + b"0\r\n\r\n", frozenset({413}))
    broken = rng.choice((b"zz\r\n", b"-1\r\n", b"ffffffffffffffffffff\r\n", b"3\r\nabcdef\r\n"))
    return rng.choice(
        (Case("chunks", head + whole, frozenset({200})), large, Case("broken chunks", head + broken, bare=True))
    )


def method_or_path(fuzz: Fuzz) -> Case:
    rng = fuzz.rng
    known = ("/health", "/ready", "/metrics", "/v1/models", *PATHS)
    if rng.random() < 0.5:
        methods = ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "HEAD", "FOO", "get", "GET ", "\xff")
        method, path = rng.choice(methods), rng.choice(known)
        return Case(f"{method} {path}", client.request(method, path), bare=True)
    paths = ("/v1", "/v2/completions", "/%00", "/..%2f..%2fetc", "/" + "a" * 5000, "/v1/models/../../etc", "//", "/v1/")
    path = rng.choice((*paths, "/v1/completions/", "/v1/models/none", "/docs/../etc", "*", "http://x/", "no-slash"))
    method = rng.choice(("GET", "POST"))
    return Case(f"{method} {path:.40}", client.request(method, path, b"{}"), bare=True)


def headers(fuzz: Fuzz) -> Case:
    """Bombs."""
    rng, base = fuzz.rng, fuzz.base("/v1/completions")
    bombs: tuple[dict[str, str], ...] = (
        {f"X_{i}": "a" * 10 for i in range(2000)},
        {"X_Long": "a" * 100_000},
        {"X_Long": "a" * 4_000_000},
        {"Expect": "100-continue"},
        {"Content_Encoding": "gzip"},
        {"Range": "bytes=0-"},
        {"Authorization": "Bearer " + "k" * 5000},
        {"Accept": "\xff\xfe"},
        {"Transfer_Encoding": "gzip, chunked"},
        {"Upgrade": "websocket", "Connection": "Upgrade"},
        {"Host": "a" * 5000},
    )
    chosen = rng.choice(bombs)
    name = f"header {next(iter(chosen))} of {len(next(iter(chosen.values())))}"
    return Case(name, client.request("POST", "/v1/completions", base, **chosen), bare=True)


def valid(fuzz: Fuzz) -> Case:
    """Of many kinds: the server has to go on working between the others."""
    kinds: tuple[dict[str, Any], ...] = (
        *({}, {"n": 3, "temperature": 1}, {"stream": True}, {"logprobs": 20}, {"echo": True, "max_tokens": 0}),
        *({"loops": 1}, {"stop": ["\n", "x"]}, {"exit": "hazard"}, {"loops_per_token": True, "stream": True}),
        *({"seed": 5, "top_p": 0.5}, {"response_format": {"type": "text"}}, {"logit_bias": {"5": -100}}),
    )
    body = fuzz.base("/v1/completions") | fuzz.rng.choice(kinds)
    return fuzz.post(f"valid {body}", "/v1/completions", body, frozenset({200}))


KINDS: dict[Callable[[Fuzz], Case], int] = {
    one_field: 30,
    several_fields: 10,
    left_out: 2,
    unknown_field: 4,
    no_object: 8,
    nested_value: 3,
    duplicated: 4,
    spoilt: 8,
    prompt: 6,
    heavy: 1,
    messages: 5,
    trace: 4,
    model_name: 3,
    content_type: 2,
    too_large: 1,
    claimed_length: 2,
    chunked: 2,
    method_or_path: 6,
    headers: 3,
    valid: 10,
}
