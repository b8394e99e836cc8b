"""`python -m services.learner` as the launcher starts it: its errors, its end, being stopped and resumed."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learner_data import make_trajectory
from redis.asyncio import Redis
from transformers import Qwen2Config, Qwen2ForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry
from services.learner.arithmetic_model import build_tokenizer

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def make_run(tmp_path: Path, redis_url: str, *flags: str, has_model: bool = True) -> RunConfig:
    base = [
        *("--run.dir", str(tmp_path), "--run.name", "process", "--run.steps", "6", "--model.dtype", "float32"),
        *("--redis.url", redis_url, "--data.heldout_size", "16", "--data.digits", "1"),
        *("--learner.batch_dialogues", "8", "--learner.minibatch_dialogues", "4", "--learner.checkpoint_every", "4"),
        *("--learner.device", "cpu", "--learner.zero_stage", "0", "--learner.take_timeout_s", "60"),
    ]
    config = load(None, [*base, *flags], env={})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(json.dumps(to_toml_dict(config)))
    if has_model:
        model = tmp_path / "model"
        torch.manual_seed(0)
        shape = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        (config.run_dir / "model.json").write_text(json.dumps({"path": str(model)}))
    return config


def start(config: RunConfig, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "services.learner", "--config", str(config.run_dir / "config.json"), *flags]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def finish(learner: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(learner.communicate, timeout=80)
    return learner.returncode, out, err


async def answer_tasks(redis: Redis) -> None:
    """Does rollout's part: every task gets a random dialogue, with the version that the learner published."""
    ledger, registry = Ledger(redis, run="process", lease_s=5, max_deliveries=3), Registry(redis, run="process")
    await ledger.open()
    while True:
        version = await registry.version()
        for claim in await ledger.claim("rollout-0", version, 8):
            trajectory = make_trajectory(claim.task.task_id, batch=claim.task.batch, version=version)
            await ledger.complete(claim.entry_id, trajectory)
        await asyncio.sleep(0.02)


async def test_stopped_and_resumed_it_does_every_step_once(tmp_path: Path, redis: Redis, redis_url: str) -> None:
    config = make_run(tmp_path, redis_url)
    lines = config.run_dir / "metrics.jsonl"
    rollout = asyncio.create_task(answer_tasks(redis))
    learner = start(config)
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert learner.poll() is None and time.monotonic() < deadline, learner.communicate()
        await asyncio.sleep(0.02)
    learner.send_signal(signal.SIGTERM)
    code, out, err = await finish(learner)
    assert (code, out) in {(143, ""), (0, "")}, err
    code, _, err = await finish(start(config))
    assert code == 2 and "--resume" in err and err.count("\n") == 1
    code, out, err = await finish(start(config, "--resume"))
    rollout.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await rollout
    assert (code, out) == (0, ""), err
    said = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {line["run"] for line in said} == {"process"}
    assert {line["version"] for line in said if line["msg"] == "step"} >= {5, 6}
    assert all("version" in line for line in said if line["logger"] == "services.learner.loop")
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["step"] for line in figures] == [1, 2, 3, 4, 5, 6]
    assert all(line["grad_norm"] > 0 and line["value_loss"] > 0 for line in figures)
    assert list((config.run_dir / "tensorboard").iterdir())
    assert (config.run_dir / "checkpoints" / "v00000006" / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "has_model", "message"),
    [
        (["--redis.url", ""], True, "redis.url"),
        (["--redis.url", "redis://127.0.0.1:1/0"], True, "no Redis at"),
        (["--learner.device", "cuda"], True, "learner.device"),
        ([], False, "the model is not prepared"),
    ],
)
async def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    tmp_path: Path, redis_url: str, flags: list[str], has_model: bool, message: str
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("has a GPU")
    code, out, err = await finish(start(make_run(tmp_path, redis_url, *flags, has_model=has_model)))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err
