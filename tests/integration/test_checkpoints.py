"""Checkpoints of real engines: on other ranks than wrote them, with a rank that cannot write, killed, and exported."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_deepspeed_engine
import torch
from processes import free_port
from ranks import TESTS, RankProcesses
from test_deepspeed_engine import assert_same, make_run, train, train_plainly
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from services.contracts.config import RunConfig
from services.learner.algorithm import CONFIG
from services.learner.checkpoint import Checkpoints
from services.learner.universal import convert

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
Model = Path
model = test_deepspeed_engine.model  # a fixture


def copied(config: RunConfig, model: Path, to: Path, *flags: str) -> RunConfig:
    """The same run elsewhere; the link to the best checkpoint has become a folder."""
    other = make_run(to, model, *flags)
    shutil.rmtree(other.run_dir / "checkpoints", ignore_errors=True)
    shutil.copytree(config.run_dir / "checkpoints", other.run_dir / "checkpoints")
    return other


@pytest.mark.parametrize(("stage", "first", "second"), [(2, 2, 1), (3, 1, 2)])
def test_ranks_may_be_others_than_wrote_the_checkpoint(
    tmp_path: Path,
    model: Model,
    stage: int,
    first: int,
    second: int,
) -> None:
    flags = ("--learner.zero_stage", str(stage))
    config = make_run(tmp_path / "a", model, *flags)
    before = train(config, updates=1, world=first)
    other = copied(config, model, tmp_path / "b", *flags)
    ours = train(config, updates=1, world=first, mode="resume")
    theirs = train(other, updates=1, world=second, mode="resume")
    moved = max(float((ours.weights[name] - before.weights[name]).abs().max()) for name in ours.weights)
    assert moved > 5e-4
    assert_same(theirs.weights, ours.weights, 2e-6)  # moments and master weights came along; sums differ in their order
    for name in ("policy_loss", "value_loss", "grad_norm"):
        assert theirs.figures[0][name] == pytest.approx(ours.figures[0][name], rel=1e-4, abs=1e-6)
    left = {path.name for path in (other.run_dir / "checkpoints").iterdir()}
    assert left == {"best", "v00000001", "v00000002"}  # the converted one is gone


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_other_ranks_have_the_same_masters_and_moments_in_bf16(tmp_path: Path, first: int, second: int) -> None:
    RankProcesses("universal_rank.py", [str(tmp_path), "save"], world=first).finish()
    names = [f"zero{stage}" for stage in (1, 2, 3)]
    convert(tmp_path / "saved", names, tmp_path / "universal")
    RankProcesses("universal_rank.py", [str(tmp_path), "load"], world=second).finish()
    saved, restored = (torch.load(tmp_path / f"{mode}.pt", weights_only=True) for mode in ("save", "load"))
    for name in names:
        (left, left_next), (found, found_next) = saved[name], restored[name]
        assert [key for key in left if not torch.equal(found[key], left[key])] == [], name
        torch.testing.assert_close(found_next, left_next, rtol=1e-6, atol=0)  # a step later: its number is the same too
        assert not torch.equal(left["layers.0.weight"], left_next["layers.0.weight"])


def test_an_export_is_a_model_for_transformers_with_a_card(tmp_path: Path, model: Model) -> None:
    config = make_run(tmp_path, model, "--sampling.temperature", "0.7")
    train(config, updates=1)
    checkpoint = config.run_dir / "checkpoints" / "best"
    folder = checkpoint / "hf"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("1+1=")])
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, ids.shape[1] + 3)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.7, 0)
    card = (folder / "README.md").read_text()
    assert "| policy updates | 1 of 4, 12 dialogues each |" in card and "| mean reward | 0.5 |" in card
    assert json.loads((checkpoint / CONFIG).read_text())["sampling"]["temperature"] == 0.7


def test_a_rank_that_cannot_write_fails_the_checkpoint_and_training_goes_on(tmp_path: Path, model: Model) -> None:
    config = make_run(tmp_path, model)
    output = tmp_path / "output"
    RankProcesses("refused_save.py", [str(config.run_dir), str(output), "full disk"], world=2).finish()
    said = json.loads(output.read_text())
    assert "earlier ones intact" in said["error"] and "rank 1: [Errno 28] No space left on device" in said["error"]
    assert said["left"] == ["best", "v00000001"] and said["then"] == ["best", "v00000001", "v00000002"]


def test_killed_while_the_ranks_write_it_goes_on_from_the_checkpoint_before(tmp_path: Path, model: Model) -> None:
    config = make_run(tmp_path, model, "--learner.zero_stage", "0")
    ranks = RankProcesses("refused_save.py", [str(config.run_dir), str(tmp_path / "output"), "kill"], world=2)
    codes = [process.wait(100) for process in ranks.processes]
    assert -signal.SIGKILL in codes, ranks.stop()
    ranks.stop()
    folder = config.run_dir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best", "v00000001", ".partial-v00000002"}
    assert any((folder / ".partial-v00000002").rglob("*.pt"))
    train(config, updates=1, mode="resume")
    assert {path.name for path in folder.iterdir()} == {"best", "v00000001", "v00000002"}
    found = Checkpoints(folder, keep=2).latest()
    assert found is not None and found[1].version == 2


def on_two_hosts(launcher: str, script: list[str]) -> list[list[str]]:
    """The command that each of two hosts runs, one rank each: torchrun, or what `deepspeed --hostfile` runs by ssh."""
    python = [sys.executable, "-m"]
    if launcher == "torchrun":
        meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
        return [[*python, "torch.distributed.run", *meeting, "--nproc-per-node=1", *script]] * 2
    hosts = base64.urlsafe_b64encode(json.dumps({"host0": [0], "host1": [0]}).encode()).decode()
    meeting = ["--master_addr=127.0.0.1", f"--master_port={free_port()}", f"--world_info={hosts}", "--no_local_rank"]
    return [[*python, "deepspeed.launcher.launch", f"--node_rank={rank}", *meeting, *script] for rank in range(2)]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_on_two_hosts_make_the_update_that_one_makes(tmp_path: Path, model: Model, launcher: str) -> None:
    config = make_run(tmp_path, model, "--learner.minibatch_dialogues", "12")
    output = config.run_dir / "out"
    script = [str(TESTS / "integration" / "learner_rank.py"), str(config.run_dir), str(output), "1", "fresh"]
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    agents = [subprocess.Popen(command, env=environment) for command in on_two_hosts(launcher, script)]
    try:
        assert [agent.wait(250) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait(10)
    assert_same(torch.load(output / "actor.pt", weights_only=True), train_plainly(config, model), 2e-5)


def test_a_leader_that_hangs_ends_the_others(tmp_path: Path, model: Model) -> None:
    """It is also who serves the store by which the ranks watch one another."""
    config = make_run(tmp_path, model, "--learner.rank_timeout_s", "4")
    ranks = RankProcesses("refused_save.py", [str(config.run_dir), str(tmp_path / "o"), "hang"], world=2)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "o").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks.processes[0].send_signal(signal.SIGSTOP)
        assert ranks.processes[1].wait(60) == 1  # not the collectives' deadline of half an hour
    finally:
        said = ranks.stop()
    assert "ending: another learner rank is lost" in said[1]
