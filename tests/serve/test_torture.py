"""What `make torture-serve` says is wrong: of answers, and of servers that do one thing wrong on purpose."""

import json

import pytest

from benchmarks.client import Answer
from benchmarks.torture.serve import auth, bodies, control, drain, fuzz, overload
from benchmarks.torture.serve.server import percentile, server

GOOD = {"error": {"message": "no", "type": "x", "param": None, "code": None}}


def answer(status: int, body: object = GOOD, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode())


def test_hostile_requests_are_the_same_each_time_and_of_all_kinds() -> None:
    one, other = bodies.Fuzz("m", 64), bodies.Fuzz("m", 64)
    assert [one.case().data for _ in range(300)] == [other.case().data for _ in range(300)]
    assert all(kind(one).data for kind in bodies.KINDS for _ in range(20))


@pytest.mark.parametrize(
    ("name", "value", "is_wrong"),
    [
        *(("n", value, True) for value in (-1, 2**63, 1.5, "5", True, [], float("nan"))),
        *(("n", value, False) for value in (0, 1, None)),
        *(("temperature", value, True) for value in ("5", False, {}, float("inf"))),
        *(("temperature", value, False) for value in (1, 1.5, None)),
        ("stream", True, False),
        *(("stream", value, True) for value in (1, "", [])),
        ("user", float("nan"), True),
    ],
)
def test_what_must_be_refused(name: str, value: object, is_wrong: bool) -> None:
    assert bodies.wrong("/v1/completions", name, value) == is_wrong


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (answer(400), None),
        (answer(413), "expected [400]"),
        (answer(500), "expected [400]"),
        (answer(400, {"error": {}}), "no error"),
        (answer(400, {"detail": "no"}), "no error"),
        (Answer(0), "closed"),
    ],
)
def test_answers_to_hostile_requests(found: Answer, said: str | None) -> None:
    problem = fuzz.problem(bodies.Case("x", b"", bodies.REFUSED), found)
    assert problem is None if said is None else said in str(problem)


def test_answers_of_200() -> None:
    assert fuzz.whole_problem(answer(200, {"object": "x"})) is None
    assert fuzz.whole_problem(answer(200, [])) and fuzz.whole_problem(Answer(200, {}, b"<"))
    stream = {"content-type": "text/event-stream"}
    assert fuzz.whole_problem(Answer(200, stream, b"data: {}\n\ndata: [DONE]\n\n")) is None
    assert fuzz.whole_problem(Answer(200, stream, b"data: {}\n\n"))


def test_answers_under_load() -> None:
    good = {"choices": [{"text": "a"}]}
    assert overload.problem(answer(200, good), "a") is None
    assert "another" in str(overload.problem(answer(200, good), "b"))
    assert overload.problem(answer(429, retry_after="2"), "a") is None
    assert "Retry-After" in str(overload.problem(answer(429), "a"))
    assert overload.problem(answer(429, {}, retry_after="2"), "a") and overload.problem(answer(503), "a")


def test_percentiles() -> None:
    assert percentile([], 99) == 0 and percentile([2.0], 50) == 2 and percentile([1.0, 3.0], 50) == 2


@pytest.mark.parametrize(("fault", "said"), [("another", "another text"), ("wordless", "Retry-After")])
def test_faults_under_load_are_noticed(fault: str, said: str) -> None:
    with server(command=control.command(fault)) as found:
        assert any(said in problem for problem in overload.overloaded(found, 120, kinds=3)[0])


def test_a_good_server_under_load_has_no_problem() -> None:
    with server(command=control.command("none")) as found:
        assert overload.overloaded(found, 120, kinds=3)[0] == []


def test_an_end_without_waiting_is_noticed() -> None:
    assert len(drain.drains(1, control.command("drops"))) == 1


def test_a_server_without_locks_is_noticed() -> None:
    with server(command=control.command("open")) as found:
        assert len(auth.unkeyed(found, methods=("GET",))[0]) > 10
