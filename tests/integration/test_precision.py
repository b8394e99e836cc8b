"""fp32 master weights, and steps that are not finite, under every ZeRO stage in fp32 and bf16, on two ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import RankProcesses

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By "stage dtype"."""
    output = tmp_path_factory.mktemp("precision") / "found.json"
    RankProcesses("precision_rank.py", [str(output), "false"], world=2).finish()
    cases: dict[str, Any] = json.loads(output.read_text())
    assert len(cases) == 8
    return cases


def check(case: dict[str, Any]) -> None:
    assert case["spoilt"] == [False, False], "a norm was reported as finite"
    assert case["kept"], "a step that should have been skipped changed the weights"
    assert case["norms"] == pytest.approx([48.0, 48.0])
    # Each step is a hundredth of what bf16 can hold; without fp32 masters nothing would ever move.
    assert case["moved"] == pytest.approx(1.0, abs=0.25)


def test_tiny_steps_add_up_and_spoilt_ones_change_nothing(found: dict[str, Any]) -> None:
    for name, case in found.items():
        print(name, case)  # noqa: T201 - which case it was, when it fails
        check(case)


def test_the_same_with_the_optimiser_on_the_host(tmp_path: Path) -> None:
    if not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("DeepSpeedCPUAdam is compiled at first use: needs g++ and ninja")
    output = tmp_path / "found.json"
    RankProcesses("precision_rank.py", [str(output), "true"], world=1).finish()
    cases = json.loads(output.read_text())
    assert len(cases) == 3
    for name, case in cases.items():
        print(name, case)  # noqa: T201 - which case it was, when it fails
        check(case)
