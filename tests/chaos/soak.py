"""Kills the services of one run, again and again, and says what that cost: `make soak`.

A round aims one kill of each service at a moment of a weight transfer or a checkpoint, further ones at any moment,
also of services that are just being started; then it waits until everything works again, and audits. The seed chooses
who dies when.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from live_run import Line, LiveRun, live_run

SYNC = tuple(f"publish: {phase}" for phase in ("pack", "form", "prepare", "commit"))
CHECKPOINT = ("checkpoint: close the books", "checkpoint: copy", "checkpoint: acknowledge")
FILES = {  # further moments of a checkpoint, seen on the disk
    "checkpoint: write": "checkpoints/.partial-*/actor",
    "checkpoint: flush": "checkpoints/.partial-*/manifest.json",
    "checkpoint: renamed": "checkpoints/v*/manifest.json",
}
PARTS = ("all", "all", "leader", "child")
ANY = "any"
STARTING = "starting"
MOMENTS = (*SYNC, *CHECKPOINT, *FILES, "train", ANY)
ORDER = ("redis", "grader", "rollout", "learner")
AIM_S = 15.0  # a moment that does not come within this is not waited for
SPREAD_S = (0.0, 0.0, 0.01, 0.03, 0.08)  # after the moment has begun
QUIET_S = 240.0


@dataclass
class Findings:
    """What the run has to show."""

    audits: list[Line] = field(default_factory=list)
    seconds: float = 0.0


class Killer:
    """Kills as the seed says, until there have been `total`."""

    def __init__(self, run: LiveRun, *, total: int, seed: int) -> None:
        self._run, self._total, self._chance = run, total, random.Random(seed)
        self._moments = {service: self._shuffled(MOMENTS) for service in ORDER}
        self._replicas = itertools.cycle(name for name in run.services if name.startswith("rollout"))

    @property
    def left(self) -> int:
        return self._total - len(self._run.kills)

    def round(self) -> None:
        """About eight kills; the learner's comes last of the aimed ones, so that each life of it has advanced."""
        run, chance = self._run, self._chance
        replica, other = next(self._replicas), next(self._replicas)
        next(self._replicas)
        self._aimed("rollout", replica)
        self._random("grader")
        self._aimed("redis", "redis")
        if chance.random() < 0.25:  # everything at once
            self._await(next(self._moments["learner"]))
            for service in ("redis", "grader", other, "learner"):
                self._kill(service, "all at once")
        else:
            self._aimed("learner", "learner")
        self._random("grader")
        self._random("redis")
        if chance.random() < 0.5:
            time.sleep(chance.uniform(1, 6))
            self._kill(chance.choice((replica, other, "learner")), STARTING)
        run.until_up()

    def _aimed(self, kind: str, service: str) -> None:
        self._run.until_up(service)
        moment = next(self._moments[kind])
        self._kill(service, moment if self._await(moment) else f"{moment} (missed)")

    def _random(self, service: str) -> None:
        self._run.until_up(service)
        time.sleep(self._chance.uniform(0, 2))
        self._kill(service, ANY)

    def _await(self, moment: str) -> bool:
        if moment == ANY:
            time.sleep(self._chance.uniform(0, 3))
            return True
        came = self._run.await_file(FILES[moment], AIM_S) if moment in FILES else self._run.await_phase(moment, AIM_S)
        if came and moment not in FILES:
            time.sleep(self._chance.choice(SPREAD_S))
        return came

    def _kill(self, service: str, moment: str) -> None:
        if self.left > 0:
            self._run.kill(service, moment, part=self._chance.choice(PARTS))

    def _shuffled(self, moments: tuple[str, ...]) -> Iterator[str]:
        while True:
            yield from self._chance.sample(moments, len(moments))


def soak(run: LiveRun, *, kills: int, seed: int, say: bool = False) -> Findings:
    """Kill until there have been `kills`. Raises AssertionError as soon as something does not hold."""
    found, started = Findings(), time.monotonic()
    run.until_up()
    run.until_durable(2)
    killer = Killer(run, total=kills, seed=seed)
    while killer.left > 0:
        before = run.durable()
        killer.round()
        run.until_durable(before + 2)
        found.audits.append(audited(run))
        if say:
            sys.stdout.write(f"[{time.monotonic() - started:5.0f} s] {len(run.kills)} kills, version {run.durable()}\n")
            sys.stdout.flush()
    replicas_agree(run)
    found.seconds = time.monotonic() - started
    return found


def audited(run: LiveRun) -> Line:
    """A clean audit. There may be none as long as the learner has not looked at a Redis that was restarted."""
    deadline = time.monotonic() + QUIET_S
    while not (audit := run.audit())["clean"]:
        assert time.monotonic() < deadline, audit
        time.sleep(1)
    return audit


def replicas_agree(run: LiveRun) -> None:
    """All replicas come to hold one version, under one fingerprint."""
    names = [name for name in run.services if name.startswith("rollout")]

    def agree() -> bool:
        held = [run.weights(name) for name in names]
        if any(one is None for one in held) or len({one["version"] for one in held if one}) > 1:
            return False  # between two versions
        assert len({one["digest"] for one in held if one}) == 1, held
        return True

    run.until(agree, what="one version in all replicas", timeout_s=QUIET_S)


def lives_are_monotone(lines: list[Line]) -> int:
    """Each learner goes on from the newest checkpoint there was, one version at a time. Returns how many learners."""
    lives, version, durable = 0, 0, 0
    for line in lines:
        if line["msg"] == "learner started":
            lives, version = lives + 1, line["version"]
            assert version >= durable, (line, durable)
        elif line["msg"] == "step":
            assert line["step"] == version + 1, (line["step"], version)
            version += 1
        elif line.get("phase") == "checkpoint: acknowledge":
            assert line["version"] >= durable, (line, durable)
            durable = line["version"]
    return lives


def trained_once(run: LiveRun) -> dict[str, int]:
    """The books of the last checkpoint, read by hand: full batches, no task in two. Returns the counts."""
    manifest = max((run.folder / "checkpoints").glob("v*/manifest.json"))
    trained = json.loads(manifest.read_text())["books"]["trained"]
    tasks = [task for step in trained.values() for task in numbers(step)]
    batch = run.config.learner.batch_dialogues
    assert {step: len(numbers(text)) for step, text in trained.items()} == dict.fromkeys(trained, batch)
    assert list(map(int, trained)) == list(range(1, len(trained) + 1))
    return {"trained": len(tasks), "twice": len(tasks) - len(set(tasks)), "steps": len(trained)}


def numbers(text: str) -> list[int]:
    ends = [part.split("-") for part in text.split(",")]
    return [task for first, *last in ends for task in range(int(first), int(last[0] if last else first) + 1)]


def table(run: LiveRun, found: Findings, final: Line) -> str:
    """For people, in Markdown."""
    rows = ["| service | kills | of them while starting | recovery s, median | worst |", "|---|---:|---:|---:|---:|"]
    for kind in ORDER:
        kills = [kill for kill in run.kills if kill.service.startswith(kind)]
        seconds = [
            outage.ended - outage.began
            for service, outages in run.outages.items()
            if service.startswith(kind)
            for outage in outages
            if outage.ended is not None
        ]
        starting = sum(not kill.was_up for kill in kills)
        middle = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("-", "-")
        rows.append(f"| {kind} | {len(kills)} | {starting} | {middle[0]} | {middle[1]} |")
    books = trained_once(run)
    steps = run.steps()
    dropped = [step["publish_s"] for step in steps if step.get("replicas_dropped")]
    whole = [step["publish_s"] for step in steps if step.get("replicas_dropped") == 0 and "publish_s" in step]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times(steps))]
    facts = {
        "kills": len(run.kills),
        "lost (tasks in no state)": len(final["unaccounted"]),
        "twice (tasks trained twice)": books["twice"],
        "tasks in several states": len(final["conflicts"]),
        "audits, all clean": len(found.audits) + 1,
        "tasks issued": final["issued"],
        "tasks trained": books["trained"],
        "policy updates in the last checkpoint": books["steps"],
        "policy updates done, those done again included": len(steps),
        "learners started": lives_are_monotone(run.lines()),
        "dropped": final["dropped"],
        "longest time between two policy updates, s": f"{max(gaps):.1f}",
        "minutes": f"{found.seconds / 60:.1f}",
        "publish s, median of steps without a death": f"{statistics.median(whole):.2f}",
    }
    if dropped:
        facts["publish s, steps in which a replica died"] = (
            f"median {statistics.median(dropped):.2f}, worst {max(dropped):.2f} (n = {len(dropped)})"
        )
    return "\n".join([*rows, "", *(f"- {name}: {value}" for name, value in facts.items()), "", *moments(run)])


def moments(run: LiveRun) -> list[str]:
    """When whom."""
    counts = Counter((kill.moment, kill.service.partition("-")[0]) for kill in run.kills)
    rows = [f"| moment | {' | '.join(ORDER)} |", "|---|---:|---:|---:|---:|"]
    for moment in sorted({moment for moment, _ in counts}):
        rows.append(f"| {moment} | {' | '.join(str(counts[moment, service] or '') for service in ORDER)} |")
    return rows


def times(lines: list[Line]) -> list[float]:
    return [datetime.fromisoformat(line["ts"]).timestamp() for line in lines]


def digests_agree(run: LiveRun) -> tuple[int, int]:
    """Within one learner's life a version has one fingerprint in all replicas.

    Returns how many versions were published in several lives out of the same batches since the checkpoint before them,
    and of how many of these all bytes were the same. (A Redis that lost its last second of writes leads to others.)
    """
    starts = times([line for line in run.lines() if line["msg"] == "learner started"])
    by_life: dict[tuple[int, int], set[str]] = {}
    for loaded_at, _, version, digest in run.digests:
        life = sum(start <= loaded_at + 1.0 for start in starts)
        by_life.setdefault((life, version), set()).add(digest)
    mixed = {key: found for key, found in by_life.items() if len(found) > 1}
    assert not mixed, mixed
    batches = batches_of_lives(run.lines())
    by_origin: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for (life, version), found in by_life.items():
        if origin := batches.get((life, version)):
            by_origin.setdefault((version, origin), []).extend(found)
    again = [found for found in by_origin.values() if len(found) > 1]
    return len(again), sum(len(set(found)) == 1 for found in again)


def batches_of_lives(lines: list[Line]) -> dict[tuple[int, int], tuple[str, ...]]:
    """Of each version in each life: the fingerprints of all batches that made it, from the first of the run on."""
    made: dict[int, tuple[str, ...]] = {0: ()}  # by version, in the newest life
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    life = 0
    for line in lines:
        if line["msg"] == "learner started":
            life += 1
        elif line.get("phase") == "train":
            made[line["version"] + 1] = (*made[line["version"]], line["batch"])
            found[life, line["version"] + 1] = made[line["version"] + 1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the run is to be; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="multiattempt-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with live_run(folder, "--rollout.replicas=2") as run:
            found = soak(run, kills=arguments.kills, seed=arguments.seed, say=True)
            code = run.stop()
            assert code == 143, code
            final = run.audit()
            assert final["clean"], final
            sys.stdout.write(table(run, found, final) + "\n")
            again, same = digests_agree(run)
            sys.stdout.write(
                f"- versions made again of the same batches: {again}, of which to the same bytes: {same}\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
