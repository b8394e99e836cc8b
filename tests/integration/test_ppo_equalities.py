"""However an update is divided, over ranks, ZeRO stages or micro-batches, it is the same update. Real DeepSpeed."""

import math
from typing import Any

import pytest
import torch
from ranks import RankProcesses

pytestmark = pytest.mark.integration

Found = dict[str, dict[str, Any]]
RELATIVE = 5e-5
ABSOLUTE = 3e-5  # of weights that moved by 4e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """By number of ranks: what each case of `ppo_rank.py` came to."""
    folder = tmp_path_factory.mktemp("equal")
    started = {world: RankProcesses("ppo_rank.py", [str(folder / f"{world}.pt")], world=world) for world in (1, 2)}
    for processes in started.values():
        processes.finish()
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in started}


def assert_same_updates(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Losses, gradient norms, whitening and all other figures of each update; and the weights in the end."""
    for mine, other in zip(ours["figures"], theirs["figures"], strict=True):
        assert mine.keys() == other.keys()
        for name in [name for name in mine if not name.endswith("_s") and name != "answered_ahead"]:
            assert mine[name] == pytest.approx(other[name], rel=RELATIVE, abs=1e-6), name
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in ours["weights"].items():
        torch.testing.assert_close(tensor, theirs["weights"][name], rtol=0, atol=ABSOLUTE, msg=lambda m, n=name: n + m)


def test_the_cases_do_train_and_leave_the_hopeless_dialogue_out(runs: dict[int, Found]) -> None:
    for name, case in runs[1].items():
        assert [line["masked_dialogues"] for line in case["figures"]] == [1.0] * 3, name
        assert all(line["nonfinite_steps"] == 0 and line["grad_norm"] > 0 for line in case["figures"]), name
        assert all(math.isfinite(value) for line in case["figures"] for value in line.values()), name
    base, grpo = runs[1]["zero 0"], runs[1]["grpo"]
    moved = max(float((base["weights"][k] - grpo["weights"][k]).abs().max()) for k in base["weights"])
    assert moved > 50 * ABSOLUTE  # another algorithm is told apart
    assert "value_loss" in base["figures"][0] and "value_loss" not in grpo["figures"][0]
    assert runs[1]["reinforce_pp"]["figures"][1]["kl_coef"] != 0.1


@pytest.mark.parametrize("case", ["zero 0", "zero 3", "grpo", "reinforce_pp", "all terms"])
def test_two_ranks_equal_one(runs: dict[int, Found], case: str) -> None:
    assert_same_updates(runs[2][case], runs[1][case])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_zero_stages_take_the_same_steps(runs: dict[int, Found], stage: int, world: int) -> None:
    assert_same_updates(runs[world][f"zero {stage}"], runs[1]["zero 0"])


@pytest.mark.parametrize("case", ["one by one", "all at once"])
@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_micro_batches_is_the_same_update(runs: dict[int, Found], case: str, world: int) -> None:
    assert_same_updates(runs[world][case], runs[1]["zero 0"])


@pytest.mark.parametrize(
    "case", ["packed", "packed, zero 3", "shared", "shared, zero 3", "reference on the host", "asked ahead"]
)
@pytest.mark.parametrize("world", [1, 2])
def test_neither_layout_nor_place_nor_time_of_asking_change_an_update(
    runs: dict[int, Found], case: str, world: int
) -> None:
    assert_same_updates(runs[world][case], runs[1]["zero 0"])
    ahead = [line["answered_ahead"] for line in runs[world][case]["figures"]]
    assert ahead == [7.0 if case == "asked ahead" else 0.0] * 3


def test_the_parts_of_an_update_are_all_named(runs: dict[int, Found]) -> None:
    parts = {"pack_s", "first_pass_s", "forward_s", "backward_s", "optimiser_s", "publish_s", "other_s"}
    for line in runs[1]["zero 2"]["figures"]:
        assert {name for name in line if name.endswith("_s")} == parts | {"update_s"}
        assert all(line[name] >= 0 for name in parts)
        assert sum(line[name] for name in parts) == pytest.approx(line["update_s"])
    shares = [line["other_s"] / sum(line[name] for name in parts) for line in runs[1]["zero 2"]["figures"]]
    assert min(shares) < 0.2  # of one step at least: on a busy machine any moment may last
