"""What is wrong is refused in OpenAI's words, with the field and what is allowed; nothing is passed over."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ritornello.limits import LIMITS
from ritornello.serve.settings import MAX_BODY
from tests.serve.running import Running, running, small

JSON = {"content-type": "application/json"}
OPEN = {"/", "/health", "/ready"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(body_seconds=0.3, header_seconds=0.3, max_requests=16) as found:
        yield found


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def is_untouched(server: Running) -> bool:
    """Whether it still answers, and nothing is left behind."""
    server.settle()
    return server.completed(max_tokens=1)["usage"]["completion_tokens"] == 1


BAD_NUMBERS = [-1, 2**63, 10**30, 1.5, "5", True, [1], {}]
INTEGERS = ("max_tokens", "n", "loops", "seed", "logprobs", "top_k", "draft_loops")


@pytest.mark.parametrize("field", INTEGERS)
def test_integers(server: Running, field: str) -> None:
    for value in BAD_NUMBERS:
        assert refused(server.post("completions", prompt="a", **{field: value}))["param"] == field, value


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"loops": 0},
        {"loops": 13},
        {"n": 0},
        {"n": 17},
        {"max_tokens": 0},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"stop": [1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"999": 1}},
        {"logit_bias": {"1": 101}},
        {"exit": "never"},
        {"exit": "hazard"},
        {"exit": "calibrated"},
        {"exit": "kl", "min_loops": 4},
        {"min_loops": 2},
        {"exit_threshold": 0.5},
        {"loop_budget": 0.5},
        {"loop_budget": 4},
        {"draft_loops": 3},
        {"draft_tokens": 2},
        {"draft_loops": 1, "exit": "kl"},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        {"regex": "("},
        {"regex": "a", "response_format": {"type": "json_object"}},
        {"prompt": ""} | {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [264]},
        {"prompt": ["a", [1]]},
        {"prompt": None},
        {"prompt": "x" * 128},
        {"prompt": "\ud800"},
        {"tools": []},
        {"best_of": 1},
        {"": 1},
        {"x\ud800": 1},
        {"user": 1},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_fields(server: Running, body: dict[str, Any]) -> None:
    content = json.dumps({"model": "small", "prompt": "a", **body})
    refused(server.client.post(f"{server.url}/v1/completions", content=content, headers=JSON))


def test_every_limit_of_the_table_is_kept_here_too(server: Running) -> None:
    fields = server.service  # the names are the table's own, but for log-probabilities
    assert fields is not None
    for name, limit in LIMITS.items():
        field = {"n_logprobs": "logprobs"}.get(name, name)
        for value in (limit.low - 1, limit.low if limit.open_low else None, limit.high and limit.high + 1):
            if value is not None:
                sent = {"logit_bias": {"1": value}} if name == "logit_bias" else {field: value}
                assert refused(server.post("completions", prompt="a", **sent))["param"] == field, (name, value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"42",
        b"null",
        b"{",
        b'{"model": "small", "prompt": "a", "temperature": NaN}',
        b'{"model": "small", "prompt": "a", "temperature": 1e999}',
        b'{"model": "small", "prompt": "\xff"}',
        b'{"model": "small", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "small", "prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
    ],
    ids=["nothing", "list", "number", "null", "cut", "nan", "infinite", "utf-8", "deep", "digits"],
)
def test_bodies(server: Running, body: bytes) -> None:
    refused(server.client.post(f"{server.url}/v1/completions", content=body, headers=JSON))
    assert is_untouched(server)


def test_messages(server: Running) -> None:
    def asked(*messages: Any) -> httpx.Response:
        return server.post("chat/completions", messages=[*messages])

    user = {"role": "user", "content": "a"}
    for wrong in ({"role": "tool", "content": "a"}, {"role": "user"}, {**user, "name": "x"}, {**user, "content": [1]}):
        assert refused(asked(wrong))["param"] == "messages"
    assert "turns" in refused(asked(user, user))["message"]
    assert "user" in refused(asked(user, {"role": "assistant", "content": "b"}))["message"]
    refused(asked())
    refused(server.post("chat/completions", messages=[user], top_logprobs=2))
    refused(server.post("chat/completions", messages=[user], max_tokens=2, max_completion_tokens=2))
    assert refused(asked({"role": "user", "content": "x" * 10_000}))["code"] == "context_length_exceeded"
    with running(small(chat=False)) as plain:
        told = refused(plain.post("chat/completions", messages=[user]))
        assert "/v1/completions" in told["message"]


def test_paths_methods_types_and_sizes(server: Running) -> None:
    url = f"{server.url}/v1/completions"
    refused(server.client.get(f"{server.url}/v1/nothing"), 404)
    refused(server.client.get(f"{server.url}/../../etc/passwd"), 404)
    assert refused(server.client.get(url), 405)
    refused(server.client.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415)
    refused(server.client.post(url, content=b"{}"), 415)
    refused(server.client.post(url, content=b" " * (MAX_BODY + 1), headers=JSON), 413)
    refused(server.client.post(url, content=iter([b" " * 1_000_000] * 3), headers=JSON), 413)
    assert refused(server.post("completions", prompt="a", model="../../etc"), 404)["code"] == "model_not_found"
    assert is_untouched(server)


def test_another_name_of_this_machine_is_refused(server: Running) -> None:
    """A page elsewhere whose name leads here must not reach it."""
    port = server.url.rpartition(":")[2]
    refused(server.client.get(f"{server.url}/v1/models", headers={"host": "evil.example"}), 421)
    refused(server.client.get(f"{server.url}/v1/models", headers={"host": f"evil.example:{port}"}), 421)
    assert server.client.get(f"{server.url}/v1/models", headers={"host": f"localhost:{port}"}).status_code == 200


def raw(server: Running, data: bytes) -> bytes:
    """What comes back until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def test_those_who_are_slow_are_not_waited_for(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(server, head + b'Content-Length: 100\r\n\r\n{"model"').startswith(b"HTTP/1.1 408")
    assert raw(server, head) == b""  # no head, no answer
    assert raw(server, b"") == b""
    assert raw(server, b"no http\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 100_000 + b"\r\n\r\n")[9:12] in (
        b"400",
        b"431",
    )
    assert is_untouched(server)


def test_a_request_that_could_take_too_much() -> None:
    with running(max_cost=100) as server:
        assert "at most 100" in refused(server.post("completions", prompt="a" * 10, max_tokens=24))["message"]
        assert server.completed("a" * 10, max_tokens=23)["usage"]["prompt_tokens"] == 10


def routes(server: Running, **how: Any) -> Iterator[tuple[str, str]]:
    """Every method of every path, and some that are not there."""
    from ritornello.serve.app import create_app

    app = create_app(server.service)
    paths = {path for route in app.routes if (path := getattr(route, "path", None))}
    assert {"/v1/completions", "/docs", "/openapi.json", "/metrics", "/static-offline-docs"} <= paths
    for path in sorted(paths | {"/nothing", "/v1", "/health/", "//", "/%2e%2e/health"}):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
            yield method, path.replace("{model:path}", "small")


def test_every_route_wants_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    with running(keys=(b"Secret-Key-1", b"other")) as server:
        wrong = ["", "Bearer", "Bearer secret-key-1", "Bearer Secret-Key-", "Basic Secret-Key-1", "Bearer é"]
        with httpx.Client() as client:
            for method, path in routes(server):
                for value in wrong[:2] if method != "GET" else wrong:
                    answer = client.request(method, server.url + path, headers={"authorization": value.encode()})
                    if path not in OPEN:
                        assert answer.status_code == 401, (method, path, value)
                        assert answer.headers["www-authenticate"] == "Bearer"
                        assert b"Secret" not in answer.content
            for key in ("Secret-Key-1", "other"):
                headers = {"authorization": f"Bearer {key}"}
                assert client.get(f"{server.url}/v1/models", headers=headers).status_code == 200
            assert all(client.get(server.url + path).status_code == 200 for path in OPEN)
            assert "HTTPBearer" in client.get(f"{server.url}/openapi.json", headers=headers).text
    assert "ecret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("element", [{}, 1.5, [1], "a", None], ids=repr)
@pytest.mark.parametrize("field", ["prompt", "stop", "messages", "completion"])
def test_a_body_full_of_faults_takes_no_time(server: Running, field: str, element: Any) -> None:
    """One is told, whatever they are; telling of each would hold up everybody for half a minute."""
    path = {"messages": "chat/completions", "completion": "trace"}.get(field, "completions")
    body = json.dumps({"model": "small", "prompt": "a", field: [element] * 200_000}).encode()
    began = time.monotonic()
    refused(server.client.post(f"{server.url}/v1/{path}", content=body, headers=JSON))
    assert time.monotonic() - began < 2
    assert is_untouched(server)
