"""Who ended a run, as the one that listens to all of its processes judges."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ritornello.train import hub, watch

SIZE = 3
Join = Callable[[int], Connection]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[hub.Hub, Join]]:
    """One that listens, and how a process joins it."""
    for name, seconds in {"TICK": 0.02, "SETTLE": 0.1, "ANSWER": 0.3}.items():
        monkeypatch.setattr(hub, name, seconds)
    listener, joined = hub.listening("127.0.0.1"), []
    port = listener.getsockname()[1]
    heard = hub.Hub(SIZE, listener)

    def join(rank: int, token: str = heard.token) -> Connection:
        connection = hub.connected(socket.create_connection(("127.0.0.1", port)))
        hub.send(connection, {"token": token, "rank": rank, "host": "here", "pid": 100 + rank})
        joined.append(connection)
        return connection

    thread = threading.Thread(target=heard.serve)
    thread.start()
    yield heard, join
    for rank in set(range(SIZE)) - heard._joined.keys():
        join(rank)
    for connection in joined:
        connection.close()
    thread.join(10)
    assert not thread.is_alive()


def told(connection: Connection) -> dict[str, Any]:
    """What a process hears next."""
    assert connection.poll(10)
    message = hub.receive(connection)
    assert message is not None
    return message


def everyone(found: tuple[hub.Hub, Join]) -> list[Connection]:
    heard, join = found
    connections = [join(rank) for rank in range(SIZE)]
    while len(heard._joined) < SIZE:
        time.sleep(0.01)
    return connections


def named(rank: int) -> str:
    return f"process {rank} of {SIZE} (host here, pid {100 + rank})"


@pytest.mark.parametrize("bye", [False, True])
def test_a_process_that_is_gone_without_a_word_has_died(found, bye):
    first, second, third = everyone(found)
    if bye:
        hub.send(second, {"bye": True})
    second.close()
    if bye:
        assert not first.poll(0.5)
        return
    for connection in (first, third):
        assert told(connection)["end"] == {"kind": "died", "ranks": [1], "text": f"{named(1)} died"}


def test_several_that_died_are_all_named(found):
    first, second, third = everyone(found)
    second.close()
    third.close()
    assert told(first)["end"]["text"] == f"{named(1)} and {named(2)} died"


@pytest.mark.parametrize(
    ("said", "dies", "kind", "rank"),
    [
        (["broke", None, None], 2, "died", 2),  # what came of a death is no cause
        (["broke", "failed", None], None, "failed", 1),
        (["failed", "failed", "failed"], None, "failed", 0),  # all alike: the first one says it
        ([None, "broke", "broke"], None, "failed", 1),
    ],
)
def test_the_cause_is_told_from_what_came_of_it(found, said, dies, kind, rank):
    connections = everyone(found)
    for each, (connection, how) in enumerate(zip(connections, said, strict=True)):
        if how:
            hub.send(connection, {"error": f"no {each}", "kind": how})
            time.sleep(0.02)
    if dies is not None:
        connections[dies].close()
    verdict = told(connections[0])["end"]
    assert (verdict["kind"], verdict["ranks"]) == (kind, [rank])
    assert verdict["text"] == f"{named(rank)} " + ("died" if kind == "died" else f"failed: no {rank}")


def test_one_that_failed_and_is_gone_has_failed(found):
    first, second, _ = everyone(found)
    hub.send(second, {"error": "no more", "kind": "failed"})
    second.close()
    assert told(first)["end"]["text"] == f"{named(1)} failed: no more"


@pytest.mark.parametrize(
    ("waits", "ranks"),
    [
        ([True, None, True], [1]),  # does not answer
        ([True, True, False], [2]),  # does something else
        ([True, True, True], [0, 1, 2]),
    ],
)
def test_who_keeps_the_others_waiting(found, waits, ranks):
    connections = everyone(found)
    hub.send(connections[0], {"stalled": True})
    assert told(connections[0]) == {"here": True}
    for each, (connection, waiting) in enumerate(zip(connections, waits, strict=True)):
        assert told(connection) == {"where": True}
        if waiting is not None:
            hub.send(connection, {"place": f"at {each}", "waits": waiting, "started": True})
    verdict = told(connections[0])["end"]
    assert (verdict["kind"], verdict["ranks"]) == ("stalled", ranks)
    assert ("does not answer" in verdict["text"]) == (None in waits)


def test_before_the_first_step_only_silence_is_a_stall(found):
    connections = everyone(found)
    hub.send(connections[0], {"stalled": True})
    assert told(connections[0]) == {"here": True}
    for connection in connections:
        assert told(connection) == {"where": True}
        hub.send(connection, {"place": "reading", "waits": False, "started": connection is connections[0]})
    assert not connections[0].poll(1)


def test_who_has_not_started_is_named(found, monkeypatch):
    _, join = found
    monkeypatch.setattr(hub, "JOIN", 0.2)
    connection = join(1)
    assert told(connection)["end"] == {
        "kind": "missing",
        "ranks": [0, 2],
        "text": "process 0, 2 of 3 did not start in 0.2 s",
    }


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1", b'{"token": "x", "rank": 0}', b"[]", b"[" * 50_000])
def test_strangers_are_sent_away(found, said):
    heard, _ = found
    connection = hub.connected(socket.create_connection(heard.listener.getsockname()))
    if said:
        connection.send_bytes(said)
    connection.poll(10)
    assert hub.receive(connection) is None and not heard._joined
    connection.close()
    everyone(found)


def watching(tmp_path: Path, rank: int, verdict: hub.Verdict | None) -> tuple[watch.Watch, Connection]:
    """A process that knows the verdict, and the other end of its connection."""
    ours, theirs = socket.socketpair()
    found = watch.Watch(hub.Member(rank, "here", 1), SIZE, tmp_path, stall_s=60, verdict=verdict)
    found._connection = Connection(ours.detach())
    if verdict is not None:
        found._known.set()
    return found, Connection(theirs.detach())


@pytest.mark.parametrize(
    ("rank", "kind", "ranks", "text", "said"),
    [
        (1, "failed", [1], "own", False),  # its own error, which it says
        (0, "failed", [1], "own", True),  # the same as another's, which says it
        (0, "failed", [1], "stopped: ", None),
        (0, "died", [1], "nothing after checkpoint step_000010 is saved; start again with --resume", None),
        (2, "died", [1], "stopped: ", None),  # the first one that is left says more
        (1, "died", [0], "nothing after checkpoint step_000010", None),
        (0, "stalled", [2], "no step ended for 60 s: ", None),
    ],
)
def test_what_a_process_says(tmp_path, rank, kind, ranks, text, said):
    for name in ("step_000002", "step_000010", ".tmp-1-step_000020"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    own = "failed: own" if said else "failed: other" if kind == "failed" else kind
    known, theirs = watching(tmp_path, rank, hub.Verdict(kind, ranks, f"process {ranks} {own}"))
    known.reached(12)
    error = ValueError("own")
    error.add_note("noted")
    reason = known.reason(error)
    assert text in str(reason) and reason.__notes__ == ["noted"]
    assert (reason is error) == (said is not None)
    assert reason.__dict__["said"] == (bool(said) or (said is None and kind != "failed"))
    theirs.close()


def test_an_error_is_reported_and_the_verdict_awaited(tmp_path):
    known, theirs = watching(tmp_path, 1, None)
    threading.Thread(target=known.listen, daemon=True).start()
    answer = threading.Timer(0.2, lambda: hub.send(theirs, {"end": {"kind": "died", "ranks": [2], "text": "2 died"}}))
    answer.start()
    reason = known.reason(RuntimeError("connection\nclosed"))
    assert hub.receive(theirs) == {"error": "connection closed", "kind": "broke"}
    assert isinstance(reason, watch.StoppedError) and "2 died" in str(reason)
    known.leave()
    assert hub.receive(theirs) == {"bye": True}
    theirs.close()


def test_where_a_thread_is_and_whether_it_waits():
    place, waits = watch._place(threading.get_ident())
    assert re.fullmatch(r"watch\.py:\d+ in _place", place) and not waits
    frames = {"__name__": "torch.distributed.somewhere", "watch": watch, "threading": threading}
    exec("def wait(): return watch._place(threading.get_ident())", frames)
    assert frames["wait"]()[1]  # pyrefly: ignore


def test_messages_are_bounded():
    ours, theirs = (Connection(each.detach()) for each in socket.socketpair())
    ours.send_bytes(json.dumps({"long": "x" * hub.MOST}).encode())
    assert hub.receive(theirs) is None
    ours.close()
