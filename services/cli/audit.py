"""`multiattempt audit`: every task that a run issued is in exactly one state, or here is which one is not.

Holds the books in the newest checkpoint against the ledger in Redis. The ledger is read in one step; when a checkpoint
was written meanwhile, both are read again. Of a run that has ended with its embedded Valkey, a copy of the data is
read. Nothing is changed.
"""

import asyncio
import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from services.contracts.books import (
    QUEUED,
    RUNNING,
    WAITING,
    Audit,
    Books,
    examine,
    format_ranges,
    is_trained,
    step_of,
)
from services.contracts.config import ConfigError, RunConfig, load_resolved
from services.contracts.ledger import Ledger
from services.contracts.runs import newest_run, resolved_config
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey
from services.learner.checkpoint import Checkpoints, Manifest

PATIENCE_S = 5.0
TRIES = 20  # a checkpoint was written during each
PAUSE_S = 0.2
SHOWN = 20  # offending tasks in the table; --json has all


async def run_audit(run: Path | None, *, is_json: bool) -> int:
    """Audit the run, the newest when None, and print it. 0: all are accounted for; 1: not, with the offending ids.

    Raises ConfigError, one line, when there is no such run or its Redis does not answer.
    """
    run = run or newest_run()
    config = load_resolved(resolved_config(run))
    try:
        async with _ledger(run, config) as (ledger, is_live):
            manifest, audit = await _audit(run, ledger)
            is_behind = is_live and not audit.is_clean and await ledger.may_lack_writes()
    except RedisError as error:
        raise ConfigError(f"{run}: Redis went away during the audit: {error}") from error
    version = manifest.version if manifest else 0
    print(json.dumps(as_json(run, version, audit)) if is_json else as_table(run, version, audit))
    if is_behind and not is_json:
        print("Redis was restarted, and the learner has not looked at it since: ask again after its present step")
    return 0 if audit.is_clean else 1


def as_json(run: Path, version: int, audit: Audit) -> dict[str, Any]:
    """The audit as plain values, every offending task named."""
    trained = {step_of(state): count for state, count in audit.states.items() if is_trained(state)}
    live = (QUEUED, RUNNING, WAITING)
    return {
        "run": str(run),
        "issued": audit.issued,
        "checkpoint": version,
        **{state.replace(" ", "_"): audit.states.get(state, 0) for state in live},
        "trained": {str(step): trained[step] for step in sorted(trained)},
        "dropped": {
            state: count for state, count in sorted(audit.states.items()) if state not in live and not is_trained(state)
        },
        "leftovers": audit.leftovers,
        "unaccounted": audit.unaccounted,
        "conflicts": {str(task_id): states for task_id, states in audit.conflicts.items()},
        "clean": audit.is_clean,
    }


def as_table(run: Path, version: int, audit: Audit) -> str:
    """The audit for people."""
    found = as_json(run, version, audit)
    trained = found["trained"]
    steps = f", steps {min(map(int, trained))} to {max(map(int, trained))}" if trained else ""
    rows = [(state, audit.states.get(state, 0)) for state in (QUEUED, RUNNING, WAITING)]
    rows.append((f"trained{steps}", sum(trained.values())))
    rows += [(f"dropped: {reason}", count) for reason, count in found["dropped"].items()]
    rows += [("in no state", len(audit.unaccounted)), ("in several states", len(audit.conflicts))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{run}: {audit.issued:,} tasks issued; newest checkpoint: version {version}"]
    lines += [f"{name:<{width}} {count:>12,}" for name, count in rows]
    if audit.leftovers:
        lines.append(f"{audit.leftovers} settled entries are still to be deleted from Redis")
    if audit.unaccounted:
        lines.append(f"in no state: {_some(format_ranges(audit.unaccounted))}")
    for task_id, states in list(audit.conflicts.items())[:SHOWN]:
        lines.append(f"task {task_id}: {'; '.join(states)}")
    if len(audit.conflicts) > SHOWN:
        lines.append(f"and {len(audit.conflicts) - SHOWN} more: --json names all")
    if audit.is_clean:
        lines.append("every task is in exactly one state")
    return "\n".join(lines)


def _some(ranges: str) -> str:
    parts = ranges.split(",")
    return ",".join(parts[:SHOWN]) + (f" and more ({len(parts) - SHOWN} ranges): --json" if len(parts) > SHOWN else "")


async def _audit(run: Path, ledger: Ledger) -> tuple[Manifest | None, Audit]:
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    for _ in range(TRIES):
        before = await asyncio.to_thread(_newest, checkpoints)
        snapshot = await ledger.snapshot()
        if await asyncio.to_thread(_newest, checkpoints) == before:
            books, version, next_task = (before.books, before.version, before.next_task) if before else (Books(), 0, 0)
            return before, examine(books, snapshot, version=version, next_task=next_task)
        await asyncio.sleep(PAUSE_S)
    raise ConfigError(f"{run}: a checkpoint was written during each of {TRIES} looks; ask again")


def _newest(checkpoints: Checkpoints) -> Manifest | None:
    found = checkpoints.latest()
    return found[1] if found else None


@contextlib.asynccontextmanager
async def _ledger(run: Path, config: RunConfig) -> AsyncIterator[tuple[Ledger, bool]]:
    """The run's ledger, and whether it is the one in use: else it is a copy."""
    with contextlib.ExitStack() as stack:
        url = config.redis.url
        is_copy = _has_ended_with_its_valkey(run)
        if is_copy:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="multiattempt-audit-"))) / "valkey"
            await asyncio.to_thread(shutil.copytree, run / "valkey", folder)
            server = EmbeddedValkey(folder)
            stack.callback(server.kill)
            await asyncio.to_thread(server.start)
            url = server.url
        client = await connect(url, patience_s=PATIENCE_S, start_patience_s=PATIENCE_S)
        try:
            redis = config.redis
            yield (
                Ledger(client, run=config.run.name, lease_s=redis.lease_s, max_deliveries=redis.max_deliveries),
                not is_copy,
            )
        finally:
            await client.aclose()


def _has_ended_with_its_valkey(run: Path) -> bool:
    """Whether the run kept its ledger in its own folder, and no launcher holds the run."""
    if not (run / "valkey").is_dir():
        return False
    try:
        with (run / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
