"""When a service that dies is worth another start, and how soon."""

import sys
from pathlib import Path

import pytest

from services.cli import supervisor as supervisor_module
from services.cli.progress import Progress
from services.cli.services import Service
from services.cli.supervisor import Crashes, ServiceFailed, Supervisor, last_words
from services.contracts.config import ConfigError


class Training:
    def __init__(self) -> None:
        self.version = 0

    def __call__(self) -> int:
        return self.version


def test_crashes_add_up_while_training_stands_still() -> None:
    crashes = Crashes(lambda: None)
    for count in (1, 2, 3):
        crashes.begin()
        crashes.count(was_ready=True)
        assert (crashes.in_row, crashes.at_standstill) == (count, count)


def test_a_life_in_which_training_advanced_begins_the_count_anew() -> None:
    training = Training()
    crashes = Crashes(training)
    for _ in range(3):
        crashes.begin()
        crashes.count(was_ready=True)
    crashes.begin()
    training.version += 1
    crashes.count(was_ready=True)
    assert (crashes.in_row, crashes.at_standstill) == (1, 1)


def test_one_that_never_gets_ready_beside_others_that_train_waits_longer_but_does_not_end_the_run() -> None:
    training = Training()
    crashes = Crashes(training)
    for count in range(1, 9):
        crashes.begin()
        training.version += 1
        crashes.count(was_ready=False)
        assert (crashes.in_row, crashes.at_standstill) == (count, 1)


def test_a_long_life_was_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    crashes = Crashes(lambda: None)
    for _ in range(2):
        crashes.begin()
        crashes.count(was_ready=True)
    monkeypatch.setattr(supervisor_module, "HEALTHY_S", -1.0)
    crashes.begin()
    crashes.count(was_ready=True)
    assert (crashes.in_row, crashes.at_standstill) == (1, 1)


async def kept_until_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, **service: object) -> str:
    """What ends a run with one service, which is this Python script."""
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.001)
    supervisor = Supervisor(tmp_path / "logs", Progress())
    command = (
        sys.executable,
        "-S",
        "-c",
        f"import sys, pathlib\nstarts = pathlib.Path({str(tmp_path)!r}, 's')\n{script}",
    )
    one = Service("rollout-0", command, {}, ready_url="http://127.0.0.1:9/readyz", **{"ready_s": 60.0} | service)
    supervisor.keep(one)
    try:
        with pytest.raises((ServiceFailed, ConfigError)) as failure:
            await supervisor.until_ready([one])
        return f"{type(failure.value).__name__}: {failure.value}"
    finally:
        await supervisor.stop()
        supervisor.close()


async def test_a_service_that_crashes_at_once_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await kept_until_it_fails(tmp_path, monkeypatch, "sys.exit('no good')")
    assert end.startswith("ServiceFailed: rollout-0 failed 6 times in a row: no good")


async def test_a_wrong_configuration_ends_the_run_at_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "starts.open('a').write('.')\nprint('multiattempt: error: wrong', file=sys.stderr)\nsys.exit(2)"
    assert (await kept_until_it_fails(tmp_path, monkeypatch, script)).startswith("ConfigError: wrong")
    assert (tmp_path / "s").read_text() == "."


async def test_one_that_hangs_at_its_first_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await kept_until_it_fails(tmp_path, monkeypatch, "import time\ntime.sleep(60)", ready_s=0.3)
    assert end == "ServiceFailed: rollout-0 was not ready within 0.3 s: no answer"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "it said nothing"),
        (["ValueError: a", "multiattempt: error: b"], "multiattempt: error: b"),
        (
            ["OSError: old", "(EngineCore pid=12) ERROR 11-21 [core.py:3] ValueError: Free memory on cuda:0 is less",
             '{"msg": "RuntimeError: x"}', "RuntimeError: failed. See root cause above."],
            "ValueError: Free memory on cuda:0 is less",
        ),
        (["nothing of the kind", "RuntimeError: See root cause above."], "RuntimeError: See root cause above."),
    ],
)  # fmt: skip
def test_a_failures_last_words_are_its_cause(lines: list[str], said: str) -> None:
    assert last_words(lines) == said


async def test_a_service_that_never_was_ready_is_tried_as_often_as_it_is_told(tmp_path: Path) -> None:
    with Progress() as progress:
        supervisor = Supervisor(tmp_path, progress, start_tries=2)
        lines = "import sys; print('OSError: no memory', file=sys.stderr); sys.exit(1)"
        service = Service("engine", (sys.executable, "-c", lines), {}, ready_url="http://127.0.0.1:9/", ready_s=60.0)
        supervisor.keep(service)
        try:
            with pytest.raises(ServiceFailed, match="engine failed 2 times in a row: OSError: no memory"):
                await supervisor.until_ready([service])
        finally:
            await supervisor.stop()
            supervisor.close()
