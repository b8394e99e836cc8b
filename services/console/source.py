"""What there is to show of a run: its folder has the steps and dialogues, Redis says who is there now.

Without the folder's metrics (the console runs on another machine) the newest steps come from Redis too.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.contracts.config import ConfigError, RunConfig
from services.contracts.ledger import Ledger
from services.contracts.observations import Observations
from services.contracts.registry import Registry
from services.contracts.samples import (
    FOLDER,
    SampledDialogue,
    SampleSummary,
    read_dialogue,
    read_index,
    step_files,
)
from services.contracts.store import connect, masked
from services.contracts.wire import Verdict, WireError

PATIENCE_S = 1.0
LIVE_S = 1.0  # however many pages are open, Redis is asked this often
RETRY_S = 3.0  # after Redis was not there
KEPT_ROWS = 20_000
NOTICES = 30
LISTED = 200  # dialogues in one list
SECRET_WORDS = ("token", "password", "url")

Row = dict[str, Any]


class Metrics:
    """The rows of metrics.jsonl, as it grows. A learner that resumes cuts rows off: then `generation` goes up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._generations = count(int(time.time()))  # also another one after the console itself was restarted
        self._forget()

    def _forget(self) -> None:
        self.generation = next(self._generations)
        self.rows: list[Row] = []
        self._position, self._last_line = 0, b""

    def refresh(self) -> None:
        """Read what was added. Raises OSError."""
        if not self._path.exists():
            if self.rows:
                self._forget()
            return
        with self._path.open("rb") as file:
            if self._position:
                file.seek(self._position - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._forget()
                    file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):  # it is still being written
                    break
                self._position += len(line)
                self._last_line = line
                self.rows.append(json.loads(line))
        del self.rows[:-KEPT_ROWS]


class Source:
    """config: the run's; folder: where it is. Close it when done."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self._run = config, folder
        self._metrics = Metrics(folder / "metrics.jsonl")
        self._folder = folder / FOLDER
        self._redis: Redis | None = None
        self._live: dict[str, Any] = {}
        self._asked = 0.0
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Disconnect."""
        if self._redis is not None:
            await self._redis.aclose()

    def run(self) -> dict[str, Any]:
        """The run's name, length and settings; secrets and addresses left out."""
        settings = {
            section: {name: value for name, value in values.items() if not any(word in name for word in SECRET_WORDS)}
            for section, values in self.config.model_dump(mode="json").items()
        }
        path = self._run / "metrics.jsonl"
        return {
            "name": self.config.run.name,
            "folder": str(self._run),
            "steps": self.config.run.steps,
            "changed_at": path.stat().st_mtime if path.exists() else None,
            "settings": settings,
        }

    async def steps(self, *, after: int, generation: str) -> dict[str, Any]:
        """Rows of the steps after `after`; all of them for whoever has rows of another generation."""
        await asyncio.to_thread(self._metrics.refresh)
        rows, current = self._metrics.rows, str(self._metrics.generation)
        if not rows and (remote := (await self.live()).get("steps")):
            rows, current = remote, "redis"
        if generation == current and rows and after <= rows[-1]["step"]:
            rows = [row for row in rows if row["step"] > after]
        elif generation == current and rows:  # it has steps that are gone
            current += "+"
        return {"generation": current, "rows": rows}

    async def live(self) -> dict[str, Any]:
        """Who is there now; `is_up` says whether Redis answers, else `reason` why not."""
        async with self._asking:
            is_fresh = time.monotonic() - self._asked < (LIVE_S if self._live.get("is_up") else RETRY_S)
            if not self._live or not is_fresh:
                self._live = {"at": time.time(), **await self._ask()}
                self._asked = time.monotonic()
            return self._live

    async def _ask(self) -> dict[str, Any]:
        url, run = self.config.redis.url, self.config.run.name
        if not url:
            return {"is_up": False, "reason": "its configuration names no Redis."}
        try:
            if self._redis is None:
                self._redis = await connect(url, patience_s=PATIENCE_S, start_patience_s=PATIENCE_S)
            redis = self._redis
            settings = self.config.redis
            ledger = Ledger(redis, run=run, lease_s=settings.lease_s, max_deliveries=settings.max_deliveries)
            registry, seen = Registry(redis, run=run), Observations(redis, run=run)
            found = {
                "is_up": True,
                "version": await registry.version(),
                "replicas": msgspec.to_builtins(await registry.replicas()),
                "depth": (await ledger.depth())._asdict(),
                "vitals": msgspec.to_builtins(await seen.vitals()),
                "notices": msgspec.to_builtins(await seen.notices(NOTICES)),
            }
            return found if self._metrics.rows else found | {"steps": await seen.steps()}
        except (ConfigError, RedisError) as error:
            return {"is_up": False, "reason": f"no Redis answers at {masked(url)} ({type(error).__name__})."}
        except (WireError, msgspec.MsgspecError) as error:
            return {"is_up": False, "reason": f"Redis holds data of another version of this program: {error}."}

    def dialogues(self, *, step: int | None, outcome: str, text: str) -> dict[str, Any]:
        """The newest dialogues that fit, newest step first; the steps that have any. Raises SampleError, OSError."""
        files = step_files(self._folder)
        steps = list(files)
        wanted = reversed(steps) if step is None else [step] if step in files else []
        found: list[SampleSummary] = []
        for dialogue in self._summaries([files[number] for number in wanted]):
            if _fits(dialogue, outcome=outcome, text=text):
                if len(found) == LISTED:
                    return {"dialogues": found, "steps": steps, "is_more": True, "reason": ""}
                found.append(dialogue)
        return {"dialogues": found, "steps": steps, "is_more": False, "reason": "" if steps else self._why_none()}

    def dialogue(self, step: int, task_id: int) -> SampledDialogue | None:
        """One of them, in full; None when it is not kept. Raises SampleError, OSError."""
        path = step_files(self._folder).get(step)
        return None if path is None else read_dialogue(path, task_id)

    def _summaries(self, paths: list[Path]) -> Iterator[SampleSummary]:
        for path in paths:
            try:
                yield from _index(path, path.stat().st_mtime_ns)
            except FileNotFoundError:  # it was thinned out in this moment
                continue

    def _why_none(self) -> str:
        if not self.config.learner.dialogues_kept:
            return "This run keeps no dialogues: learner.dialogues_kept is 0."
        if not self._run.is_dir():
            return f"The run's folder {self._run} is not on this machine: dialogues are kept there."
        return "No dialogues yet. Some of each policy update are kept; the first come with the first update."


@lru_cache(maxsize=4096)
def _index(path: Path, changed_at: int) -> tuple[SampleSummary, ...]:
    """A file's summaries. changed_at: part of the key, a learner that resumes writes steps anew."""
    return read_index(path).dialogues


def _fits(dialogue: SampleSummary, *, outcome: str, text: str) -> bool:
    if text and text.lower() not in dialogue.problem.lower() and text != str(dialogue.task_id):
        return False
    last = dialogue.verdicts[-1] if dialogue.verdicts else ""
    match outcome:
        case "first":
            return last == Verdict.CORRECT and len(dialogue.verdicts) == 1
        case "later":
            return last == Verdict.CORRECT and len(dialogue.verdicts) > 1
        case "length":
            return dialogue.finish_reason == "length"
        case "":
            return True
        case _:
            return last == outcome
