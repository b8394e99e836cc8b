"""The whole loop on real parts: weights that land, a learner that is killed and goes on, a reward that rises."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from processes import ROOT, Service, free_port
from transformers import AutoModelForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.valkey import EmbeddedValkey

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TOKEN = "secret"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # mean difference of a log-probability
STEP_S = 120.0
LAST_STEP = 16


class Run:
    """One run's folder, its grader and replica; learners come and go."""

    def __init__(self, folder: Path, redis_url: str, dtype: str) -> None:
        self.config = make_config(folder, redis_url, dtype)
        self.folder = self.config.run_dir
        self.folder.mkdir(parents=True)
        self.write(steps=1)
        prepare = [sys.executable, "-m", "services.learner.prepare", "--config", str(self.folder / "config.json")]
        subprocess.run(prepare, check=True, env=environment(), cwd=ROOT, timeout=300)
        grader_port = int(self.config.grader.url.rpartition(":")[2])
        self.services = [
            Service("grader", self.config, grader_port),
            Service("rollout", self.config, free_port(), "--replica-id", "rollout-0"),
        ]
        for service in self.services:
            service.wait_ready()

    def write(self, *, steps: int) -> None:
        values = to_toml_dict(self.config)
        values["run"]["steps"] = steps
        (self.folder / "config.json").write_text(json.dumps(values))

    def learner(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "services.learner", "--config", str(self.folder / "config.json"), *flags]
        with (self.folder / "learner.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, learner: subprocess.Popen[bytes]) -> None:
        code = learner.wait(STEP_S)
        assert code == 0, (self.folder / "learner.log").read_text()[-3000:]

    def metrics(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def newest_checkpoint(self) -> Path:
        return max((self.folder / "checkpoints").glob("*/hf"), key=lambda hf: hf.stat().st_mtime)

    def replica_scores(self, token_ids: list[int]) -> tuple[int, np.ndarray]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{self.services[1].url}/control/score"
        answer = httpx.post(url, json={"token_ids": token_ids}, headers=headers, timeout=30).raise_for_status().json()
        return answer["version"], np.array(answer["logprobs"][1:])


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "10000"}


def make_config(folder: Path, redis_url: str, dtype: str) -> RunConfig:
    """One-digit sums, half of them shown wrong: unlearned in a few updates."""
    flags = {
        "run.dir": str(folder), "run.name": f"training-{dtype}", "redis.url": redis_url, "redis.lease_s": "5",
        "model.source": "arithmetic", "model.dtype": dtype, "model.max_model_len": "160",
        "model.cache_dir": str(folder / "models"), "model.warmup_steps": "140", "model.warmup_batch": "64",
        "model.warmup_errors": "0.6",
        "data.digits": "1", "data.heldout_size": "20", "dialogue.system_prompt": "You have {attempts}",
        "dialogue.max_attempts": "3", "dialogue.tokens_per_attempt": "20", "rollout.device": "cpu",
        "rollout.max_in_flight": "64", "rollout.kv_cache_mb": "64", "rollout.control_token": TOKEN,
        "grader.url": f"http://127.0.0.1:{free_port()}", "learner.device": "cpu", "learner.zero_stage": "0",
        "learner.batch_dialogues": "96", "learner.minibatch_dialogues": "48", "learner.micro_tokens": "2048",
        "learner.lr": "3e-4", "learner.critic_lr": "1e-3", "learner.lr_min_ratio": "1.0", "learner.max_staleness": "0",
        "learner.kl_coef": "0.001", "learner.checkpoint_every": "1", "learner.take_timeout_s": "100",
    }  # fmt: skip
    return load(None, [f"--{key}={value}" for key, value in flags.items()], env={})


@pytest.fixture(scope="module", params=["float32"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("training")
    with EmbeddedValkey(folder / "valkey") as valkey:
        made = Run(folder, valkey.url, request.param)
        try:
            yield made
        finally:
            for service in made.services:
                service.kill()


@torch.no_grad()
def log_probabilities(model_folder: Path, token_ids: list[int], dtype: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].numpy()


def test_the_replica_has_the_learners_weights_after_each_update(run: Run) -> None:
    """Three learners in turn, each one update: weights land, checkpoints resume, tied heads included."""
    token_ids = [257, 269, 262, 18, 263, 258, 198, 257, 270, 20, 10, 23, 258, 198, 257, 271, 20, 10, 23, 28, 16, 17]
    dtype, seen = run.config.model.dtype, []
    for version in (1, 2, 3):
        run.write(steps=version)
        run.finish(run.learner(*(["--resume"] if version > 1 else [])))
        held, scores = run.replica_scores(token_ids)
        assert held == version
        expected = log_probabilities(run.newest_checkpoint(), token_ids, dtype)
        assert np.abs(scores - expected).mean() < TOLERANCE[dtype]
        seen.append(scores)
    for before, after in itertools.pairwise(seen):
        assert np.abs(before - after).mean() > TOLERANCE[dtype]  # each update changed something
    assert [row["version"] for row in run.metrics()] == [1, 2, 3]


def test_a_killed_learner_goes_on_and_the_reward_rises(run: Run) -> None:
    """kill -9 in the middle; resumed, every update is done once, and the policy has learned."""
    first = len(run.metrics())
    run.write(steps=LAST_STEP)
    learner = run.learner("--resume")
    deadline = time.monotonic() + STEP_S
    while len(run.metrics()) < first + 4:
        assert learner.poll() is None, (run.folder / "learner.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(learner.pid, signal.SIGKILL)
    learner.wait(10)
    run.finish(run.learner("--resume"))
    metrics = run.metrics()
    assert [row["version"] for row in metrics] == list(range(1, LAST_STEP + 1))
    rewards = [row["reward"] for row in metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
    # On-policy: nothing in a batch is older than the update it trains, and both sides agree on log-probabilities.
    assert max(row["staleness_max"] for row in metrics) == 0
    assert max(row["kl_behaviour"] for row in metrics) < 1e-3
