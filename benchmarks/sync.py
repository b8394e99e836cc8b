"""What bringing new weights to the replicas costs: `make bench-sync`.

The learner's publisher, real gloo groups over loopback, replicas as processes of their own. Ours and the reference take
turns, NUM_ROUNDS times, and medians are compared. Cases, for 1 to 4 replicas:

- `transfer`: bytes/s to each replica from the call of `publish` until all have everything and checked it, packing,
  control calls and fingerprints included, against the bare broadcast of the same bytes, in the same buckets and as many
  of them in flight, between as many processes.
- `fingerprint`: what a replica spends on the fingerprint, as a share of the whole sync; must be under 0.05.
- `form`: seconds to form the group anew, against the bare group's.
- `order`: bytes/s with the largest tensors first against the model's own order.

With a real vLLM engine, requests in flight:

- `stall`: the longest wait of a request for its next token around a sync, less its usual one, against the duration of
  the sync. Medians over requests and rounds.

Models have random weights in the shapes of SmolLM2-135M (bf16) and of a tiny Qwen2 (14 M). The last lines are one JSON
object per claim.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.registry import Replica
from services.contracts.weights.communicator import GlooCommunicator, open_store
from services.contracts.weights.protocol import Join
from services.contracts.weights.staging import IN_FLIGHT
from services.learner.arithmetic_model import build_tokenizer
from services.learner.deepspeed_engine import ParamMeta
from services.learner.publish import Publisher, PublishReport
from tests.processes import ROOT, free_port
from tests.transfers import ListRegistry

NUM_ROUNDS = 7
START_S = 180.0
NUM_REQUESTS, NUM_PROMPT, NUM_TOKENS = 8, 64, 160
STALL_ROUNDS = 3
SHAPES = {
    "smollm2": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
        )
    ),
    "tiny": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=49_152, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=2048,
        )
    ),
}  # fmt: skip


class Source:
    """A model's parameters, as the learner has them."""

    def __init__(self, model: torch.nn.Module, *, largest_first: bool = False) -> None:
        self.tensors = [(name, p.detach()) for name, p in model.named_parameters()]
        if largest_first:
            self.tensors.sort(key=lambda one: -one[1].numel())
        self.num_bytes = sum(tensor.nbytes for _, tensor in self.tensors)

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)


class Process:
    """A `sync_replica`."""

    def __init__(self, number: int, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sync_replica", str(self.port), *arguments],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.replica = Replica(
            replica_id=f"replica-{number}", url=self.url, world_size=1, version=0, device="cpu", state="ready",
            pid=self.process.pid, started_at=time.time(),
        )  # fmt: skip

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/ready", timeout=5).raise_for_status()
                return
            except httpx.TransportError:
                time.sleep(0.2)
            if self.process.poll() is not None:
                break
        self.log.seek(0)
        raise RuntimeError(f"the replica did not start: {self.log.read()[-3000:]}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Raw:
    """The bare broadcast to some processes."""

    def __init__(self, processes: list[Process], num_bytes: int, bucket_bytes: int) -> None:
        self._processes, self._bucket = processes, bucket_bytes
        self._data = torch.zeros(num_bytes, dtype=torch.uint8)
        self._store = open_store("127.0.0.1", timeout_s=30)
        self._join = Join(
            generation=1, host="127.0.0.1", port=self._store.port, rank=0, world_size=1 + len(processes),
            transport="gloo", rendezvous_s=30, bucket_s=30,
        )  # fmt: skip
        self._link: GlooCommunicator | None = None

    async def seconds(self, depth: int) -> tuple[float, float]:
        """Of a broadcast with so many buckets in flight, and of forming the group, if it was not there."""
        async with httpx.AsyncClient(timeout=120) as client:
            calls = []
            for rank, process in enumerate(self._processes, 1):
                join = self._join.model_copy(update={"rank": rank}).model_dump()
                body = {"join": join, "num_bytes": self._data.numel(), "bucket": self._bucket, "depth": depth}
                calls.append(asyncio.create_task(client.post(f"{process.url}/raw", json=body)))
            started = time.perf_counter()
            if self._link is None:
                self._link = await asyncio.to_thread(GlooCommunicator, self._store, join=self._join)
            formed = time.perf_counter()
            await asyncio.sleep(0.05)  # all are there
            began = time.perf_counter()
            await asyncio.to_thread(self._send, depth)
            sent = time.perf_counter()
            for answer in await asyncio.gather(*calls):
                answer.raise_for_status()
        return sent - began, formed - started

    def _send(self, depth: int) -> None:
        assert self._link is not None
        flying = []
        for start in range(0, self._data.numel(), self._bucket):
            flying.append(self._link.start(self._data[start : start + self._bucket]))
            if len(flying) > depth:
                flying.pop(0).wait()
        for one in flying:
            one.wait()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


def transfer_s(report: PublishReport) -> float:
    """Until all had everything: packing goes on meanwhile. The group was there."""
    assert not report.dropped, report
    return report.seconds["prepare_s"]


async def timed(publisher: Publisher, version: int) -> tuple[PublishReport, float, float]:
    """A sync: its report, when it began, how long it took."""
    began = time.monotonic()
    report = await publisher.publish(version)
    return report, began, time.monotonic() - began


def claim(case: str, ours: float, reference: float, unit: str) -> dict[str, Any]:
    numbers = {"ours": round(ours, 5), "reference": round(reference, 5), "ratio": round(ours / reference, 3)}
    return {"benchmark": "sync", "case": case, **numbers, "unit": unit}


async def transfers(name: str, model: torch.nn.Module, counts: list[int], config: RunConfig) -> list[dict[str, Any]]:
    """Cases `transfer`, `fingerprint`, `form` and `order`, with receivers alone."""
    claims, source, bucket = [], Source(model), config.weights.bucket_mb << 20
    with replicas(max(counts)) as processes:
        for count in counts:
            used, registry = processes[:count], ListRegistry()
            registry.listed = [process.replica for process in used]
            raw = Raw(used, source.num_bytes, bucket)
            publisher = Publisher(registry, config, source)  # type: ignore[arg-type]
            ours, bare, syncs, marks, formed = [], [], [], [], []
            _, bare_form_s = await raw.seconds(IN_FLIGHT)
            for version in range(1, NUM_ROUNDS + 3):
                report, _, whole_s = await timed(publisher, version)
                if version < 3:  # rooms are made, connections too
                    formed += [report.seconds["form_s"]]
                    publisher._leave()
                    continue
                if version > 3:
                    ours.append(transfer_s(report))
                    syncs.append(whole_s)
                    told = [httpx.get(f"{process.url}/ready").json()["fingerprint_s"] for process in used]
                    marks.append(max(told))
                bare.append(min([(await raw.seconds(depth))[0] for depth in (0, IN_FLIGHT)]))
            await publisher.close()
            raw.close()
            size, label = source.num_bytes / 1e9, f"{name}, {count} replicas"
            print(
                f"{label}: {source.num_bytes / 1e6:.0f} MB in {statistics.median(ours):.3f} s, bare "
                f"{statistics.median(bare):.3f} s; sync {statistics.median(syncs):.3f} s"
            )
            rates = size / statistics.median(ours), size / statistics.median(bare)
            claims.append(claim(f"{label}: transfer", *rates, "GB/s"))
            claims.append(
                claim(f"{label}: fingerprint", statistics.median(marks), statistics.median(syncs), "s, of the sync")
            )
            claims.append(claim(f"{label}: form", min(formed), bare_form_s, "s"))
            for process in used:
                httpx.post(f"{process.url}/reset").raise_for_status()
        claims.append(await order(name, model, processes[:1], config))
    return claims


async def order(name: str, model: torch.nn.Module, used: list[Process], config: RunConfig) -> dict[str, Any]:
    """The two orders by turns."""
    took: dict[bool, list[float]] = {False: [], True: []}
    publishers = {}
    for largest_first in took:
        registry = ListRegistry()
        registry.listed = [process.replica for process in used]
        publishers[largest_first] = Publisher(registry, config, Source(model, largest_first=largest_first))  # type: ignore[arg-type]
    for version in range(1, NUM_ROUNDS + 1):
        for largest_first, publisher in publishers.items():
            publisher._generation += 1000 * version  # the replica was in the other's group
            publisher._leave()
            report, _, _ = await timed(publisher, version)
            took[largest_first].append(transfer_s(report))
    for publisher in publishers.values():
        await publisher.close()
    size = Source(model).num_bytes / 1e9
    rates = [size / statistics.median(seconds) for seconds in (took[True], took[False])]
    return claim(f"{name}: order, largest first against the model's own", *rates, "GB/s")


async def stall(name: str, model: torch.nn.Module, folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Case `stall`, with an engine."""
    path = config.run_dir / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_toml_dict(config)))
    stalls, syncs, registry = [], [], ListRegistry()
    with replicas(1, str(path), str(folder)) as [process]:
        registry.listed = [process.replica]
        publisher = Publisher(registry, config, Source(model))  # type: ignore[arg-type]
        await publisher.publish(1)
        body = {"requests": NUM_REQUESTS, "prompt": NUM_PROMPT, "tokens": NUM_TOKENS}
        async with httpx.AsyncClient(timeout=300) as client:
            await client.post(f"{process.url}/generate", json=body)
            for version in range(2, STALL_ROUNDS + 2):
                running = asyncio.create_task(client.post(f"{process.url}/generate", json=body))
                await asyncio.sleep(1.0)
                _, began, whole_s = await timed(publisher, version)
                gaps, usual = [], []
                for times in (await running).raise_for_status().json():
                    waits = [(b - a, b) for a, b in pairwise(times)]
                    usual.append(statistics.median(wait for wait, _ in waits))
                    gaps.append(max((wait for wait, end in waits if began < end < began + whole_s + 5.0), default=0.0))
                stalls.append(statistics.median(gaps) - statistics.median(usual))
                syncs.append(whole_s)
                swap = httpx.get(f"{process.url}/swaps").json()[-1]
                phases = ", ".join(f"{key} {value:.3f}" for key, value in swap.items())
                print(
                    f"{name}, engine: sync {whole_s:.3f} s ({phases}), longest wait {max(gaps):.3f} s, median of "
                    f"requests {statistics.median(gaps):.3f} s, usual {statistics.median(usual):.3f} s"
                )
        await publisher.close()
    return [
        claim(f"{name}: stall of {NUM_REQUESTS} requests", statistics.median(stalls), statistics.median(syncs), "s")
    ]


@contextmanager
def replicas(count: int, *arguments: str) -> Iterator[list[Process]]:
    """Started and ready."""
    with ExitStack() as stack:
        processes = [Process(number, *arguments) for number in range(count)]
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            process.wait_ready()
        yield processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--cases", default="transfer,stall", help="transfer (with fingerprint, form, order), stall")
    parser.add_argument("--replicas", default="1,2,3,4")
    arguments, flags = parser.parse_known_args()
    claims = []
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as temporary:
        for name in SHAPES if arguments.model == "all" else [arguments.model]:
            torch.manual_seed(0)
            model, folder = SHAPES[name]().to(torch.bfloat16), Path(temporary) / name
            places = [f"--run.dir={temporary}", f"--run.name={name}-run", "--rollout.device=cpu"]
            sizes = ["--model.max_model_len=512", "--rollout.max_num_seqs=16", "--model.dtype=bfloat16"]
            config = load(None, [*places, *sizes, *flags], env={})
            if "transfer" in arguments.cases:
                counts = [int(count) for count in arguments.replicas.split(",")]
                claims += asyncio.run(transfers(name, model, counts, config))
            if "stall" in arguments.cases:
                model.save_pretrained(folder)
                build_tokenizer().save_pretrained(folder)
                claims += asyncio.run(stall(name, model, folder, config))
    for one in claims:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
