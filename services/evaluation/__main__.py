"""Measure or report a run: `python -m services.evaluation --config runs/<name>/config.json --label before`."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

import httpx

from services.contracts.config import ConfigError, RunConfig, load_resolved
from services.evaluation.results import LABELS, Point, load, save, table


def main() -> int:
    """0 when done; 2 for a configuration error, 1 when the measurement failed (one line on stderr each)."""
    parser = argparse.ArgumentParser(prog="python -m services.evaluation")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration (JSON) of the run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--label", choices=LABELS, help="measure now, under this name")
    what.add_argument("--version", type=int, help="measure this version on evaluation.sets, and print figures as JSON")
    what.add_argument("--report", action="store_true", help="print the table and draw the plots")
    arguments = parser.parse_args()
    from services.evaluation.run import EvaluationError

    try:
        config = load_resolved(arguments.config)
        if arguments.report:
            _report(config)
        elif arguments.version is not None:
            from services.evaluation.during import measure

            print(json.dumps(asyncio.run(measure(config, arguments.version))))  # noqa: T201
        else:
            asyncio.run(_measure(config, arguments.label))
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (EvaluationError, httpx.HTTPError) as error:
        print(f"multiattempt: evaluation failed: {error or type(error).__name__}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


async def _measure(config: RunConfig, label: str) -> None:
    from services.contracts.problems import load_problems
    from services.contracts.registry import Registry
    from services.contracts.store import connect
    from services.evaluation.run import EvaluationError, evaluate

    redis = await connect(config.redis.url)
    try:
        replicas = await Registry(redis, run=config.run.name).replicas()
    finally:
        await redis.aclose()
    urls = [replica.url for replica in replicas if replica.state == "ready"]
    if not urls:
        raise EvaluationError("no rollout replica is ready")

    def tell(point: Point) -> None:
        solved = f"{point.num_solved}/{point.num_problems} solved, {100 * point.accuracy:.1f} %"
        print(f"evaluation ({label}), allowed attempts {point.max_attempts}: {solved}", flush=True)  # noqa: T201

    problems = load_problems(config).heldout
    evaluation = await evaluate(urls, problems, config.evaluation, label=label, seed=config.run.seed, report=tell)
    expected = 0 if label == "before" else config.run.steps
    if evaluation.weight_version != expected:  # a replica that restarted begins at version 0 again
        raise EvaluationError(
            f"{label!r} is to be measured at version {expected}, the replicas hold {evaluation.weight_version}; "
            f"a learner that is started with --resume brings them up to date"
        )
    save(evaluation, config.run_dir)


def _report(config: RunConfig) -> None:
    from services.evaluation.plot import plot_run

    evaluations = [e for label in LABELS if (e := load(config.run_dir, label)) is not None]
    if evaluations:
        print(table(evaluations))  # noqa: T201
    for path in plot_run(config.run_dir):
        print(f"plot: {path}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
