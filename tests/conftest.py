"""Fixtures for the whole suite: a clean environment and a real Valkey."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.contracts.config import ENV_PREFIX
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX) or name == "GRADER_API_KEY"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def session_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One real Valkey for the whole session. Tests want `redis` or `redis_url`, which flush it."""
    folder = tmp_path_factory.mktemp("valkey")
    with EmbeddedValkey(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def redis(session_valkey: EmbeddedValkey) -> AsyncIterator[Redis]:
    """A client of the session's Valkey, which is empty."""
    client = await connect(session_valkey.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def redis_url(session_valkey: EmbeddedValkey, redis: Redis) -> str:
    """Where other processes reach the same, empty Valkey."""
    return session_valkey.url


@pytest.fixture
def mortal_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A Valkey of the test's own: `kill()` is kill -9, `start()` brings it back on the same folder and port."""
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server
