"""A real replica: vLLM, the grader's process and Valkey. The model is random, but fond of boxes."""

import json
import signal
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from boxy_model import END, save_model
from processes import Service, free_port
from redis.asyncio import Redis
from transformers import AutoTokenizer, Qwen2ForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry
from services.contracts.valkey import EmbeddedValkey
from services.contracts.wire import Task, Trajectory, Verdict
from services.learner.arithmetic_model import build_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
RUN_S = 60.0
TOKEN = "secret"
NUM_TOKENS = 304  # the model's
BEYOND = "<beyond>"  # a token that the tokenizer knows and the model does not
TOLERANCE = 1e-3  # of a log-probability, both sides fp32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, session_valkey: EmbeddedValkey) -> RunConfig:
    folder = tmp_path_factory.mktemp("rollout")
    save_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), NUM_TOKENS)] + [BEYOND])
    tokenizer.save_pretrained(folder / "model")
    flags = {
        "run.dir": str(folder), "run.name": "e2e", "redis.url": session_valkey.url, "redis.lease_s": "2",
        "model.dtype": "float32", "model.max_model_len": "256", "dialogue.system_prompt": "You have {attempts}",
        "dialogue.tokens_per_attempt": "24", "rollout.device": "cpu", "rollout.max_in_flight": "16",
        "rollout.max_num_seqs": "16", "rollout.kv_cache_mb": "64", "rollout.control_token": TOKEN,
        "grader.url": f"http://127.0.0.1:{free_port()}",
    }  # fmt: skip
    config = load(None, [f"--{key}={value}" for key, value in flags.items()], env={})
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(json.dumps(to_toml_dict(config)))
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(folder / "model")}))
    return config


@pytest.fixture(scope="module")
def services(config: RunConfig) -> Iterator[list[Service]]:
    """The grader and one replica; a test may add replicas."""
    grader_port = int(config.grader.url.rpartition(":")[2])
    running = [Service("grader", config, grader_port), start_replica(config, "rollout-0")]
    try:
        for service in running:
            service.wait_ready()
        yield running
    finally:
        for service in running:
            service.kill()


@pytest.fixture
def replica(services: list[Service]) -> Service:
    return services[1]


@pytest.fixture
async def ledger(config: RunConfig, redis: Redis, services: list[Service]) -> Ledger:
    ledger = Ledger(redis, run=config.run.name, lease_s=config.redis.lease_s, max_deliveries=5)
    await ledger.open()
    return ledger


@pytest.fixture(scope="module")
def reference(config: RunConfig) -> Qwen2ForCausalLM:
    """The same weights in plain transformers."""
    return Qwen2ForCausalLM.from_pretrained(config.run.dir / "model", dtype=torch.float32).eval()


def start_replica(config: RunConfig, name: str) -> Service:
    return Service("rollout", config, free_port(), "--replica-id", name)


def make_tasks(count: int, *, problem: str = "{}+1") -> list[Task]:
    return [
        Task(task_id=i, batch=0, problem=problem.format(i), gold=("7",) if i % 4 else ("8",), max_attempts=1 + i % 3,
             seed=1000 * i)
        for i in range(count)
    ]  # fmt: skip


async def collect(ledger: Ledger, count: int) -> list[Trajectory]:
    found: list[Trajectory] = []
    deadline = time.monotonic() + RUN_S
    while len(found) < count:
        found += [taken.trajectory for taken in await ledger.take("test", count, 1.0)]
        assert time.monotonic() < deadline, f"{len(found)} of {count} trajectories, {await ledger.depth()}"
    return found


@torch.no_grad()
def log_probabilities(model: Qwen2ForCausalLM, token_ids: list[int]) -> np.ndarray:
    """Of each token given those before it; [L], NaN for the first."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    chosen = logits.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return np.concatenate([[np.nan], chosen.numpy()])


async def test_tasks_become_trajectories_that_a_learner_can_train_on(ledger, reference):
    tasks = make_tasks(48)
    await ledger.issue(0, tasks)
    trajectories = sorted(await collect(ledger, len(tasks)), key=lambda t: t.task_id)
    assert [t.task_id for t in trajectories] == list(range(len(tasks)))
    tokenizer = build_tokenizer()
    endings = set()
    for task, trajectory in zip(tasks, trajectories, strict=True):
        mask = trajectory.action_mask
        expected = log_probabilities(reference, trajectory.token_ids.tolist())
        np.testing.assert_allclose(trajectory.logprobs[mask], expected[mask], atol=TOLERANCE)
        assert np.isnan(trajectory.logprobs[~mask]).all()
        assert {span.version for span in trajectory.versions} == {0}
        assert 1 <= len(trajectory.attempts) <= task.max_attempts
        assert sum(a.end - a.start for a in trajectory.attempts) == mask.sum()
        assert (trajectory.reward == 1.0) == trajectory.is_solved
        for attempt in trajectory.attempts:
            last = tokenizer.decode(trajectory.token_ids[attempt.end - 1 : attempt.end])
            endings.add("box" if attempt.extracted is not None else "turn" if last == END else "budget")
            if attempt.extracted is not None:
                assert last.endswith("}")
            else:
                assert attempt.verdict is Verdict.NO_ANSWER
    assert {"box", "turn"} <= endings
    assert 0 < sum(t.is_solved for t in trajectories) < len(trajectories)
    assert any(len(t.attempts) > 1 for t in trajectories)


async def test_the_same_task_is_the_same_dialogue_again(ledger, redis, config):
    tasks = make_tasks(8)
    await ledger.issue(0, tasks)
    first = {t.task_id: t.token_ids.tolist() for t in await collect(ledger, 8)}
    await redis.flushall()
    await ledger.open()
    await ledger.issue(0, tasks)
    other = Ledger(redis, run=config.run.name, lease_s=2, max_deliveries=5)
    assert {t.task_id: t.token_ids.tolist() for t in await collect(other, 8)} == first


async def test_tasks_that_can_never_run_become_dead_letters_and_the_others_go_on(ledger, replica):
    long = Task(task_id=0, batch=0, problem="1" * 300, gold=("7",), max_attempts=1, seed=0)
    broken = Task(task_id=1, batch=0, problem="1+1", gold=("",), max_attempts=1, seed=0)
    strange = Task(task_id=2, batch=0, problem=f"1+{BEYOND}", gold=("7",), max_attempts=1, seed=0)
    await ledger.issue(0, [long, broken, strange, make_tasks(4)[3]])
    assert [t.task_id for t in await collect(ledger, 1)] == [3]
    deadline = time.monotonic() + RUN_S
    while (await ledger.depth()).dead < 3:
        assert time.monotonic() < deadline
    said = [json.loads(line) for line in replica.log.read_text().splitlines() if '"msg":"dead letter"' in line]
    assert {(line["task_id"], line["run"], line["replica"], line["version"]) for line in said} == {
        (number, "e2e", "rollout-0", 0) for number in range(3)
    }
    reasons = {letter.task.task_id: letter.reason for letter in await ledger.dead_letters(5)}
    assert "the context is 256" in reasons[0]
    assert "gold answer" in reasons[1]
    assert reasons[2] == f"token id {NUM_TOKENS}: the model has {NUM_TOKENS}, from 0"


async def test_a_dialogue_can_be_asked_for_over_http(replica):
    async with httpx.AsyncClient(base_url=replica.url, timeout=30) as client:
        body = {"problem": "3+4", "gold": ["7"], "max_attempts": 3, "seed": 5}
        answer = (await client.post("/v1/dialogues", json=body)).json()
        assert 1 <= len(answer["attempts"]) <= 3
        assert (answer["reward"] == 1.0) == (answer["attempts"][-1]["verdict"] == "correct")
        assert (await client.get("/v1/weights")).json()["version"] == 0
        assert (await client.post("/v1/dialogues", json={**body, "problem": "1" * 300})).status_code == 422
        assert "multiattempt_rollout_tokens_sampled_total" in (await client.get("/metrics")).text


async def test_control_wants_its_token_and_scores_like_the_reference(replica, reference):
    token_ids = [5, 17, 40, 41, 42, 8, 9]
    async with httpx.AsyncClient(base_url=replica.url, timeout=30) as client:
        assert (await client.post("/control/score", json={"token_ids": token_ids})).status_code == 401
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        for impossible in ([5, 2**31 - 1], [5] * 5000):  # no such token; longer than the context
            refusal = await client.post("/control/score", json={"token_ids": impossible})
            assert refusal.status_code == 422, refusal.text
        answer = (await client.post("/control/score", json={"token_ids": token_ids})).json()
    assert answer["logprobs"][0] is None
    np.testing.assert_allclose(answer["logprobs"][1:], log_probabilities(reference, token_ids)[1:], atol=TOLERANCE)


async def test_what_a_killed_replica_held_is_done_by_another(ledger, redis, config, services, replica):
    tasks = make_tasks(300)
    await ledger.issue(0, tasks)
    found = await collect(ledger, 20)
    replica.kill()
    depth = await ledger.depth()
    assert depth.running > 0  # it died holding tasks
    other = start_replica(config, "rollout-1")
    services.append(other)
    other.wait_ready()
    found += await collect(ledger, len(tasks) - len(found))
    assert sorted(t.task_id for t in found) == list(range(len(tasks)))  # none lost, none twice
    assert {t.replica_id for t in found} == {"rollout-0", "rollout-1"}
    assert [r.replica_id for r in await Registry(redis, run=config.run.name).replicas()] == ["rollout-1"]

    other.process.send_signal(signal.SIGTERM)
    assert other.process.wait(30) == 0
    assert await Registry(redis, run=config.run.name).replicas() == []
