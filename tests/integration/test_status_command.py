"""`multiattempt status` against a real Redis: from another machine, piped, watched."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from redis.asyncio import Redis

from services.contracts.observations import Observations, Vitals
from services.contracts.registry import Registry, Replica

pytestmark = pytest.mark.integration
DEADLINE_S = 30.0


async def fill(redis: Redis) -> None:
    seen, registry = Observations(redis, run="far"), Registry(redis, run="far")
    for step in (1, 2, 3):
        await seen.add_step(step, {"reward": step / 4, "step_s": 1.0})
    await seen.put_vitals(Vitals(name="learner", service="learner", at=time.time(), figures={"phase": "training"}))
    replica = Replica(
        replica_id="rollout-7",
        url="http://h:1",
        world_size=1,
        version=3,
        device="cpu",
        state="ready",
        pid=1,
        started_at=0,
    )
    await registry.announce(replica, 60)


def command(redis_url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "services.cli", "status", "--redis", redis_url, "--name", "far", *more]


async def test_piped_it_is_one_page_of_plain_text(redis: Redis, redis_url: str) -> None:
    await fill(redis)
    done = subprocess.run(command(redis_url), capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert "far  step 3 of 100, version 0" in done.stdout and "rollout-7" in done.stdout
    assert "\x1b" not in done.stdout


async def test_watched_it_follows_the_run_and_ends_with_ctrl_c(redis: Redis, redis_url: str) -> None:
    await fill(redis)
    main, side = pty.openpty()
    process = subprocess.Popen(command(redis_url, "--watch"), stdin=side, stdout=side, stderr=side, close_fds=True)
    os.close(side)
    seen, deadline = "", time.monotonic() + DEADLINE_S
    try:
        for step in (3, 4):
            if step == 4:
                await Observations(redis, run="far").add_step(4, {"reward": 1.0})
            while f"step {step} of 100" not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen):
                assert time.monotonic() < deadline, seen
                if select.select([main], [], [], 0.2)[0]:
                    seen += os.read(main, 65536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):  # the other end closes when it exits
                if select.select([main], [], [], 0.2)[0]:
                    os.read(main, 65536)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


async def test_nothing_that_is_shown_of_a_url_is_secret(redis: Redis) -> None:
    url = "redis://:hunter2@127.0.0.1:1/0"
    done = subprocess.run(command(url), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1 and "hunter2" not in done.stdout + done.stderr
    assert json.dumps(done.stderr).count("\\n") == 1
