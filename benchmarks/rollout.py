"""How fast the rollout service is against bare vLLM, and how it starts: `make bench-rollout`.

The service is the real one: replica, grader and Valkey as processes, tasks and trajectories through the ledger. The
reference (`benchmarks.lockstep`) then does the same work: same prompts and feedback, and for each attempt as many
tokens as the service sampled. The two take turns, NUM_ROUNDS times; the claims compare medians. Cases:

- `single`: sampled tokens/s of dialogues with one attempt, against one call of `LLM.generate`.
- `multi`: dialogues/s with up to five attempts, against the paper's lock-step loop in chunks of 64 tokens.
- `idle`: share of the time of `multi` in which an engine had nothing to do while dialogues waited for verdicts.
- `replicas`: dialogues/s of REPLICAS replicas that share the machine's cores against one that has them all.
- `start`: seconds from a replica's process to its first token, and where they go.

Each side has its best settings on a CPU. For the service that is a replica for each core or two: whatever else runs
(grader, ledger, the replica's own front) then holds up one engine and not, as with an engine that computes on all
cores in step, every core. `LLM` is one engine, on all cores; as many sequences are in flight on both sides.

The last lines printed are one JSON object per claim.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.ledger import Ledger
from services.contracts.problems import load_problems
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey
from services.contracts.wire import Task, Trajectory
from services.learner.arithmetic_model import build_tokenizer
from services.learner.prepare import prepare
from services.learner.sampler import TaskSampler
from tests.processes import ROOT, Service, free_port

MAX_ATTEMPTS = 5
TIMEOUT_S = 900.0
NUM_WARM_UP = 64
NUM_ROUNDS = 3
REPLICAS = 2
TAKE_PAUSE_S = 0.1  # between looks at what has come: a learner takes batches, not single trajectories
END_LIFT = 1.4  # weight of the constant part in the end of turn: it then has a probability of about 3 %
METRIC = re.compile(r"^(multiattempt_rollout_\w+?)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Model:
    """A model to measure with: its configuration file, changes to it, and how much work to do."""

    config: str
    flags: tuple[str, ...]
    num_seqs: int
    """In flight on the whole machine."""
    num_single: int
    num_multi: int


MODELS = {
    "demo": Model("configs/demo.toml", (), num_seqs=128, num_single=2048, num_multi=2048),
    "tinyqwen": Model(
        "configs/demo.toml",
        (
            "--model.source=pretrained", "--model.warmup_steps=0", "--model.max_model_len=1024",
            "--dialogue.tokens_per_attempt=128", "--dialogue.tokens_per_dialogue=640",
        ),
        num_seqs=64,
        num_single=1152,
        num_multi=384,
    ),
    "smollm2": Model(
        "configs/smollm2-cpu.toml",
        (
            "--data.source=arithmetic", "--model.warmup_steps=0", "--dialogue.tokens_per_attempt=96",
            "--dialogue.tokens_per_dialogue=480", "--model.max_model_len=1024",
            "--dialogue.system_prompt=You solve sums. Put the final answer within \\boxed{{}}. You have {attempts}.",
            '--dialogue.examples=[["What is 23+45?", "23+45 = 68, so the answer is \\\\boxed{68}."]]',
        ),
        num_seqs=32,
        num_single=288,
        num_multi=160,
    ),
}  # fmt: skip


class System:
    """Valkey, grader and replicas of one configuration."""

    def __init__(self, config: RunConfig, model: Path) -> None:
        self.config, self.model = config, model
        self.replicas: list[Service] = []
        self._next = 0
        self._sampler = TaskSampler(load_problems(config).train, seed=0, min_attempts=1, max_attempts=MAX_ATTEMPTS)

    def start_replica(self) -> float:
        """Seconds until it is ready."""
        started = time.perf_counter()
        replica = Service("rollout", self.config, free_port(), "--replica-id", f"rollout-{len(self.replicas)}")
        self.replicas.append(replica)
        replica.wait_ready()
        return time.perf_counter() - started

    def run(self, count: int, *, max_attempts: int | None = None) -> tuple[list[Task], list[Trajectory], float]:
        """New tasks, their trajectories, seconds from issue to the last one taken. None: N in 1..5."""
        return asyncio.run(self._run(count, max_attempts))

    async def _run(self, count: int, max_attempts: int | None) -> tuple[list[Task], list[Trajectory], float]:
        redis = await connect(self.config.redis.url)
        ledger = Ledger(redis, run=self.config.run.name, lease_s=20, max_deliveries=5)
        await ledger.open()
        tasks = [self._sampler.task(self._next + i, batch=0, min_version=0) for i in range(count)]
        if max_attempts is not None:
            tasks = [_with_attempts(task, max_attempts) for task in tasks]
        found: list[Trajectory] = []
        started = time.perf_counter()
        self._next = await ledger.issue(self._next, tasks)
        while len(found) < count:
            taken = await ledger.take("bench", count, 1.0)
            found += [one.trajectory for one in taken]
            await ledger.acknowledge([one.entry_id for one in taken], through_batch=-1)
            await asyncio.sleep(TAKE_PAUSE_S)
            if time.perf_counter() - started > TIMEOUT_S:
                raise TimeoutError(
                    f"{len(found)} of {count} trajectories after {TIMEOUT_S:g} s; {await ledger.depth()}"
                )
        seconds = time.perf_counter() - started
        await redis.aclose()
        return tasks, sorted(found, key=lambda trajectory: trajectory.task_id), seconds

    def metrics(self) -> dict[str, float]:
        """Counters, summed over the replicas; with labels, the sum over them under the bare name too."""
        found: dict[str, float] = defaultdict(float)
        for replica in self.replicas:
            for name, labels, value in METRIC.findall(httpx.get(f"{replica.url}/metrics", timeout=10).text):
                found[name] += float(value)
                if labels:
                    found[f"{name}{{{labels}}}"] += float(value)
        return found

    def start_replicas(self, count: int) -> None:
        """So many, warm."""
        for _ in range(count):
            self.start_replica()
        self.run(NUM_WARM_UP)

    def stop_replicas(self) -> None:
        for replica in self.replicas:
            replica.kill()
        self.replicas = []


@contextmanager
def system(model: Model, flags: Sequence[str], *, replicas: int = 1) -> Iterator[System]:
    """All but the replicas, started. replicas: how many will share the cores and the sequences in flight."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rollout-")))
        valkey = stack.enter_context(EmbeddedValkey(folder / "valkey"))
        port = free_port()
        places = ("--run.name=bench", f"--run.dir={folder}", f"--redis.url={valkey.url}")
        urls = (f"--grader.url=http://127.0.0.1:{port}", f"--grader.port={port}", "--rollout.device=cpu")
        threads = max(1, (os.cpu_count() or 1) // replicas)
        share = (f"--rollout.threads={threads}", f"--rollout.max_num_seqs={model.num_seqs // replicas}")
        config = load(ROOT / model.config, [*model.flags, *share, *places, *urls, *flags], env={})
        folder = config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        weights = prepare(config) if model is not MODELS["tinyqwen"] else make_tinyqwen(config.run_dir / "model")
        (folder / "config.json").write_text(json.dumps(to_toml_dict(config)))
        (folder / "model.json").write_text(json.dumps({"path": str(weights)}))
        grader = Service("grader", config, port)
        stack.callback(grader.kill)
        grader.wait_ready()
        running = System(config, weights)
        stack.callback(running.stop_replicas)
        yield running


def make_tinyqwen(folder: Path) -> Path:
    """A random Qwen2 of 14 M parameters with a vocabulary of 49,152, as in platform.md, that ends its turn after some
    thirty tokens on average: attempts of every length, none with an answer.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": 49_152, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=False, initializer_range=0.1))
    [end] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 30.0  # an input-independent part of the hidden state
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end, 0] = END_LIFT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Reference:
    """Bare vLLM in a process of its own (`benchmarks.lockstep`), idle until it is asked."""

    def __init__(self, system: System, *, num_seqs: int) -> None:
        config = system.config
        self._folder, self._tokenizer = config.run_dir, AutoTokenizer.from_pretrained(system.model)
        settings = {
            "model": str(system.model),
            "dtype": config.model.dtype,
            "max_model_len": config.model.max_model_len,
            "max_num_seqs": num_seqs,
            "kv_cache_mb": config.rollout.kv_cache_mb,
            "threads": os.cpu_count(),
            "grader_url": config.grader.url,
        }
        path = self._folder / "reference.json"
        path.write_text(json.dumps(settings))
        self._log = (self._folder / "reference.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lockstep", str(path)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._answer()

    def seconds(self, case: str, tasks: Sequence[Task], trajectories: Sequence[Trajectory]) -> float:
        """What the same dialogues take."""
        pairs = zip(tasks, trajectories, strict=True)
        return self.repeat(case, [_planned(self._tokenizer, task, found) for task, found in pairs])

    def repeat(self, case: str, planned: Sequence[dict[str, Any]]) -> float:
        """Seconds for dialogues that are as `lockstep.Planned` has them."""
        path = self._folder / f"{case}.json"
        path.write_text(json.dumps({"case": case, "dialogues": list(planned)}))
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            word = line.strip()
            if word == "ready" or word.replace(".", "", 1).isdigit():
                return word
        raise RuntimeError(f"the reference ended: {Path(self._log.name).read_text()[-2000:]}")


def measure(name: str, flags: Sequence[str], cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The claims of one model."""
    model = MODELS[name]

    def claim(case: str, ours: float, against: float, unit: str) -> dict[str, Any]:
        numbers = {"ours": round(ours, 4), "reference": round(against, 4), "ratio": round(ours / against, 3)}
        return {"benchmark": "rollout", "case": f"{name}: {case}", **numbers, "unit": unit}

    one = 0.0
    if {"start", "replicas"} & set(cases):
        with system(model, flags) as running:
            ready_s = running.start_replica()
            if "start" in cases:
                first_s = ready_s + _first_token_s(running)
                print(f"{name}: first token {first_s:.1f} s after the process began: {_phases(running)}")
                yield claim("start", first_s, ready_s, "s to the first token, and to readiness")
            if "replicas" in cases:
                running.run(NUM_WARM_UP)
                one = statistics.median(model.num_multi / running.run(model.num_multi)[2] for _ in range(NUM_ROUNDS))
    if {"single", "multi", "idle", "replicas"} & set(cases):
        with system(model, flags, replicas=REPLICAS) as running:
            running.start_replicas(REPLICAS)
            if "replicas" in cases:
                two = statistics.median(model.num_multi / running.run(model.num_multi)[2] for _ in range(NUM_ROUNDS))
                yield claim(f"{REPLICAS} replicas against one", two, one, "dialogues/s")
            if {"single", "multi", "idle"} & set(cases):
                yield from _against_bare(name, model, running, claim, cases)


def _against_bare(
    name: str, model: Model, running: System, claim: Callable[..., dict[str, Any]], cases: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Ours and the reference by turns, several rounds: these machines are shared, and minutes differ."""
    bare = Reference(running, num_seqs=model.num_seqs)
    rates: dict[str, list[tuple[float, float]]] = {"single": [], "multi": []}
    idle_s = multi_s = 0.0
    try:
        for _ in range(NUM_ROUNDS):
            if "single" in cases:
                tasks, found, seconds = running.run(model.num_single, max_attempts=1)
                tokens = sum(int(trajectory.action_mask.sum()) for trajectory in found)
                rates["single"].append((tokens / seconds, tokens / bare.seconds("single", tasks, found)))
                print(f"{name}: single, tokens/s: ours {rates['single'][-1][0]:.0f}, bare {rates['single'][-1][1]:.0f}")
            if {"multi", "idle"} & set(cases):
                before = running.metrics()
                tasks, found, seconds = running.run(model.num_multi)
                counted = {key: value - before.get(key, 0.0) for key, value in running.metrics().items()}
                _describe(name, found, seconds, counted)
                idle_s += counted.get('multiattempt_rollout_engine_idle_seconds_total{because="grading"}', 0.0)
                multi_s += seconds * REPLICAS
                rates["multi"].append((len(found) / seconds, len(found) / bare.seconds("chunks", tasks, found)))
                print(f"{name}: multi, dialogues/s: ours {rates['multi'][-1][0]:.2f}, bare {rates['multi'][-1][1]:.2f}")
    finally:
        bare.stop()
    for case, unit in (("single", "tokens/s"), ("multi", "dialogues/s")):
        if rates[case]:
            yield claim(f"{case} attempt", *(statistics.median(side) for side in zip(*rates[case], strict=True)), unit)
    if multi_s:
        yield claim("engine idle for verdicts", idle_s / multi_s, 0.03, "share of time")


def _with_attempts(task: Task, max_attempts: int) -> Task:
    from msgspec.structs import replace

    return replace(task, max_attempts=max_attempts)


def _planned(tokenizer: Any, task: Task, trajectory: Trajectory) -> dict[str, Any]:
    """For `lockstep.Planned`."""
    ends = [0] + [attempt.end for attempt in trajectory.attempts]
    ids = trajectory.token_ids.tolist()
    return {
        "spliced": [ids[end : attempt.start] for end, attempt in zip(ends[:-1], trajectory.attempts, strict=True)],
        "lengths": [attempt.end - attempt.start for attempt in trajectory.attempts],
        "texts": [tokenizer.decode(ids[attempt.start : attempt.end]) for attempt in trajectory.attempts],
        "gold": list(task.gold),
    }


def _describe(name: str, found: Sequence[Trajectory], seconds: float, counted: dict[str, float]) -> None:
    attempts = [attempt for trajectory in found for attempt in trajectory.attempts]
    tokens = sum(attempt.end - attempt.start for attempt in attempts)
    prompts, cached = (counted[f"multiattempt_rollout_prompt_tokens{part}_total"] for part in ("", "_cached"))
    print(
        f"{name}: {len(found)} dialogues in {seconds:.1f} s, {len(attempts) / len(found):.2f} attempts each, "
        f"{tokens / len(attempts):.1f} tokens an attempt; {cached / max(prompts, 1):.0%} of prompt tokens from the "
        f"prefix cache, {counted['multiattempt_rollout_preemptions_total']:.0f} preemptions"
    )


def _first_token_s(running: System) -> float:
    """Of a dialogue asked for over HTTP."""
    body = {"problem": "1+2", "gold": ["3"], "stream": True}
    started = time.perf_counter()
    with httpx.stream("POST", f"{running.replicas[0].url}/v1/dialogues", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line in ("event: text", "event: verdict"):  # tokens without a text are not told
                return time.perf_counter() - started
    raise RuntimeError("the dialogue ended before it began")


def _phases(running: System) -> str:
    """What the replica's log says of its start."""
    log = running.replicas[0].log.read_text().splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]
    [ready] = [line for line in lines if line["msg"] == "replica ready"]
    return ", ".join(f"{phase} {ready[phase]:.1f} s" for phase in ("import", "load", "warm up"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--cases", default="single,multi,idle,replicas,start", help="some of the cases above")
    arguments, flags = parser.parse_known_args()
    names = MODELS if arguments.model == "all" else [arguments.model]
    claims = [claim for name in names for claim in measure(name, flags, arguments.cases.split(","))]
    for claim in claims:
        print(json.dumps(claim))


if __name__ == "__main__":
    main()
