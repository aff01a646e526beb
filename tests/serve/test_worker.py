"""Clients that leave, too many of them, an engine that fails, a server that ends: nobody hangs, nothing is left."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from ritornello.engine import trace
from ritornello.engine.engine import Engine
from ritornello.engine.request import Request
from ritornello.serve import worker
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


def test_who_comes_begins_when_others_begin_a_token(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step, submit, ended, entered = Engine.step, Engine.submit, [False], []

    def stepped(self: Engine) -> Any:
        events = step(self)
        ended[0] = any(event.token is not None for event in events)
        return events

    def submitted(self: Engine, request: Any) -> int:
        entered.append((self.busy, ended[0]))
        return submit(self, request)

    monkeypatch.setattr(Engine, "step", stepped)
    monkeypatch.setattr(Engine, "submit", submitted)
    body = {"model": "small", "prompt": "abc", "stream": True, **FOREVER, "loops": 3}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body):
        begun(server)
        for _ in range(12):
            server.completed(max_tokens=1)
    assert len(entered) == 13 and all(in_step for busy, in_step in entered[1:] if busy)
    assert sum(busy for busy, _ in entered) == 12
    server.settle()


def test_who_is_dropped_before_they_begin_does_not_begin(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come wait for a token's end; what is cancelled by then would otherwise be written for nobody."""
    submit, submitted, serving = Engine.submit, [], server.service.worker
    assert serving._loop is not None
    stream = {"model": "small", "prompt": "abc", "stream": True, **FOREVER}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=stream):
        begun(server)
        monkeypatch.setattr(Engine, "submit", lambda self, request: submitted.append(request) or submit(self, request))
        with monkeypatch.context() as held:
            held.setattr(worker.Worker, "_enter", lambda self: None)
            request = Request(prompt=[1, 2], max_tokens=4000)
            opening = asyncio.run_coroutine_threadsafe(serving.open([request], cost=1), serving._loop)
            wait_until(lambda: len(serving._coming) == 1)
            opening.cancel()
            wait_until(lambda: serving.n_texts == 1)
        wait_until(lambda: not serving._coming)
    server.settle()
    assert not submitted


def test_what_was_not_told_yet_is_told_when_the_engine_comes_to_rest(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "TELL_SECONDS", 1e9)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(server.completed(max_tokens=2)))
    body = {"model": "small", "prompt": "abc", "stream": True, **FOREVER}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body):
        begun(server)
        asking.start()
        untold = server.service.worker._untold
        wait_until(lambda: any(event.reason for told in [*untold.values()] for _, event in told))
        assert not answers
    asking.join(5)
    assert len(answers) == 1
    server.settle()


def test_where_ticks_are_long_each_is_told(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tick = Engine.step, worker.Worker._tick
    untold: list[bool] = []

    def slow(engine: Engine) -> Any:
        time.sleep(1.5 * worker.TELL_SECONDS)
        return step(engine)

    def ticked(self: worker.Worker) -> None:
        tick(self)
        untold.append(bool(self._untold))

    monkeypatch.setattr(Engine, "step", slow)
    monkeypatch.setattr(worker.Worker, "_tick", ticked)
    server.completed(max_tokens=8, loops=1)
    assert len(untold) > 5 and not any(untold)
    server.settle()


def test_a_tick_that_fails_is_run_again(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, step, failures = server.completed(max_tokens=20)["choices"], Engine.step, iter([0, 1, 0, 1, 0])

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
            first = next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.client.get(f"{server.url}/ready").status_code == 503
            refused = server.post("completions", prompt="abc")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert server.client.get(f"{server.url}/health").status_code == 200
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in [first, *rest] if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        wait_until(lambda: not server.server.started or not server.service.worker._thread.is_alive())


def whole(server: Running, path: str, found: list[httpx.Response], **body: Any) -> threading.Thread:
    """Ask in a thread of its own; the answer comes into `found`."""
    ask = threading.Thread(target=lambda: found.append(server.post(path, **body)))
    ask.start()
    return ask


def test_traces_and_texts_have_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three long traces at once: a text beside them goes on."""
    with running(small(max_seq_len=1024)) as server:
        steps, step = [], trace._pass
        monkeypatch.setattr(trace, "_pass", lambda *args: steps.append(time.sleep(0.02)) or step(*args))
        found: list[httpx.Response] = []
        how: Any = {"prompt": "a", "completion": [65] * 900, "loops": 12, "top": 1}
        asked = [whole(server, "trace", found, **how) for _ in range(3)]
        wait_until(lambda: len(steps) > 2)
        begun = len(steps)
        server.completed(max_tokens=5, loops=2)
        assert len(steps) - begun <= 20, "about a step a tick"
        for ask in asked:
            ask.join()
        assert [answer.status_code for answer in found] == [200] * 3


def test_a_text_that_always_fails_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though ticks between its failures are well, for it begins anew."""
    sample = Engine._sample

    def poisoned(self: Engine, found: Any, logits: Any) -> None:
        if any(each.sequence.request.sampling.seed == 13 for each in found):
            raise RuntimeError("poison")
        sample(self, found, logits)

    monkeypatch.setattr(Engine, "_sample", poisoned)
    assert server.post("completions", prompt="abc" * 60, seed=13).status_code == 500
    server.settle()
    assert server.completed(max_tokens=3)


def test_what_nobody_reads_holds_no_place(server: Running) -> None:
    body = {"model": "small", "prompt": "abc", "stream": True, "n": 3, **FOREVER, "max_tokens": 40}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.settle()  # written, and here not read
        assert server.completed(max_tokens=1)
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("late", [b"G", b"POST /v1/completions HTTP/1.1\r\n\r\n"], ids=["byte", "request"])
def test_who_sends_more_before_the_answer_is_not_heard(server: Running, late: bytes) -> None:
    """Kept for later, it would hide that the client left."""
    body = httpx.Request("POST", server.url, json={"model": "small", "prompt": "abc", **FOREVER}).content
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        begun(server)
        connection.sendall(late)
        server.settle()
        with pytest.raises(ConnectionResetError):
            assert connection.recv(100) == b""
            raise ConnectionResetError  # closed in either way


def test_a_drain_tells_whoever_waits() -> None:
    with running(small(max_seq_len=1024), drain_seconds=0.2, max_cost=10**6) as server:
        found: list[httpx.Response] = []
        asked = [whole(server, "completions", found, prompt="abc", **FOREVER)]
        begun(server)
        asked.append(whole(server, "trace", found, prompt="a", completion=[65] * 900, loops=12, top=1))
        wait_until(lambda: server.service.worker.n_texts == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        for ask in asked:
            ask.join()
        assert [(answer.status_code, answer.headers["retry-after"]) for answer in found] == [(503, "1")] * 2
        assert all(answer.json()["error"]["message"] == "the server is on its way out" for answer in found)


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
