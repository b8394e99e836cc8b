"""Two learner ranks under the supervisor, as the launcher has them."""

import asyncio
import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis
from test_learner_process import answer_tasks, make_run

from services.cli import supervisor as supervisor_module
from services.cli.launcher import free_port
from services.cli.preflight import has_checkpoints
from services.cli.progress import Progress
from services.cli.services import Plan
from services.cli.supervisor import Supervisor

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


async def test_a_rank_that_hangs_ends_all_and_the_run_goes_on_from_the_checkpoint(
    tmp_path: Path, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "GRACE_S", 2.0)
    flags = ("--learner.processes", "2", "--learner.rank_timeout_s", "4", "--learner.checkpoint_every", "1")
    config = make_run(tmp_path, redis_url, *flags, "--learner.zero_stage", "2")
    plan, lines = Plan(config, config.run_dir / "config.json"), config.run_dir / "metrics.jsonl"
    rollout = asyncio.create_task(answer_tasks(redis))
    with Progress() as progress:
        supervisor = Supervisor(config.run_dir / "logs", progress)

        def ranks() -> list[object]:
            return plan.learners(master_port=free_port(), resume=has_checkpoints(config.run_dir))

        running = asyncio.create_task(supervisor.run_group(ranks))
        try:
            deadline = time.monotonic() + 90
            while not (lines.exists() and lines.read_text().count("\n") >= 2):
                assert not running.done() and time.monotonic() < deadline
                await asyncio.sleep(0.05)
            supervisor._alive["learner-1"].send_signal(signal.SIGSTOP)
            await asyncio.wait_for(running, 100)  # collectives alone would wait for ten minutes
        finally:
            running.cancel()
            rollout.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await rollout
            await supervisor.stop()
            supervisor.close()
    said = (config.run_dir / "logs" / "learner-0.log").read_text()
    assert "rank 1 gave no sign of life for 4 s (learner.rank_timeout_s)" in said
    assert said.count("learner started") == 2 and '"msg":"resumed"' in said
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
