"""Clients that leave, too many of them, an engine that fails, a server that ends: nobody hangs, nothing is left."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from ritornello.engine.engine import Engine
from tests.serve.running import Running, running, small, wait_until

FOREVER: Any = {"max_tokens": 4000, "loops": 6, "logit_bias": {str(token): -100 for token in range(256, 261)}}


GONE = 'data: {"error":{"message":"the server is on its way out","type":"server_error","param":null,"code":null}}'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(small(max_seq_len=4096), max_requests=3) as found:
        yield found


def begun(server: Running, n: int = 1) -> None:
    wait_until(lambda: server.service.worker.stats.n_running == n)


def test_a_stream_that_is_left(server: Running) -> None:
    body = {"model": "small", "prompt": "abc", "stream": True, **FOREVER}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # once it is forgotten the answer is closed
        next(lines)
        begun(server)
        left = time.monotonic()
    server.settle()
    assert time.monotonic() - left < 1


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stream": True}], ids=["whole", "several", "stream"])
def test_a_client_that_is_gone(server: Running, more: dict[str, Any]) -> None:
    """Before anything was said."""
    body = httpx.Request("POST", server.url, json={"model": "small", "prompt": "abc", **FOREVER, **more}).content
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        begun(server, more.get("n", 1))
    left = time.monotonic()
    server.settle()
    assert time.monotonic() - left < 1


def test_too_many_are_told_when_to_come_back(server: Running) -> None:
    body = {"model": "small", "prompt": "abc", "stream": True, "n": 2, **FOREVER}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # once it is forgotten the answer is closed
        next(lines)
        refused = server.post("completions", prompt="abc", n=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert server.completed(max_tokens=1)  # one more has room
    server.settle()
    assert server.post("completions", prompt="abc", n=2, max_tokens=1).status_code == 200


def test_a_tick_that_fails_is_run_again(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, step, failures = server.completed(max_tokens=20)["choices"], Engine.step, iter([0, 1, 0, 1, 1, 0])

    def sometimes(self: Engine) -> Any:
        if next(failures, 0):
            raise RuntimeError("out of something")
        return step(self)

    monkeypatch.setattr(Engine, "step", sometimes)
    assert server.completed(max_tokens=20)["choices"] == expected
    assert next(failures, None) is None


def test_an_engine_that_keeps_failing_gives_up_who_is_there(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Engine) -> Any:
        raise RuntimeError("out of everything")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", never)
        refused = server.post("completions", prompt="abc")
        assert refused.status_code == 500 and "everything" not in refused.text
        streamed = server.post("completions", prompt="abc", stream=True).text
        assert '"error"' in streamed and streamed.endswith("data: [DONE]\n\n")
    server.settle()
    assert server.completed(max_tokens=3)


def test_logits_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small()
    with running(loaded) as server, torch.no_grad():
        weight = loaded.model.head_weight
        kept = weight.clone()
        weight.fill_(torch.nan)
        refused = server.post("completions", prompt="abc")
        assert (refused.status_code, refused.json()["error"]["type"]) == (500, "server_error")
        assert '"error"' in server.post("completions", prompt="abc", stream=True).text
        weight.copy_(kept)
        assert server.completed(max_tokens=3)


def test_health_tells_of_a_stuck_or_dead_engine() -> None:
    with running(stall_seconds=0.2) as server:
        worker, go_on = server.service.worker, threading.Event()

        def health() -> int:
            return server.client.get(f"{server.url}/health").status_code

        time.sleep(0.3)
        assert health() == 200  # who waits for work is not stuck
        worker._put(go_on.wait)
        wait_until(lambda: health() == 503)
        go_on.set()
        wait_until(lambda: health() == 200)
        worker._put(worker._close)
        wait_until(lambda: health() == 503)


def test_metrics_count_what_was_done(server: Running) -> None:
    def told() -> dict[str, float]:
        lines = server.client.get(f"{server.url}/metrics").text.splitlines()
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    server.settle()
    before = told()
    n = server.completed("abcd", max_tokens=5, loops=2)["usage"]["completion_tokens"]
    server.settle()
    after = told()
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    assert (grown["ritornello_prompt_tokens_total"], grown["ritornello_tokens_total"]) == (4, n)
    assert grown['ritornello_loops_per_token_bucket{le="2.0"}'] == n
    assert grown['ritornello_loops_per_token_bucket{le="1.0"}'] == 0
    assert grown['ritornello_http_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown["ritornello_first_token_seconds_count"] == 1 and grown["ritornello_token_loops_total"] >= 2 * (3 + n)
    assert after["ritornello_requests_running"] == after["ritornello_requests_waiting"] == 0


def test_what_is_under_way_is_finished_before_the_end() -> None:
    with running(small(max_seq_len=1024)) as server:
        expected = server.completed(**{**FOREVER, "max_tokens": 80})["choices"][0]["text"]
        body = {"model": "small", "prompt": "abc", "temperature": 0, "stream": True, **FOREVER, "max_tokens": 80}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.client.get(f"{server.url}/ready").status_code == 503
            refused = server.post("completions", prompt="abc")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert server.client.get(f"{server.url}/health").status_code == 200
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        text = "".join(line for line in rest if line.startswith("data: {"))
        assert '"finish_reason":"length"' in text and len(expected) > 0
        wait_until(lambda: not server.server.started or not server.service.worker._thread.is_alive())


def test_a_drain_has_an_end() -> None:
    with running(small(max_seq_len=4096), drain_seconds=0.2) as server:
        body = {"model": "small", "prompt": "abc", "stream": True, **FOREVER}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun = time.monotonic()
            server.server.handle_exit(signal.SIGTERM, None)
            assert [line for line in lines if line][-2:] == [GONE, "data: [DONE]"]
        assert time.monotonic() - begun < 5
        wait_until(lambda: not server.service.worker._thread.is_alive())
