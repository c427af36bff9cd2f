"""schemathesis reads /openapi.json and sends what the schema allows, and what it forbids, to every route."""

from __future__ import annotations

import contextlib

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from tests.faults.judge import fault_of
from tests.http.standin import PATIENCE_S, LiveServer
from tests.lengths import full_or_short

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
EXAMPLES = {"POST": full_or_short(300, 20), "GET": full_or_short(50, 5)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_routes_answer_soundly_what_their_schemas_make(
    small_server: LiveServer, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions"} <= {operation.path for operation in operations}
    with requests.Session() as session:
        for operation in operations:
            _hammer(operation, mode, session)


def _hammer(operation: schemathesis.APIOperation, mode: GenerationMode, session: requests.Session) -> None:
    @settings(
        max_examples=EXAMPLES.get(operation.method.upper(), 5),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            case.body = case.body | {"max_tokens": 1, "max_completion_tokens": None}
        # What its HTTP client refuses to send is the business of the tests of the wire.
        with contextlib.suppress(requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL):
            answer = case.call(session=session, timeout=PATIENCE_S)
            headers = {name.lower(): values[0] for name, values in answer.headers.items()}
            assert not (fault := fault_of(answer.status_code, headers, answer.content)), fault

    with contextlib.suppress(Unsatisfiable):  # a route without parameters has nothing to get wrong
        send()
