"""The schema says what is true: what it allows is answered, what it forbids refused, all as it says (schemathesis)."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.running import Running, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
N_EXAMPLES = 12


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_cost=1_000) as found:
        yield found


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_what_the_schema_says(server: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=30)

        try:
            check()
        except Unsatisfiable:  # nothing can be wrong where nothing is sent
            assert mode is GenerationMode.NEGATIVE and operation.method == "get"
            continue
        seen.add((operation.method, operation.path))
    assert ("post", "/v1/completions") in seen and ("post", "/v1/chat/completions") in seen
    server.settle()
    answered = server.service.metrics.requests.labels("/v1/completions", "200")._value.get()
    print("ANSWERED", answered)
