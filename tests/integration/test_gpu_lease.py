"""Replicas lease GPUs that are only names, in a real Valkey: never one for two, and none is lost for long."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from services.contracts.config import ConfigError, load
from services.rollout.gpu_lease import GpuLease, installed_gpus, leased_gpus, pool

pytestmark = pytest.mark.integration
GPUS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
LEASE_S = 2.0
DEADLINE_S = 20.0
HOLDER = Path(__file__).with_name("gpu_holder.py")


class Holder:
    """A process that holds GPUs."""

    def __init__(self, url: str, name: str, *, count: int = 1, wait_s: float = 0.0, gpus=GPUS) -> None:
        arguments = [url, name, str(LEASE_S), str(wait_s), str(count), *gpus]
        self.process = subprocess.Popen(
            [sys.executable, str(HOLDER), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def gpus(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip().split(",")

    def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out, err


@pytest.fixture
def start(redis_url: str) -> Iterator:
    holders: list[Holder] = []

    def begin(name: str, *, url: str = redis_url, **options) -> Holder:
        holders.append(Holder(url, name, **options))
        return holders[-1]

    yield begin
    for holder in holders:
        holder.process.kill()
        holder.process.communicate()


def held(url: str) -> dict[str, str]:
    with contextlib.closing(Redis.from_url(url)) as client:
        return {
            key.decode().rpartition(":")[2]: (client.get(key) or b"").decode().split(" ")[0] for key in client.keys("*")
        }


def test_replicas_started_together_use_all_gpus_and_none_for_two(start):
    holders = [start(f"rollout-{i}") for i in range(4)]
    assert sorted(gpu for holder in holders for gpu in holder.gpus()) == sorted(GPUS)


def test_tensor_parallel_replicas_lease_as_many_as_they_need_or_none(start, redis_url):
    first, second = start("rollout-0", count=2).gpus(), start("rollout-1", count=2).gpus()
    assert len(first) == len(second) == 2
    assert sorted(first + second) == sorted(GPUS)
    code, _, err = start("rollout-2", count=2).end()
    assert (code, err.count("\n")) == (2, 1)
    assert "2 GPUs wanted, 4 visible" in err and "run/rollout-0@" in err
    assert len(held(redis_url)) == 4


def test_three_replicas_of_two_gpus_do_not_tear_four_apart(start):
    holders = [start(f"rollout-{i}", count=2) for i in range(3)]
    codes = []
    for holder in holders:
        line = holder.gpus()
        codes.append(len(line) if line != [""] else holder.end()[0])
    assert codes == [2, 2, 2]  # two GPUs each, or exit code 2: never one of a half pair
    assert sum(holder.process.poll() is None for holder in holders) == 2


def test_a_released_gpu_is_free_at_once(start):
    first = start("rollout-0", gpus=GPUS[:1])
    assert first.gpus() == ["GPU-a"]
    code, out, _ = first.end(signal.SIGTERM)
    assert (code, out) == (143, "released\n")
    assert start("rollout-1", gpus=GPUS[:1]).gpus() == ["GPU-a"]


def test_a_killed_replicas_gpu_goes_to_one_that_waits_when_the_lease_runs_out(start):
    first = start("rollout-0", gpus=GPUS[:1])
    assert first.gpus() == ["GPU-a"]
    waiting = start("rollout-1", gpus=GPUS[:1], wait_s=DEADLINE_S)
    time.sleep(1.5 * LEASE_S)
    assert waiting.process.poll() is None and first.process.poll() is None  # renewed: still the first one's
    first.process.kill()
    killed = time.monotonic()
    assert waiting.gpus() == ["GPU-a"]
    assert time.monotonic() - killed < 2 * LEASE_S


def test_a_replica_that_is_started_again_takes_its_own_gpu_over_at_once(start):
    first = start("rollout-0")
    [gpu] = first.gpus()
    first.process.kill()
    assert start("rollout-0").gpus() == [gpu]


def test_a_replica_that_slept_through_its_lease_ends_instead_of_sharing(start):
    first = start("rollout-0", gpus=GPUS[:1])
    assert first.gpus() == ["GPU-a"]
    first.process.send_signal(signal.SIGSTOP)
    second = start("rollout-1", gpus=GPUS[:1], wait_s=DEADLINE_S)
    assert second.gpus() == ["GPU-a"]
    code, _, err = first.end(signal.SIGCONT)
    assert code == 1
    assert err.splitlines()[-1].endswith("the lease of GPU GPU-a is lost: another replica holds it")
    assert second.process.poll() is None


def test_a_replica_without_redis_ends_before_its_lease_does(start, mortal_valkey):
    first = start("rollout-0", url=mortal_valkey.url)
    first.gpus()
    os.kill(mortal_valkey.pid, signal.SIGSTOP)  # a partition: connections stand, nothing answers
    started = time.monotonic()
    code, _, err = first.end()
    assert (code, time.monotonic() - started < LEASE_S) == (1, True)
    assert "is lost: not renewed for" in err.splitlines()[-1]
    os.kill(mortal_valkey.pid, signal.SIGCONT)


def test_a_short_outage_of_redis_changes_nothing(start, mortal_valkey):
    first = start("rollout-0", url=mortal_valkey.url)
    [gpu] = first.gpus()
    mortal_valkey.kill()
    mortal_valkey.start()
    time.sleep(1.5 * LEASE_S)
    assert first.process.poll() is None
    assert list(held(mortal_valkey.url)) == [gpu]


def test_without_redis_there_is_one_line(tmp_path):
    lease = GpuLease("redis://127.0.0.1:1/0", GPUS, 1, owner="r", on_lost=print)
    with pytest.raises(ConfigError, match=r"redis\.url: no GPU can be leased"):
        lease.acquire(0.0)
    lease.release()


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 1, GPUS),
        (None, 4, GPUS),
        ("2", 1, ()),  # the user's own choice
        ("GPU-x,GPU-y", 2, ()),
        ("", 1, ()),
        ("-1", 1, ()),
        ("1,3", 1, ("GPU-b", "GPU-d")),  # the rollout pool beside a learner
        ("GPU-x,GPU-y", 1, ("GPU-x", "GPU-y")),
    ],
)
def test_what_is_leased_depends_on_what_the_user_named(named, count, expected):
    assert tuple(pool(named, count, lambda: GPUS)) == expected


@pytest.mark.parametrize("named", [None, "0,1"])
def test_too_few_gpus_for_the_tensor_parallel_size_are_named(named):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, but only 2 GPUs"):
        pool(named, 3, lambda: GPUS[:2])


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_without_gpus_nothing_is_asked_of_redis(device):
    environ: dict[str, str] = {}
    config = load(None, [f"--rollout.device={device}", "--redis.url=redis://127.0.0.1:1/0"], env={})
    with leased_gpus(config, "r", environ=environ, list_gpus=lambda: ()):
        assert environ == {}


def test_gpus_are_listed_by_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed_gpus() == []
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    script.chmod(0o755)
    assert installed_gpus() == ["GPU-a", "GPU-b"]
    script.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert installed_gpus() == []
