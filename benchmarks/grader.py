r"""How fast the grader is against math-verify in process, and what hostile answers cost: `make bench-grader`.

One run measures the reference (math-verify on one core) and the real service, started as a process, on the same
responses: gold answers of public test sets (--data; made-up ones where it is missing), each as a response of 200 to
8,000 characters that ends in a right, an unsimplified or a wrong box. No pair comes twice, and the cache is off,
except in the case that measures it. The last lines printed are one JSON object per claim.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contracts.config import RunConfig, to_toml_dict
from services.contracts.settings import GraderSection
from services.grader.answer import extract
from tests import hostile_inputs

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 2, 8, 64)
SHORT_CHARS, LONG_CHARS = 200, 8_000
VERY_LONG_CHARS = 128_000
HOSTILE_SHARE = 0.05
HOSTILE_CLIENTS = 16
NUM_WARM_UP = 100
NUM_CACHED_PAIRS = 4_000
NUM_LONG = 40
SOAK_BATCH = 2_000
START_TIMEOUT_S = 120.0
REPLY_TIMEOUT_S = 120.0
_WORDS = (
    "We are given that", r"$a_{1} = 3$ and $a_{2} = 7$,", "so by substitution", r"$\frac{x^2-1}{x-1} = x+1$.", "Next,",
    r"\[ \int_0^1 2x \, dx = 1, \]", "which simplifies.", "Hence the total is", r"$3 \cdot 14 = 42$.", "Now consider",
    "the remaining case.", "Let $n$ be the number of", "possible choices;", r"then $\binom{n}{2} = 15$.", "Therefore",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """A response and its gold answer."""

    response: str
    gold: str

    def body(self) -> dict[str, str]:
        return {"response": self.response, "gold": self.gold}


@dataclass(frozen=True, slots=True)
class Reply:
    """One graded request: when it was sent and answered, and the item's own time as the service gives it."""

    verdict: str
    sent_ms: float
    answered_ms: float
    own_ms: float
    is_hostile: bool = False

    @property
    def latency_ms(self) -> float:
        return self.answered_ms - self.sent_ms

    @property
    def started_ms(self) -> float:
        """When a worker began it, had the answer no way to travel."""
        return self.answered_ms - self.own_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of test sets")
    parser.add_argument("--items", type=int, default=1_000, help="responses per case")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the service")
    parser.add_argument("--soak", type=int, default=0, help="then grade so many, and print the service's memory")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pairs = make_pairs(read_golds(arguments.data), arguments.items)
    if arguments.reference:
        print(measure_reference(pairs))
        return
    claims = asyncio.run(_measure(pairs, arguments))
    print()
    for claim in claims:
        print(json.dumps({"benchmark": "grader", **claim}))


async def _measure(pairs: Sequence[Pair], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    workers: int = arguments.workers
    claims: list[dict[str, Any]] = []

    def claim(case: str, ours: float, reference: float, ratio: float, unit: str) -> None:
        numbers = {
            name: float(f"{value:.4g}") for name, value in (("ours", ours), ("reference", reference), ("ratio", ratio))
        }
        claims.append({"case": case, **numbers, "unit": unit})

    reference = workers * reference_rate(arguments)
    print(f"math-verify in process: {reference / workers:.0f} items/s on one core, {reference:.0f} on {workers}")
    for clients in CLIENTS:
        async with fresh_service(pairs, workers=workers) as grader:
            rate, replies = await grader.singles(pairs, clients=clients)
        words, added = describe_latency(replies, workers=workers)
        print(f"{clients:3d} clients: {rate:5.0f} items/s; {words}")
        claim(f"single requests, {clients} clients, no cache", rate, reference, rate / reference, "items/s")
        claim(f"p99 above own time and queue, {clients} clients", added, 50.0, added / 50.0, "ms")
    async with fresh_service(pairs, workers=workers) as grader:
        print(f"start-up until {workers} workers have each answered an item: {grader.start_s:.2f} s")
        started = time.perf_counter()
        await grader.batch(pairs)
        rate = len(pairs) / (time.perf_counter() - started)
        print(f"one batch of {len(pairs)}: {rate:.0f} items/s")
        claim("one batch, no cache", rate, reference, rate / reference, "items/s")
        await _measure_long(grader, pairs, claim)
    await _measure_hostile(pairs, workers, claim)
    with service(workers=workers) as grader:
        await _measure_cached(grader, pairs, claim)
        if arguments.soak:
            await _soak(grader, pairs, arguments.soak)
    return claims


Claim = Callable[[str, float, float, float, str], None]


async def _measure_hostile(pairs: Sequence[Pair], workers: int, claim: Claim) -> None:
    """The rate of clean items alone, with and without hostile ones among them, from the same number of clients."""
    inputs = [Pair(h.response, h.gold) for h in hostile_inputs.AS_ANSWER + hostile_inputs.AS_RESPONSE]
    num_hostile = math.ceil(len(pairs) * HOSTILE_SHARE / (1 - HOSTILE_SHARE))
    drawn = random.Random(5).sample(inputs, num_hostile)
    async with fresh_service(pairs, workers=workers) as grader:
        clean, _ = await grader.singles(pairs, clients=HOSTILE_CLIENTS)
    async with fresh_service(pairs, workers=workers) as grader:
        mixed, replies = await grader.singles(pairs, clients=HOSTILE_CLIENTS, hostile=drawn)
    bad = [reply for reply in replies if reply.is_hostile]
    num_timeouts = sum(reply.verdict == "timeout" for reply in bad)
    print(f"with {num_hostile} hostile items among {len(pairs)}: {mixed:.0f} clean items/s, without {clean:.0f}; "
          f"{num_timeouts} of them timed out; each took {statistics.mean(reply.own_ms for reply in bad):.0f} ms, "
          f"at most {max(reply.own_ms for reply in bad):.0f}")  # fmt: skip
    claim("clean items while 5 % are hostile", mixed, clean, mixed / clean, "items/s")


async def _measure_long(grader: "Grader", pairs: Sequence[Pair], claim: Claim) -> None:
    chosen = [pair for pair in pairs if len(pair.response) < 1_000][:NUM_LONG]
    long = [Pair(_pad(pair.response, VERY_LONG_CHARS, random.Random(7)), pair.gold) for pair in chosen]
    _, replies = await grader.singles(chosen, clients=1)
    _, long_replies = await grader.singles(long, clients=1)
    short_ms, long_ms = (statistics.median(reply.latency_ms for reply in each) for each in (replies, long_replies))
    print(f"the same answers in {VERY_LONG_CHARS:,} characters: median {long_ms:.1f} ms, in few {short_ms:.1f} ms")
    claim("128k characters above the short response", long_ms - short_ms, 10.0, (long_ms - short_ms) / 10.0, "ms")


async def _measure_cached(grader: "Grader", pairs: Sequence[Pair], claim: Claim) -> None:
    chosen = [pair for pair in pairs if len(pair.response) < 2_000][:100]
    repeated = (chosen * math.ceil(NUM_CACHED_PAIRS / len(chosen)))[:NUM_CACHED_PAIRS]
    await grader.batch(chosen)
    started = time.perf_counter()
    results = await grader.batch(repeated)
    rate = len(results) / (time.perf_counter() - started)
    hits = sum(result["cached"] for result in results)
    print(f"repeated pairs, one batch of {len(results)}: {rate:.0f} items/s, {hits} from the cache")
    claim("repeated pairs, batch route", rate, 3_000, rate / 3_000, "items/s")


async def _soak(grader: "Grader", pairs: Sequence[Pair], num_items: int) -> None:
    before, graded, started = grader.memory_mb(), 0, time.perf_counter()
    rng = random.Random(11)
    while graded < num_items:
        some = [Pair(f"So \\boxed{{{extract(pair.response)}+{rng.randrange(10**6)}}}", pair.gold) for pair in
                rng.choices(pairs, k=min(SOAK_BATCH, num_items - graded))]  # fmt: skip
        graded += len(await grader.batch(some))
    took_s = time.perf_counter() - started
    print(
        f"memory at the start (MB): {before}\nmemory after {graded:,} gradings in {took_s:.0f} s: {grader.memory_mb()}"
    )


def read_golds(folder: Path) -> list[str]:
    """Gold answers of the test sets that are in `folder`, in a fixed random order; made up where there is none."""
    golds: list[str] = []
    for name in ("math500", "olympiadbench", "gsm8k", "amc23", "minerva_math", "svamp"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        golds += [gold for gold in map(_gold, rows[:500]) if gold]
    if not golds:
        golds = [rf"\frac{{{n}}}{{{n % 7 + 2}}}" if n % 3 else f"{n}x+{n % 5}" for n in range(1, 2_000)]
    random.Random(1).shuffle(golds)
    return golds


def _gold(row: dict[str, Any]) -> str | None:
    if "final_answer" in row:  # OlympiadBench
        return str(row["final_answer"][0]).strip("$ ") if row["final_answer"] else None
    if "answer" in row:
        return str(row["answer"]).rpartition("####")[2].strip()
    return extract(row["solution"]) if "solution" in row else str(row.get("Answer", ""))


def make_pairs(golds: Sequence[str], num_pairs: int) -> list[Pair]:
    """Responses to `golds`: half right, a quarter right and unsimplified, a quarter wrong; lengths log-uniform."""
    rng = random.Random(2)
    pairs = []
    for index in range(num_pairs):
        gold, kind = golds[index % len(golds)], rng.random()
        answer = gold if kind < 0.5 else _unsimplified(gold, rng) if kind < 0.75 else _wrong(gold, golds, rng)
        if index >= len(golds):  # a second round: another pair
            answer = f"{answer}+{index}"
        length = int(math.exp(rng.uniform(math.log(SHORT_CHARS), math.log(LONG_CHARS))))
        pairs.append(Pair(_pad(f"So the answer is $\\boxed{{{answer}}}$.", length, rng), gold))
    return pairs


def _unsimplified(gold: str, rng: random.Random) -> str:
    if re.fullmatch(r"-?[0-9]+", gold):
        factor = rng.randint(2, 9)
        return rng.choice(
            [rf"\frac{{{int(gold) * factor}}}{{{factor}}}", f"{gold}.0", f"{int(gold) - factor}+{factor}"]
        )
    if r"\frac" in gold:
        return gold.replace(r"\frac", r"\dfrac")
    return rng.choice([rf"\left({gold}\right)", f"x = {gold}", f"{gold}+0"])


def _wrong(gold: str, golds: Sequence[str], rng: random.Random) -> str:
    if re.fullmatch(r"-?[0-9]+", gold):
        return str(int(gold) + rng.choice([-10, -1, 1, 2]))
    return rng.choice([rng.choice(golds), f"{gold}+1", f"-({gold})"])


def _pad(ending: str, num_chars: int, rng: random.Random) -> str:
    parts, length = [], len(ending)
    while length < num_chars:
        parts.append(rng.choice(_WORDS))
        length += len(parts[-1]) + 1
    return " ".join([*parts, ending])


def reference_rate(arguments: argparse.Namespace) -> float:
    """Items per second of math-verify with its defaults, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.grader", "--reference", "--data", str(arguments.data)]
    done = subprocess.run(
        [*command, "--items", str(arguments.items)], cwd=ROOT, check=True, capture_output=True, timeout=1_200
    )
    return float(done.stdout.split()[-1])


def measure_reference(pairs: Sequence[Pair]) -> float:
    from math_verify import parse, verify

    verify(parse("$x+1$"), parse(r"\boxed{1+x}"))
    started = time.perf_counter()
    for pair in pairs:
        verify(parse(f"${pair.gold}$"), parse(pair.response))
    return len(pairs) / (time.perf_counter() - started)


def describe_latency(replies: Sequence[Reply], *, workers: int) -> tuple[str, float]:
    """The percentiles in words, and the 99th of what is neither own time nor queue.

    Queue: what the workers did for others while a request waited for one of them. That much no service can avoid; the
    rest is what this one adds.
    """
    latency = sorted(reply.latency_ms for reply in replies)
    queue = [_waited_ms(reply, replies, workers=workers) for reply in replies]
    added = sorted(reply.latency_ms - reply.own_ms - ms for reply, ms in zip(replies, queue, strict=True))
    own = sorted(reply.own_ms for reply in replies)
    text = (
        f"p50 {_percentile(latency, 50):.1f}, p99 {_percentile(latency, 99):.1f} ms; own time p99 "
        f"{_percentile(own, 99):.1f}; queue p99 {_percentile(sorted(queue), 99):.1f}; added p50 "
        f"{_percentile(added, 50):.1f}, p99 {_percentile(added, 99):.1f}"
    )
    return text, _percentile(added, 99)


def _waited_ms(reply: Reply, replies: Sequence[Reply], *, workers: int) -> float:
    """How long the workers were busy with other items between the sending of one and its start, on the mean."""
    shared = (
        min(other.answered_ms, reply.started_ms) - max(other.started_ms, reply.sent_ms)
        for other in replies
        if other is not reply and other.answered_ms > reply.sent_ms and other.started_ms < reply.started_ms
    )
    return sum(ms for ms in shared if ms > 0) / workers


def _percentile(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True)
class Grader:
    """The service as a process."""

    process: subprocess.Popen[bytes]
    port: int
    start_s: float

    async def singles(
        self, pairs: Sequence[Pair], *, clients: int, hostile: Sequence[Pair] = ()
    ) -> tuple[float, list[Reply]]:
        """Grade each pair in a request of its own. Gives clean items per second, and every reply."""
        work = [(pair, False) for pair in pairs] + [(pair, True) for pair in hostile]
        random.Random(3).shuffle(work)
        bodies = iter([(_request("/v1/grade", pair.body()), is_hostile) for pair, is_hostile in work])
        replies: list[Reply] = []

        async def client() -> None:
            connection = await _Connection.open(self.port)
            for body, is_hostile in bodies:
                sent_ms = time.perf_counter() * 1000.0
                result = await connection.post(body)
                answered_ms = time.perf_counter() * 1000.0
                replies.append(Reply(result["verdict"], sent_ms, answered_ms, result["elapsed_ms"], is_hostile))
            connection.close()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return len(pairs) / (time.perf_counter() - started), replies

    async def batch(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        connection = await _Connection.open(self.port)
        result = await connection.post(_request("/v1/grade/batch", {"items": [pair.body() for pair in pairs]}))
        connection.close()
        return list(result["results"])

    def memory_mb(self) -> dict[str, int]:
        """Resident and proportional memory of the process, the fork server and the workers."""
        pids, found = [self.process.pid], []
        while pids:
            pid = pids.pop()
            found.append(pid)
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        fields = [line.split() for pid in found for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
        return {
            "processes": len(found),
            "parent resident": _kilobytes([line.split() for line in
                Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()], "Rss:") // 1024,
            "resident": _kilobytes(fields, "Rss:") // 1024,
            "proportional": _kilobytes(fields, "Pss:") // 1024,
        }  # fmt: skip


def _kilobytes(fields: Sequence[Sequence[str]], name: str) -> int:
    return sum(int(field[1]) for field in fields if field[0] == name)


class _Connection:
    """HTTP/1.1 with keep-alive and nothing more: a full client would take the cores that are being measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "_Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20))

    async def post(self, request: bytes) -> dict[str, Any]:
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: ([0-9]+)", head.lower())
            assert head.startswith(b"HTTP/1.1 200") and length, head
            return dict(json.loads(await self._reader.readexactly(int(length.group(1)))))

    def close(self) -> None:
        self._writer.close()


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    return f"{head}\r\n\r\n".encode() + content


@asynccontextmanager
async def fresh_service(pairs: Sequence[Pair], *, workers: int) -> AsyncIterator[Grader]:
    """A service of its own for one case, its cache off: nothing of the others is in its workers' memory."""
    with service(workers=workers, cache_items=0) as grader:
        await grader.batch([Pair(pair.response, f"{pair.gold}+{n}") for n, pair in enumerate(pairs[:NUM_WARM_UP])])
        yield grader


@contextmanager
def service(**settings: Any) -> Iterator[Grader]:
    """The grader with these settings, all its workers warm."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(to_toml_dict(RunConfig(grader=GraderSection(port=port, **settings)))))
        log = (Path(folder) / "grader.log").open("wb")
        started = time.perf_counter()
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.grader", "--config", str(config)], stderr=log, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            try:
                _wait_complete(port, settings["workers"])
                yield Grader(process, port, time.perf_counter() - started)
                process.send_signal(signal.SIGTERM)
                process.wait(30)
            finally:
                process.kill()
                process.wait(30)


def _wait_complete(port: int, workers: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    wanted = b"multiattempt_grader_workers_ready %d.0" % workers
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                reply = b"".join(iter(lambda: connection.recv(65_536), b""))
        except OSError:
            reply = b""
        if wanted in reply:
            return
        time.sleep(0.02)
    raise TimeoutError(f"the grader is not ready after {START_TIMEOUT_S:g} s")


if __name__ == "__main__":
    main()
