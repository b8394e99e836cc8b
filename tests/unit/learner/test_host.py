"""The ranks of a host: their environment, and that they end together. The program is a shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.contracts.config import ConfigError
from services.learner.host import rank_variables, run_ranks

SHELL = ("sh", "-c")


def test_one_host_needs_no_variables() -> None:
    first, second = rank_variables(2, {})
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"], first["MASTER_ADDR"]) == (
        "0",
        "0",
        "2",
        "127.0.0.1",
    )
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_ranks_of_several_hosts_are_numbered_through() -> None:
    environ = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "learner-0", "MASTER_PORT": "29501"}
    ranks = rank_variables(8, environ)
    assert [rank["RANK"] for rank in ranks] == [str(16 + i) for i in range(8)]
    assert {(rank["WORLD_SIZE"], rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks} == {
        ("32", "learner-0", "29501")
    }


@pytest.mark.parametrize(
    "environ",
    [
        {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
        {"NNODES": "2", "NODE_RANK": "1"},
        {"NNODES": "two"},
    ],
)
def test_variables_that_do_not_fit_are_told(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        rank_variables(2, environ)


@pytest.fixture
def keep_signals() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_signals")
def test_it_ends_with_zero_when_all_ranks_do() -> None:
    assert run_ranks(3, ["exit 0"], program=SHELL) == 0


@pytest.mark.usefixtures("keep_signals")
def test_one_that_fails_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.learner.host.GRACE_S", 0.2)
    hang = "trap '' TERM; [ $RANK = 1 ] && exit 3; while :; do sleep 0.05; done"
    assert run_ranks(2, [hang], program=SHELL) == 3


@pytest.mark.usefixtures("keep_signals")
def test_a_death_by_signal_is_told_as_shells_do() -> None:
    assert run_ranks(1, ["kill -9 $$"], program=SHELL) == 137


def test_a_request_to_stop_reaches_every_rank_and_is_waited_for(tmp_path: Path) -> None:
    wait = "while :; do sleep 0.05; done"
    rank = f"trap 'sleep 0.3; touch {tmp_path}/$RANK; exit 143' TERM; touch {tmp_path}/up$RANK; {wait}"
    call = f"run_ranks(2, [{rank!r}], program={SHELL!r})"
    code = f"import sys; from services.learner.host import run_ranks; sys.exit({call})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    try:
        deadline = time.monotonic() + 30
        while not ((tmp_path / "up0").exists() and (tmp_path / "up1").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
