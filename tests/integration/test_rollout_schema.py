"""The OpenAPI document against a replica: schemathesis asks, well and badly, and checks the replies."""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from live_replica import FLAGS, TOKEN, LiveReplica, ScriptedEngine, live_replica, scripted_replica
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from services.contracts.config import load
from services.grader.client import GraderClient
from services.rollout.app import create_app

pytestmark = pytest.mark.integration


def document() -> dict:
    grader = GraderClient("http://127.0.0.1:9")
    return create_app(
        scripted_replica(load(None, FLAGS, env={}), engine=ScriptedEngine(["x"]), grader=grader)
    ).openapi()


# A drained replica refuses the rest: it has a test of its own.
schema = schemathesis.openapi.from_dict(document()).exclude(path="/control/drain")
# Checks left out where a schema cannot say it all: a person's dialogue wants `stream`, a prompt must fit the context,
# the group has its generation; 502 is the honest answer to a deadline of a nanosecond.
EXCLUDED = {
    "/v1/dialogues": [positive_data_acceptance],
    "/control/score": [positive_data_acceptance],
    "/control/weights/join": [positive_data_acceptance, not_a_server_error],
    "/control/weights/prepare": [positive_data_acceptance, not_a_server_error],
}


@pytest.fixture(scope="module")
def live(grader_url: str) -> Iterator[LiveReplica]:
    """A person who judges has gone after a moment."""
    with live_replica(["so \\boxed{62}", "\\boxed{72}"], grader_url=grader_url, patience_s=0.05) as replica:
        yield replica


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_replica_keeps_to_its_document(case: schemathesis.Case, live: LiveReplica) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"} if case.operation.path.startswith("/control") else {}
    case.call_and_validate(base_url=live.url, headers=headers, excluded_checks=EXCLUDED.get(case.operation.path, []))


def test_the_replica_has_left_no_dialogue_behind(live: LiveReplica) -> None:
    assert httpx.get(f"{live.url}/readyz", timeout=10).status_code == 200
    assert live.replica.runner.num_running == 0
