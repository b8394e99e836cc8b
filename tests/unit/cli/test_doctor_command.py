"""`doctor`, and `doctor --gpu` without a GPU: what they make of what they find."""

from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.doctor import CHECKS, check_engines, check_valkey
from services.cli.gpu import driver_finding
from services.contracts.weights.communicator import MismatchError, PeerError
from services.contracts.weights.probe import NOTICE_S, SILENT_S, findings


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--gpu"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "no NVIDIA GPU here (CUDA_VISIBLE_DEVICES names none)" in said.err


def test_the_drivers_version(tmp_path: Path) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul\nGCC 12.2.0\n"
    )
    assert driver_finding(tmp_path / "version").result == "580.65.06"
    assert "unknown" in driver_finding(tmp_path / "none").result


class Transfers:
    """A sender whose transfers end as told: seconds, or an error."""

    def __init__(self, *ends: float | Exception) -> None:
        self.ends = list(ends)

    def transfer(self, times: int, *, bucket_s: float = 0.0) -> float:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def found(*ends: float | Exception) -> list[bool]:
    return [finding[1] for finding in findings(Transfers(*ends), "gloo", num_bytes=1 << 20)]


def test_each_way_a_transfer_can_fail_is_found() -> None:
    assert found(0.1, PeerError("silent"), 0.1) == [True, True, True]
    assert found(MismatchError("other bytes")) == [False]
    assert found(0.1, 0.1, 0.1) == [True, False, True]  # the silence was not noticed
    assert found(0.1, PeerError("silent"), PeerError("gone")) == [True, True, False]
    assert SILENT_S + NOTICE_S < 60


def test_the_quick_checks_of_any_machine_have_a_result_and_a_remedy() -> None:
    found = [finding for check in CHECKS if check not in (check_engines, check_valkey) for finding in check()]
    assert len(found) > 5 and all(finding.result and finding.remedy for finding in found)
