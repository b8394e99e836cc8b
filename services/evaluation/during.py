"""One version of a run's weights, measured while the learner holds it: between two updates, through the run's replicas.

The figures are the learner's to keep, beside those of the step; the dialogues stay under the run's
`evaluation/versions/`, for `multiattempt eval show`. Nothing of it is trained on: these are dialogues over HTTP, which
never pass through the ledger.
"""

import contextlib
import shutil
import time
from pathlib import Path

from services.contracts.config import RunConfig
from services.contracts.registry import Registry
from services.contracts.store import connect
from services.evaluation.asking import Asker, Weights, weights_of
from services.evaluation.benchmarks import HELDOUT, load
from services.evaluation.journal import Journal, hold
from services.evaluation.plan import Header, Settings, asks, chosen, digest
from services.evaluation.run import EvaluationError
from services.evaluation.summary import summarise

PATIENCE_S = 60.0


def folder_of(run_dir: Path, version: int) -> Path:
    """Where the dialogues of one version are kept."""
    return run_dir / "evaluation" / "versions" / f"v{version:08d}"


async def measure(config: RunConfig, version: int) -> dict[str, float]:
    """Accuracy at the most attempts of `evaluation.attempts` on `evaluation.sets`, by the names of metrics.jsonl.

    Of the held-out problems `dev_accuracy` and `dev_accuracy_first` (at the first attempt); of another set
    `eval_NAME_accuracy` and so on. Raises ConfigError, EvaluationError.
    """
    started = time.monotonic()
    section = config.evaluation
    from_files = section.benchmarks_folder if section.benchmarks_folder != Path("") else None
    sets = [load(name, folder=from_files, config=config) for name in section.sets]
    settings = Settings(
        benchmarks=tuple(found.name for found in sets),
        attempts=(max(section.attempts),),
        seeds=1,
        temperature=section.temperature,
        seed=config.run.seed,
        problems=section.problems,
    )
    problems = {found.name: chosen(found, settings) for found in sets}
    urls, weights = await _holders(config, version)
    header = Header(
        model=f"{config.run.name} v{version}",
        weights={"version": version, "digest": weights.digest},
        settings=settings,
        data={name: digest(found) for name, found in problems.items()},
        dialogue=None,
    )
    folder = folder_of(config.run_dir, version)
    shutil.rmtree(folder, ignore_errors=True)  # of a learner that died at this version: its weights may be others
    wanted = asks(settings, problems)
    with hold(folder), Journal(folder, header) as journal:
        asker = Asker(urls, journal, settings, problems, patience_s=PATIENCE_S)
        await asker.run(wanted, version=version, concurrency=min(section.concurrency, len(wanted)))
        results = summarise(header, journal.done.values())
    figures = {"evaluation_s": time.monotonic() - started}
    for name, curve in results.curves.items():
        prefix = "dev" if name == HELDOUT else f"eval_{name}"
        [point] = curve.points
        figures[f"{prefix}_accuracy"] = point.accuracy.value or 0.0
        figures[f"{prefix}_accuracy_first"] = point.accuracy_first.value or 0.0
    return figures


async def _holders(config: RunConfig, version: int) -> tuple[list[str], Weights]:
    """The replicas that are ready and have this version, by what they say themselves. Raises EvaluationError."""
    redis = await connect(config.redis.url)
    try:
        ready = [r.url for r in await Registry(redis, run=config.run.name).replicas() if r.state == "ready"]
    finally:
        await redis.aclose()
    found: dict[str, Weights] = {}
    for url in ready:
        with contextlib.suppress(EvaluationError):  # one that is going down is not asked
            found[url] = await weights_of([url])
    holders = {url: weights for url, weights in found.items() if weights.version == version}
    if not holders:
        raise EvaluationError(f"no replica that is ready has version {version}")
    return list(holders), next(iter(holders.values()))
