"""The OpenAPI document against the running grader: schemathesis asks, well and badly, and checks the replies."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from services.contracts.settings import GraderSection
from services.grader.app import create_app

pytestmark = pytest.mark.integration

schema = schemathesis.openapi.from_dict(create_app(GraderSection()).openapi())


@schema.parametrize()
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_grader_keeps_to_its_document(case: schemathesis.Case, grader_url: str) -> None:
    # That OpenRLHF's lists are equally long cannot be said in a schema.
    excluded = [positive_data_acceptance] if case.operation.path == "/get_reward" else []
    case.call_and_validate(base_url=grader_url, excluded_checks=excluded)
