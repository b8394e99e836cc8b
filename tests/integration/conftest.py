"""One real grader for all tests that only ask it."""

from collections.abc import Iterator

import httpx
import pytest
from live_grader import live_grader


@pytest.fixture(scope="session")
def grader_url() -> Iterator[str]:
    """Where a warm grader listens, with default settings and one worker."""
    with live_grader() as url:
        yield url


@pytest.fixture
def grader_http(grader_url: str) -> Iterator[httpx.Client]:
    """A client of that grader."""
    with httpx.Client(base_url=grader_url, timeout=60) as client:
        yield client
