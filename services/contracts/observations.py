"""What a run tells people while it goes on, in Redis: figures of its steps, vital signs of its processes, warnings.

    ma:{run}:seen:steps            sorted set, by step: the figures of the newest KEPT_STEPS, as JSON
    ma:{run}:seen:notices          list, newest first: the last KEPT_NOTICES warnings and errors of all processes
    ma:{run}:seen:vitals:NAME      how process NAME is; expires when it falls silent

Nothing here is needed for training: what is lost is only not seen. Writers use a `Reporter`, which never raises and
never makes them wait; readers are `multiattempt status` and the console.
"""

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.contracts.ledger import run_prefix
from services.contracts.telemetry import Context

KEPT_STEPS = 1000
KEPT_NOTICES = 100
MAX_NOTICE_CHARS = 500
PERIOD_S = 1.0
EXPIRY_S = 10.0  # of vital signs
CLOSE_S = 2.0
PENDING = 64  # of each kind, while Redis is away

Figure = float | str | None

log = logging.getLogger(__name__)


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One warning or error."""

    at: float  # Unix time, seconds
    name: str  # of the process
    level: str
    message: str
    task_id: int | None = None


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """How one process is. What the figures are is its own business; shares are 0 to 1."""

    name: str
    service: str
    at: float  # Unix time, seconds
    figures: dict[str, Figure]


_encoder = msgspec.json.Encoder()
_notice_decoder = msgspec.json.Decoder(Notice)
_vitals_decoder = msgspec.json.Decoder(Vitals)


class Observations:
    """One run's. redis: from `store.connect`. Methods raise redis.exceptions.RedisError; all are safe to repeat."""

    def __init__(self, redis: Redis, *, run: str) -> None:
        prefix = f"{run_prefix(run)}seen:"
        self._redis = redis
        self._steps, self._notices, self._names = f"{prefix}steps", f"{prefix}notices", f"{prefix}names"
        self._vitals = f"{prefix}vitals:"

    async def add_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the figures of a step, in place of what it had; one that is not finite becomes null."""
        row: dict[str, float | None] = {"step": step}
        row |= {name: float(f"{value:.7g}") if math.isfinite(value) else None for name, value in figures.items()}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(self._steps, step, step)
            pipe.zadd(self._steps, {json.dumps(row): step})
            pipe.zremrangebyrank(self._steps, 0, -KEPT_STEPS - 1)
            await pipe.execute()

    async def forget_steps_after(self, step: int) -> None:
        """They will be done again."""
        await self._redis.zremrangebyscore(self._steps, f"({step}", "+inf")

    async def steps(self, count: int = KEPT_STEPS) -> list[dict[str, Any]]:
        """The newest rows, oldest first, as in metrics.jsonl."""
        rows = cast(list[bytes], await self._redis.zrange(self._steps, -count, -1))
        return [json.loads(row) for row in rows]

    async def add_notices(self, notices: Sequence[Notice]) -> None:
        """Keep them, oldest first."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.lpush(self._notices, *map(_encoder.encode, notices))
            pipe.ltrim(self._notices, 0, KEPT_NOTICES - 1)
            await pipe.execute()

    async def notices(self, count: int = KEPT_NOTICES) -> list[Notice]:
        """The newest, newest first."""
        found = await cast(Awaitable[list[bytes]], self._redis.lrange(self._notices, 0, count - 1))
        return [_notice_decoder.decode(notice) for notice in found]

    async def put_vitals(self, vitals: Vitals) -> None:
        """Say how a process is."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._vitals + vitals.name, _encoder.encode(vitals), px=round(EXPIRY_S * 1000))
            pipe.sadd(self._names, vitals.name)
            await pipe.execute()

    async def vitals(self) -> list[Vitals]:
        """Of the processes heard of in the last EXPIRY_S, sorted by name."""
        members = await cast(Awaitable[set[bytes]], self._redis.smembers(self._names))
        names = sorted(name.decode() for name in members)
        if not names:
            return []
        found = cast(list[bytes | None], await self._redis.mget([self._vitals + name for name in names]))
        if silent := [name for name, value in zip(names, found, strict=True) if value is None]:
            await self._redis.srem(self._names, *silent)
        return [_vitals_decoder.decode(value) for value in found if value is not None]


class Reporter(logging.Handler):
    """Tells what one process has to say, beside its work. As a logging handler it collects warnings and errors.

    vitals: asked for every PERIOD_S, on the event loop; may raise RedisError. Use as an async context manager.
    """

    def __init__(
        self,
        observations: Observations,
        *,
        name: str,
        service: str,
        vitals: Callable[[], Awaitable[Mapping[str, Figure]]],
    ) -> None:
        super().__init__(level=logging.WARNING)
        self.addFilter(Context())
        self._observations, self._process, self._service, self._ask = observations, name, service, vitals
        self._pending_notices: deque[Notice] = deque(maxlen=PENDING)
        self._pending_steps: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=PENDING)
        self._running: asyncio.Task[None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """A warning was logged, on whatever thread."""
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            message += f": {record.exc_info[1]!r}"
        task_id = getattr(record, "task_id", None)
        self._pending_notices.append(
            Notice(
                at=record.created,
                name=self._process,
                level=record.levelname.lower(),
                message=message[:MAX_NOTICE_CHARS],
                task_id=task_id if isinstance(task_id, int) else None,
            )
        )

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Take the figures of one step."""
        self._pending_steps.append((step, figures))

    def finish(self) -> None:
        """Nothing is left to hand over but what `__aexit__` does."""

    async def __aenter__(self) -> "Reporter":
        logging.getLogger().addHandler(self)
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            what = f"{type(error).__name__}: {error}"
            record = logging.LogRecord(__name__, logging.ERROR, "", 0, f"ends: {what}", None, None)
            self.emit(record)
        logging.getLogger().removeHandler(self)
        assert self._running is not None
        self._running.cancel()
        await asyncio.wait((self._running,))
        flushing = asyncio.create_task(self._flush())
        done, _ = await asyncio.wait((flushing,), timeout=CLOSE_S)
        if done:
            flushing.exception()
        else:
            flushing.cancel()

    async def _run(self) -> None:
        while True:
            try:
                await self._flush()
                figures = dict(await self._ask())
                vitals = Vitals(name=self._process, service=self._service, at=time.time(), figures=figures)
                await self._observations.put_vitals(vitals)
            except RedisError as error:  # it is away: the process itself waits for it or ends, this only goes unseen
                log.debug("nothing is reported", extra={"error": repr(error)})
            await asyncio.sleep(PERIOD_S)

    async def _flush(self) -> None:
        while self._pending_steps:
            step, figures = self._pending_steps[0]
            await self._observations.add_step(step, figures)
            self._pending_steps.popleft()
        if notices := list(self._pending_notices):
            await self._observations.add_notices(notices)
            for _ in notices:
                self._pending_notices.popleft()
