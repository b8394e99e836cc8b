"""A look at a run from outside: what its configuration, ledger, registry and metrics say."""

import json
import sys
from pathlib import Path

from services.contracts.config import ConfigError, load_resolved
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry
from services.contracts.runs import newest_run, resolved_config
from services.contracts.store import connect, masked

PATIENCE_S = 2.0


async def show_status(run: Path | None) -> int:
    """Print it, of the newest run when None. 0 when the run is up, 1 when it is not."""
    run = run or newest_run()
    print(run)
    config = load_resolved(resolved_config(run))
    last = _last_metrics(run)
    if last is None:
        print("no policy update yet")
    else:
        figures = ("reward", "accuracy_first", "accuracy_last", "dialogues_per_s", "step_s")
        shown = ", ".join(f"{name} {last[name]:.3g}" for name in figures if last.get(name) is not None)
        print(f"step {last['step']}/{config.run.steps}: {shown}")
    try:
        client = await connect(config.redis.url, patience_s=PATIENCE_S, start_patience_s=PATIENCE_S)
    except ConfigError:
        print(f"not running: nothing answers at {masked(config.redis.url)}", file=sys.stderr)
        return 1
    try:
        ledger = Ledger(
            client, run=config.run.name, lease_s=config.redis.lease_s, max_deliveries=config.redis.max_deliveries
        )
        registry = Registry(client, run=config.run.name)
        depth = await ledger.depth()
        print(f"ledger: {', '.join(f'{name} {count}' for name, count in depth._asdict().items())}")
        print(f"learner: weight version {await registry.version()}")
        for replica in await registry.replicas():
            print(f"{replica.replica_id}: {replica.state}, version {replica.version}, {replica.device}, {replica.url}")
    finally:
        await client.aclose()
    return 0


def _last_metrics(run: Path) -> dict[str, float] | None:
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the learner may be writing one
    return json.loads(lines[-1]) if lines else None
