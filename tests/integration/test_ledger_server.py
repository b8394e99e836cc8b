"""What the ledger's server may do to a run: be killed, come back older or empty, want a password, speak TLS.

A worker and a learner's loop run through it all; afterwards the audit is clean and nothing was trained twice.
"""

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from learner_data import make_trajectory
from loop_fakes import MemoryPublisher, MemoryTrainer, make_config, make_ledger, make_loop, rollout
from redis.asyncio import Redis

from services.cli.audit import run_audit
from services.contracts.config import ConfigError, load, to_toml_dict
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey
from services.contracts.wire import Progress, Task, Trajectory
from services.rollout.worker import Worker

pytestmark = pytest.mark.integration
STEPS, BATCH = 5, 8
DEADLINE_S = 60.0
AHEAD = 2


class SlowRunner:
    """Takes a moment for each dialogue, so that some are always in flight."""

    def __init__(self, publisher: MemoryPublisher) -> None:
        self._publisher = publisher

    async def run(self, task: Task, *, resume: Progress | None, on_progress: Callable[[Progress], None]) -> Trajectory:
        version = self._publisher.version
        await asyncio.sleep(0.05)
        return make_trajectory(task.task_id, batch=task.batch, version=version)


@contextlib.asynccontextmanager
async def worker(redis: Redis, publisher: MemoryPublisher) -> AsyncIterator[Worker]:
    running = Worker(
        make_ledger(redis),
        SlowRunner(publisher),
        replica_id="rollout-0",
        version=lambda: publisher.version,
        free_places=lambda in_flight, _: 4 - in_flight,
        lease_s=5.0,
        grader_timeout_s=5.0,
    )
    task = asyncio.create_task(running.run())
    try:
        yield running
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def come_back(server: EmbeddedValkey, older: Path) -> None:
    """With all but the last second."""


def come_back_older(server: EmbeddedValkey, older: Path) -> None:
    shutil.rmtree(server.data_dir)
    shutil.copytree(older, server.data_dir)


def come_back_empty(server: EmbeddedValkey, older: Path) -> None:
    shutil.rmtree(server.data_dir)


@pytest.mark.parametrize("how", [come_back, come_back_older, come_back_empty])
async def test_a_server_killed_under_a_worker_and_a_learner_costs_no_batch_and_no_book(
    mortal_valkey: EmbeddedValkey, tmp_path: Path, capsys, how: Callable[[EmbeddedValkey, Path], None]
) -> None:
    run, older = tmp_path / "loop", tmp_path / "older"
    config = load(None, ["--run.name=loop", f"--run.dir={tmp_path}", f"--redis.url={mortal_valkey.url}"], env={})
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_toml_dict(config)))
    redis = await connect(mortal_valkey.url)
    trainer, publisher = MemoryTrainer(folder=run / "checkpoints"), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness="1"), trainer, publisher)
    async with worker(redis, publisher):
        training = asyncio.create_task(loop.run())
        for version in (1, 3):
            while trainer.version < version:
                assert not training.done(), training
                await asyncio.sleep(0.01)
            await asyncio.to_thread(shutil.copytree, mortal_valkey.data_dir, older)
            while len(trainer.batches) == version:  # what is done from here on, the copy does not know
                await asyncio.sleep(0.01)
            mortal_valkey.kill()
            how(mortal_valkey, older)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(mortal_valkey.start)
            shutil.rmtree(older)
        await asyncio.wait_for(training, DEADLINE_S)
    trained = Counter(t.task_id for batch in trainer.batches for t in batch)
    assert [len(batch) for batch in trainer.batches] == [BATCH] * STEPS
    assert max(trained.values()) == 1
    assert await run_audit(run, is_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained"] == {str(step): BATCH for step in range(1, STEPS + 1)}
    await redis.aclose()


async def test_rollout_cannot_run_ahead_of_a_learner_that_lags(redis: Redis) -> None:
    """However fast it is: what is issued bounds it, and what a checkpoint holds is deleted."""
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness=str(AHEAD), checkpoint_every="1"), trainer, publisher)
    most: Counter[str] = Counter()
    train = trainer.train

    def lag(trajectories: Sequence[Trajectory], *, on_actor: Callable[[], None]) -> dict[str, float]:
        time.sleep(0.3)  # rollout has long finished all there is
        return train(trajectories, on_actor=on_actor)

    trainer.train = lag  # type: ignore[method-assign]
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        while not running.done():
            lengths = {key: await redis.xlen(f"ma:{{loop}}:{key}") for key in ("tasks", "trajectories")}
            most |= Counter(lengths | {"both": sum(lengths.values())})
            await asyncio.sleep(0.01)
        await running
    assert (AHEAD + 1) * BATCH <= most["both"] <= (AHEAD + 2) * BATCH  # one more is trained and not yet acknowledged
    left = {key.decode().removeprefix("ma:{loop}:") for key in await redis.keys("*")}
    assert {await redis.xlen(f"ma:{{loop}}:{key}") for key in ("tasks", "trajectories")} == {0}
    assert left <= {"tasks", "trajectories", "next_task", "version_floor", "durable", "server", "scanned"}


async def test_consumers_that_are_long_gone_are_forgotten(redis: Redis) -> None:
    ledger = make_ledger(redis)
    await ledger.open()
    for name in ("gone", "here"):
        await ledger.claim(name, 0, 1)
    assert {one["name"] for one in await redis.xinfo_consumers("ma:{loop}:tasks", "rollout")} == {b"gone", b"here"}
    await ledger.acknowledge([], -1)
    assert len(await redis.xinfo_consumers("ma:{loop}:tasks", "rollout")) == 2  # idle for a moment only


async def test_a_server_with_a_password(mortal_valkey: EmbeddedValkey, caplog: pytest.LogCaptureFixture) -> None:
    plain = await connect(mortal_valkey.url)
    await plain.config_set("requirepass", "correct-horse")
    await plain.aclose()
    place = mortal_valkey.url.removeprefix("redis://")
    redis = await connect(f"redis://:correct-horse@{place}")
    assert await redis.ping()
    assert "correct-horse" not in repr(redis)
    await redis.aclose()
    for url in (f"redis://:battery-staple@{place}", f"redis://{place}"):
        with pytest.raises(ConfigError, match=r"redis\.url .*the server refuses the name or password") as caught:
            await connect(url)
        assert "battery-staple" not in str(caught.value) and "\n" not in str(caught.value)
    assert "correct-horse" not in caplog.text and "battery-staple" not in caplog.text


@pytest.fixture
async def tls(redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """A TLS port in front of the server (the embedded one has no TLS), and its authority's certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run(
        ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    port = int(redis_url.rpartition(":")[2].partition("/")[0])

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        pumps = [asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (back, writer):
            end.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", certificate
        await asyncio.sleep(0.05)  # the connections end before the loop does


async def test_a_server_behind_tls(tls: tuple[str, Path]) -> None:
    url, certificate = tls
    redis = await connect(f"{url}?ssl_ca_certs={certificate}")
    ledger = make_ledger(redis)
    await ledger.open()
    assert (await ledger.depth()).waiting == 0
    await redis.aclose()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("", "certificate"),
        ("?ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem|No such file"),
        ("?ca_file=/etc/ca.pem", "ca_file"),
    ],
)
async def test_tls_that_cannot_be_is_one_line(tls: tuple[str, Path], parameters: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        await connect(f"{tls[0]}{parameters}", start_patience_s=0.2)
    assert "\n" not in str(caught.value)
