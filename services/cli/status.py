"""A look at a run from outside: a page of text, once or again and again, out of what Redis knows.

The run's folder is only needed to find Redis; with `--redis` and `--name` it can be on another machine. When nothing
runs, the folder's metrics.jsonl has the last figures.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.contracts.config import ConfigError, RunConfig, load, load_resolved
from services.contracts.ledger import Depth, Ledger
from services.contracts.observations import Figure, Notice, Observations, Vitals
from services.contracts.registry import Registry, Replica
from services.contracts.runs import newest_run, resolved_config
from services.contracts.store import connect, masked

PATIENCE_S = 2.0
PERIOD_S = 1.0
SPARK_STEPS = 40
NOTICES = 5
PIPED_WIDTH = 140
BARS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("reward", "reward", "+.3f"),
    ("right at first", "accuracy_first", ".1%"),
    ("right at last", "accuracy_last", ".1%"),
    ("response tokens", "response_tokens", ".1f"),
    ("KL to reference, nats", "kl_ref", ".4f"),
    ("staleness, versions", "staleness_mean", ".2f"),
    ("dialogues/s", "dialogues_per_s", ".1f"),
)


@dataclass(frozen=True)
class View:
    """What there is to see at one moment."""

    at: float  # Unix time, seconds
    version: int
    steps: Sequence[Mapping[str, Any]]  # oldest first
    depth: Depth
    replicas: Sequence[Replica]
    vitals: Mapping[str, Vitals]
    notices: Sequence[Notice]  # newest first


async def show_status(run: Path | None, *, redis_url: str = "", name: str = "", is_watch: bool = False) -> int:
    """Print it, of the newest run when None; `redis_url` and `name` in place of a folder. Again each second if asked.

    0 when the run is up, 1 when it is not.
    """
    config, folder = _config(run, redis_url, name)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    try:
        client = await connect(config.redis.url, patience_s=PATIENCE_S, start_patience_s=PATIENCE_S)
    except ConfigError as error:
        if folder:
            console.print(_last_step(folder, config), soft_wrap=True)
        reason = "nothing answers" if "refuses" not in str(error) else "the name or password is refused"
        print(f"not running: {reason} at {masked(config.redis.url)}", file=sys.stderr)
        return 1
    try:
        if is_watch:
            await _watch(console, client, config)
        else:
            console.print(render(await look(client, config), config))
    except RedisError as error:
        print(f"not running any more: {masked(config.redis.url)}: {error}", file=sys.stderr)
        return 1
    finally:
        await client.aclose()
    return 0


def _config(run: Path | None, redis_url: str, name: str) -> tuple[RunConfig, Path | None]:
    if redis_url:
        flags = ["--redis.url", redis_url, *(["--run.name", name] if name else [])]
        return load(None, flags, env={}), None
    folder = run or newest_run()
    return load_resolved(resolved_config(folder)), folder


async def look(client: Redis, config: RunConfig) -> View:
    """Ask Redis. Raises RedisError."""
    run, settings = config.run.name, config.redis
    ledger = Ledger(client, run=run, lease_s=settings.lease_s, max_deliveries=settings.max_deliveries)
    registry, seen = Registry(client, run=run), Observations(client, run=run)
    return View(
        at=time.time(),
        version=await registry.version(),
        steps=await seen.steps(SPARK_STEPS),
        depth=await ledger.depth(),
        replicas=await registry.replicas(),
        vitals={vitals.name: vitals for vitals in await seen.vitals()},
        notices=await seen.notices(NOTICES),
    )


async def _watch(console: Console, client: Redis, config: RunConfig) -> None:
    """Until Ctrl-C. On a terminal in place, elsewhere one page after the other."""
    if not console.is_terminal:
        while True:
            console.print(render(await look(client, config), config))
            await asyncio.sleep(PERIOD_S)
    with Live(console=console, screen=True, auto_refresh=False) as page:
        while True:
            page.update(render(await look(client, config), config), refresh=True)
            await asyncio.sleep(PERIOD_S)


def render(view: View, config: RunConfig) -> RenderableType:
    """The page."""
    parts = [_headline(view, config), _curves(view.steps), _queues(view), _learner(view), _replicas(view)]
    return Group(*(part for part in [*parts, _notices(view)] if part is not None))


def sparkline(values: Sequence[float | None]) -> str:
    """One character for each value, a blank where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(BARS) - 1
    return "".join(
        " " if value is None else BARS[round(top * (value - low) / span) if span else top // 2] for value in values
    )


def _headline(view: View, config: RunConfig) -> Text:
    step = view.steps[-1]["step"] if view.steps else 0
    took = [row["step_s"] for row in view.steps[-10:] if row.get("step_s") is not None]
    left = f", about {_duration((config.run.steps - step) * sum(took) / len(took))} left" if took else ""
    words = "no policy update yet" if not step else f"step {step} of {config.run.steps}"
    left = ", all steps are done" if step >= config.run.steps else left
    return Text.assemble((config.run.name, "bold"), f"  {words}, version {view.version}{left}\n")


def _curves(steps: Sequence[Mapping[str, Any]]) -> Table | None:
    if not steps:
        return None
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for label, name, form in CURVES:
        values = [row.get(name) for row in steps]
        if any(value is not None for value in values):
            table.add_row(label, Text(_number(values[-1], form), "bold"), Text(sparkline(values), "cyan"))
    return table


def _queues(view: View) -> Text:
    depth = view.depth
    return Text(
        f"\ntasks: {depth.waiting} waiting, {depth.running} running   "
        f"trajectories: {depth.trajectories_ready} ready, {depth.trajectories_taken} taken   dead letters: {depth.dead}"
    )


def _learner(view: View) -> Text:
    if "learner" not in view.vitals:
        return Text("learner: nothing heard of it in the last seconds\n", "yellow")
    figures = view.vitals["learner"].figures
    shares = [f"{phase} {_percent(figures.get(f'share_{phase}') or 0.0)}" for phase in
              ("waiting", "training", "publishing", "saving")]  # fmt: skip
    doing, trouble = str(figures.get("phase")), figures.get("trouble")
    batch = f"batch {_number(figures.get('collected'), '.0f')}/{_number(figures.get('wanted'), '.0f')}"
    told = Text(f"learner: {doing}, {batch}; of the last minute: {', '.join(shares)}\n")
    return told if not trouble else told.append(f"  {trouble}\n", "yellow")


def _replicas(view: View) -> RenderableType:
    if not view.replicas:
        return Text("no replica is there\n", "yellow")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("replica")
    table.add_column("state")
    for head in ("version", "tokens/s", "dialogues/s", "sampling", "queued", "KV", "no task", "verdicts", "verdict ms"):
        table.add_column(head, justify="right")
    table.add_column("device")
    table.add_column("address", overflow="fold")
    for replica in view.replicas:
        vitals = view.vitals.get(replica.replica_id)
        figures: Mapping[str, Figure] = vitals.figures if vitals else {}
        behind = view.version - replica.version
        table.add_row(
            replica.replica_id,
            str(figures.get("trouble") or replica.state),
            Text(f"{replica.version}" + (f" (-{behind})" if behind > 0 else ""), "yellow" if behind > 0 else ""),
            _number(figures.get("tokens_per_s"), ".0f"),
            _number(figures.get("dialogues_per_s"), ".1f"),
            _number(figures.get("sequences"), ".0f"),
            _number(figures.get("sequences_waiting"), ".0f"),
            _percent(figures.get("kv_cache")),
            _percent(figures.get("share_idle_tasks")),
            _percent(figures.get("share_idle_grading")),
            _number(figures.get("grading_ms"), ".0f"),
            replica.device,
            replica.url,
        )
    return table


def _notices(view: View) -> Text | None:
    if not view.notices:
        return None
    told = Text("\nlast warnings and errors\n", "dim")
    for notice in view.notices:
        task = "" if notice.task_id is None else f" (task {notice.task_id})"
        style = "red" if notice.level in ("error", "critical") else "yellow"
        when = _duration(max(0.0, view.at - notice.at))
        told.append(f"  {when:>7} ago  {notice.name}: {' '.join(notice.message.split())[:200]}{task}\n", style)
    return told


def _last_step(folder: Path, config: RunConfig) -> str:
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the learner may be writing one
    if not lines:
        return f"{config.run.name}  no policy update yet"
    last = json.loads(lines[-1])
    shown = [f"{label} {_number(last[name], form)}" for label, name, form in CURVES if last.get(name) is not None]
    return f"{config.run.name}  step {last['step']} of {config.run.steps}: {', '.join(shown)}"


def _number(value: Figure, form: str) -> str:
    return format(value, form) if isinstance(value, float | int) else "-"


def _percent(value: Figure) -> str:
    return f"{value:.0%}" if isinstance(value, float | int) else "-"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
