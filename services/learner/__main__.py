"""Start the learner: `python -m services.learner --config RUN/config.json [--resume]`, once per rank.

Several ranks find each other by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without RANK this starts
the `learner.processes` ranks of its host itself (`host`). Exit codes: 0 all steps
are done; 2 a configuration error, one line on standard error; 143 stopped by SIGTERM or SIGINT after saving what was
done, to be continued with --resume; 1 anything else (restart with --resume). Torch is loaded after all checks.
"""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.contracts.config import ConfigError, RunConfig, load_resolved, model_path
from services.contracts.telemetry import configure_logging, label_logs
from services.learner.algorithm import FLAG, changed_since, check_unchanged
from services.learner.checkpoint import Checkpoints
from services.learner.host import run_ranks

EXIT_CONFIG = 2
EXIT_STOPPED = 143
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train until the last step. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.learner", description="PPO with DeepSpeed.")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration of a run (config.json)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument(FLAG, action="store_true", help="continue although settings of the algorithm have changed")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher; LOCAL_RANK says it
    arguments = parser.parse_args(argv)
    try:
        config = load_resolved(arguments.config)
        newest = _check(config, resume=arguments.resume, accept_changes=arguments.accept_changes)
        configure_logging("learner", run=config.run.name)
        if newest is not None and (changed := changed_since(newest, config)):
            log.warning("the algorithm is another from here on", extra={"checkpoint": str(newest), "changed": changed})
        _set_environment(config)
        if "RANK" not in os.environ and (config.learner.processes > 1 or os.environ.get("NNODES", "1") != "1"):
            return run_ranks(config.learner.processes, sys.argv[1:] if argv is None else argv)
        if int(os.environ.get("RANK", "0")) > 0:
            return _follow(config, resume=arguments.resume)
        return asyncio.run(_lead(config, arguments.config, resume=arguments.resume))
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)  # noqa: T201 - the line a user sees
        return EXIT_CONFIG


def _check(config: RunConfig, *, resume: bool, accept_changes: bool) -> Path | None:
    """What can be found wrong before torch is loaded. Returns the checkpoint to continue from."""
    folder = model_path(config)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {folder}: no config.json there; not a Hugging Face model folder")
    found = Checkpoints(config.run_dir / "checkpoints", keep=1).latest()
    if found is not None and not resume:
        raise ConfigError(f"run.name: {config.run_dir} has checkpoints ({found[0].name}): pass --resume, or change it")
    if not config.redis.url:
        raise ConfigError("redis.url: empty; the launcher fills it in, or name a server: redis://host:6379/0")
    if found is not None and not accept_changes:
        check_unchanged(found[0], config)
    return found[0] if found else None


def _set_environment(config: RunConfig) -> None:
    """Settings that libraries read when they are loaded."""
    # Idle OpenMP threads that spin starve whatever shares the cores: 12x slower beside a busy process, measured.
    # Sleeping at once is best while rollout works beside us; spinning shortly is 5 % faster when it waits for us.
    if config.learner.max_staleness > 0:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    else:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if config.learner.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.learner.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc reuse large blocks rather than return them: a tenth of a step on CPUs went into page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest it accepts
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_TOP_PAD, 64 << 20)


def _follow(config: RunConfig, *, resume: bool) -> int:
    from services.contracts.telemetry import serve_health
    from services.learner.trainer import Trainer

    for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 decides when to stop
        signal.signal(number, signal.SIG_IGN)
    label_logs(rank=int(os.environ["RANK"]))
    trainer = Trainer.start(config, resume=resume)
    label_logs(version=lambda: trainer.version)
    with contextlib.ExitStack() as stack:
        if os.environ.get("LOCAL_RANK") == "0":  # of several hosts each answers for itself
            health = serve_health(lambda: None, host=config.learner.metrics_host, port=config.learner.metrics_port)
            stack.callback(health.close)
        trainer.follow()
    trainer.close()
    return 0


async def _lead(config: RunConfig, path: Path, *, resume: bool) -> int:
    from services.contracts.ledger import Ledger
    from services.contracts.observations import Figure, Observations, Reporter
    from services.contracts.problems import load_problems
    from services.contracts.registry import Registry
    from services.contracts.store import connect, refusal
    from services.contracts.telemetry import serve_health
    from services.contracts.tracing import close_tracing, configure_tracing
    from services.learner.development import Development
    from services.learner.loop import Loop
    from services.learner.metrics import Metrics, summarise, weights_and_biases
    from services.learner.observer import Observer
    from services.learner.publish import Publisher
    from services.learner.sampler import TaskSampler
    from services.learner.samples import open_samples
    from services.learner.trainer import Trainer

    configure_tracing("learner", run=config.run.name, settings=config.telemetry)
    page = weights_and_biases(config)
    redis = await connect(config.redis.url)
    sampler = TaskSampler(
        load_problems(config).train,
        seed=config.run.seed,
        min_attempts=config.dialogue.min_attempts,
        max_attempts=config.dialogue.max_attempts,
        samples_per_problem=config.learner.samples_per_problem,
    )
    trainer = await asyncio.to_thread(Trainer.start, config, resume=resume)
    label_logs(version=lambda: trainer.version)
    observations = Observations(redis, run=config.run.name)
    await observations.forget_steps_after(trainer.version)
    registry = Registry(redis, run=config.run.name)
    ledger = Ledger(
        redis, run=config.run.name, lease_s=config.redis.lease_s, max_deliveries=config.redis.max_deliveries
    )

    async def vitals() -> Mapping[str, Figure]:
        return await observer.look()

    reporter = Reporter(observations, name="learner", service="learner", vitals=vitals)
    metrics = Metrics(config.run_dir, version=trainer.version, sinks=[reporter, page] if page else [reporter])
    samples = open_samples(config, sampler)
    samples.forget_after(trainer.version)
    publisher = Publisher(registry, config, trainer.source)
    loop = Loop(
        config,
        ledger=ledger,
        publisher=publisher,
        trainer=trainer,
        sampler=sampler,
        metrics=metrics,
        summarise=summarise,
        keep=lambda step, batch: samples.keep(step, batch, trainer.insight),
    )
    if config.evaluation.every:
        loop.evaluate = Development(path, timeout_s=config.evaluation.timeout_s)
    observer = Observer(
        redis,
        ledger=ledger,
        registry=registry,
        phases=loop.phases,
        version=lambda: trainer.version,
        collected=lambda: loop.collected,
        trouble=lambda: loop.trouble or refusal(),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, loop.stop.set)
    health = serve_health(
        lambda: loop.trouble or refusal(), host=config.learner.metrics_host, port=config.learner.metrics_port
    )
    log.info("learner started", extra={"metrics_port": health.port})
    try:
        async with reporter:
            await loop.run()
    finally:
        health.close()
        metrics.close()
        await asyncio.to_thread(close_tracing)
        await asyncio.to_thread(samples.close)
        await publisher.close()
        await redis.aclose()
    await asyncio.to_thread(trainer.close)
    return 0 if trainer.version >= config.run.steps else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
