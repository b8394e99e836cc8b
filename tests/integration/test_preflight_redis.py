"""A new run does not begin on the ledger of an earlier one."""

import asyncio

import pytest

from services.cli.preflight import check
from services.contracts.config import ConfigError, RunConfig
from services.contracts.ledger import Ledger
from services.contracts.settings import RedisSection, RunSection

pytestmark = pytest.mark.integration


async def test_the_ledger_of_an_earlier_run_of_this_name_is_refused(redis, redis_url, tmp_path):
    config = RunConfig(
        run=RunSection(name="again", dir=tmp_path),
        redis=RedisSection(url=redis_url),
        model={"source": "arithmetic"},
    )
    await asyncio.to_thread(check, config, resume=False)
    ledger = Ledger(redis, run="again", lease_s=1, max_deliveries=1)
    await ledger.open()
    await ledger.reconcile(7, 0, forget=[], gone={})
    with pytest.raises(ConfigError, match="holds the ledger of an earlier run 'again'"):
        await asyncio.to_thread(check, config, resume=False)


async def test_a_redis_that_does_not_answer_is_named(tmp_path):
    config = RunConfig(
        run=RunSection(name="none", dir=tmp_path),
        redis=RedisSection(url="redis://127.0.0.1:1/0"),
        model={"source": "arithmetic"},
    )
    with pytest.raises(ConfigError, match=r"no Redis at redis://127\.0\.0\.1:1"):
        await asyncio.to_thread(check, config, resume=False)
