"""`multiattempt eval MODEL`: starts what an evaluation needs, has it run, stops it; or asks running replicas.

What is measured, and how, is `services.evaluation`'s; which model is meant, `model_source`'s.
"""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from services.cli.launcher import EXIT_BY_SIGNAL, resolve, stop_on_signals, write_resolved
from services.cli.model_source import ModelSource, check_model_folder, dialogue_settings, find_model, fingerprint
from services.cli.preflight import available_memory_gb, check_disk, check_memory
from services.cli.progress import Progress
from services.cli.services import PROGRAMS, Plan, Programs
from services.cli.store import EmbeddedStore
from services.cli.supervisor import ServiceFailed, Supervisor
from services.contracts.config import ConfigError, RunConfig, load, model_path
from services.contracts.problems import Problem
from services.evaluation.asking import Asker, Tally, weights_of
from services.evaluation.benchmarks import ProblemSet
from services.evaluation.benchmarks import load as load_benchmark
from services.evaluation.journal import Journal, hold
from services.evaluation.outcome import PAGE, write_results
from services.evaluation.plan import Ask, Header, Settings, asks, check, chosen, digest
from services.evaluation.report import accuracy
from services.evaluation.run import EvaluationError
from services.rollout.environment import load_environment

FOLDER = Path("runs/evaluations")
SERVICES = "services"  # folder of their logs, their configuration and the store
START_TRIES = 2
OWN_PATIENCE_S, OTHERS_PATIENCE_S = 900.0, 120.0  # a replica of ours is started again: the model has to be loaded
TOLD_EVERY_S = 15.0
MAX_CONCURRENCY = 512


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The command line. settings: without its benchmarks' data; overrides: `--section.key value`."""

    model: str | None
    settings: Settings
    data: Path | None
    urls: tuple[str, ...]
    output: Path | None
    name: str | None
    concurrency: int | None
    overrides: tuple[str, ...]


def run_eval(options: EvalOptions, *, programs: Programs = PROGRAMS) -> int:
    """Measure, write and print. Returns the exit code. Raises ConfigError."""
    check(options.settings)
    if options.concurrency is not None and options.concurrency < 1:
        raise ConfigError(f"--concurrency: {options.concurrency}: at least 1")
    for url in options.urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--rollout: {url}: expected http://host:port")
    if options.model is None and not options.urls:
        raise ConfigError("eval: a MODEL is missing, or running replicas by --rollout URL")
    source = find_model(options.model) if options.model is not None else ModelSource("")
    config = _config(options, source)
    name = options.name or source.name or options.urls[0].split("//")[-1].replace(":", "-")
    folder = options.output or FOLDER / name
    if not options.urls:
        load_environment(config.dialogue)
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder, "name": SERVICES})})
    check_disk(folder, setting="--output")
    sets = [load_benchmark(spec, folder=options.data, config=config) for spec in options.settings.benchmarks]
    evaluation = _Evaluation(options, config, name, folder, sets, programs)
    return asyncio.run(evaluation.run())


def _config(options: EvalOptions, source: ModelSource) -> RunConfig:
    """The run's settings with what an evaluation fixes: no learner, no GPU set aside for one."""
    fixed = ["--learner.device=cpu", "--evaluation.enabled=false"]
    if source.path:
        fixed += ["--model.source=pretrained", f"--model.path={source.path}", "--model.warmup_steps=0"]
    config = load(source.experiment, [*options.overrides, *fixed], base=source.base)
    if config.redis.url:
        config = config.model_copy(update={"redis": config.redis.model_copy(update={"url": ""})})
    return config


class _Evaluation:
    """One start of `multiattempt eval`."""

    def __init__(
        self,
        options: EvalOptions,
        config: RunConfig,
        name: str,
        folder: Path,
        sets: Sequence[ProblemSet],
        programs: Programs,
    ) -> None:
        self._options, self._config, self._name, self._folder = options, config, name, folder
        self._settings = msgspec.structs.replace(options.settings, benchmarks=tuple(found.name for found in sets))
        if len(set(self._settings.benchmarks)) < len(sets):
            raise ConfigError(f"--benchmarks: one is named twice: {', '.join(self._settings.benchmarks)}")
        self._sets = sets
        self._problems: dict[str, dict[str, Problem]] = {found.name: chosen(found, self._settings) for found in sets}
        self._asks: list[Ask] = asks(self._settings, self._problems)
        self._programs = programs
        self._num_done = 0
        self._told_at = time.monotonic()

    async def run(self) -> int:
        """Returns the exit code. Raises ConfigError, with everything stopped."""
        with hold(self._folder), Progress() as progress:
            for found in self._sets:
                if len(found.problems) < found.num_rows:
                    progress.say(f"{found.name}: {found.num_rows} rows, {len(found.problems)} different questions")
            supervisor = Supervisor(
                self._folder / SERVICES / "logs", progress, milestone=lambda: self._num_done, start_tries=START_TRIES
            )
            store = EmbeddedStore(self._folder / SERVICES / "valkey", supervisor, progress)
            measuring = asyncio.create_task(self._measure(supervisor, store, progress))
            received = stop_on_signals(measuring, supervisor, progress, told="what is finished is kept")
            try:
                tally = await measuring
            except asyncio.CancelledError:
                progress.at_end(lambda: f"stopped; the same command goes on ({self._num_done} dialogues are kept)")
                return EXIT_BY_SIGNAL + (received or [signal.SIGINT])[0]
            except (ServiceFailed, EvaluationError) as error:
                reason = str(error)
                progress.at_end(
                    lambda: f"failed: {reason}; {self._num_done} dialogues are kept, the same command goes on"
                )
                return 1
            finally:
                await supervisor.stop()
                await store.stop()
                supervisor.close()
            progress.doing("computing intervals")
            results = write_results(self._folder, self._asks, tally)
            progress.at_end(lambda: f"done: {self._folder / PAGE}\n\n{accuracy(results)}\n")
        return 0

    async def _measure(self, supervisor: Supervisor, store: EmbeddedStore, progress: Progress) -> Tally:
        if self._options.urls:
            urls = [url.rstrip("/") for url in self._options.urls]
            weights = await weights_of(urls)
            told = {"replica": weights.model or "unknown", "version": weights.version, "digest": weights.digest}
            with Journal(self._folder, self._header(told, None)) as journal:
                return await self._ask(journal, urls, version=weights.version, progress=progress)
        plan, ports = await self._prepare(supervisor, store, progress)
        folder = model_path(self._config)
        check_model_folder(folder)
        located = self._config.model.model_copy(update={"source": "pretrained", "path": str(folder)})
        check_memory(
            self._config.model_copy(update={"model": located}), available_gb=available_memory_gb(), has_learner=False
        )
        sha = await asyncio.to_thread(fingerprint, folder)
        header = self._header({"sha256": sha}, dialogue_settings(self._config))
        with Journal(self._folder, header) as journal:
            if all(ask.key in journal.done for ask in self._asks):
                return await self._ask(journal, [], version=0, progress=progress)
            kept = [*([] if self._config.grader.url else [plan.grader()]), *plan.rollouts(ports)]
            progress.doing(f"starting {', '.join(service.name for service in kept)}")
            for service in kept:
                supervisor.keep(service)
            await supervisor.until_ready(kept)
            urls = [f"http://{self._config.rollout.host}:{port}" for port in ports]
            asking = asyncio.ensure_future(self._ask(journal, urls, version=0, progress=progress))
            await supervisor.unless_failed(asking)
            return asking.result()

    async def _prepare(
        self, supervisor: Supervisor, store: EmbeddedStore, progress: Progress
    ) -> tuple[Plan, list[int]]:
        """Store and model; returns how the services are started, and the replicas' ports."""
        progress.doing("starting an embedded Valkey")
        resolved, ports = resolve(self._config, redis_url=await store.start())
        plan = Plan(resolved, write_resolved(resolved), self._programs)
        progress.doing("preparing the model")
        one_shot = plan.one_shot("prepare")
        await supervisor.unless_failed(supervisor.run_once("prepare", one_shot.command, one_shot.environment))
        return plan, ports

    def _header(self, weights: dict[str, Any], dialogue: dict[str, Any] | None) -> Header:
        data = {name: digest(problems) for name, problems in self._problems.items()}
        return Header(model=self._name, weights=weights, settings=self._settings, data=data, dialogue=dialogue)

    async def _ask(self, journal: Journal, urls: Sequence[str], *, version: int, progress: Progress) -> Tally:
        def tell(tally: Tally) -> None:
            self._tell(tally, progress)

        patience_s = OTHERS_PATIENCE_S if self._options.urls else OWN_PATIENCE_S
        missing = sum(ask.key not in journal.done for ask in self._asks)
        before = len(self._asks) - missing
        going_on = f", {before} of them from before" if before else ""
        progress.doing(f"asking for {len(self._asks)} dialogues{going_on}")
        self._num_done = before
        asker = Asker(urls, journal, self._settings, self._problems, patience_s=patience_s, tell=tell)
        return await asker.run(self._asks, version=version, concurrency=min(self._concurrency(), missing or 1))

    def _concurrency(self) -> int:
        if self._options.concurrency is not None:
            return self._options.concurrency
        rollout = self._config.rollout  # twice its places: some dialogues wait for verdicts
        return min(MAX_CONCURRENCY, 2 * rollout.max_num_seqs * (len(self._options.urls) or rollout.replicas))

    def _tell(self, tally: Tally, progress: Progress) -> None:
        self._num_done = tally.num_done
        line = progress_line(tally)
        progress.now(line)
        if time.monotonic() - self._told_at > TOLD_EVERY_S or tally.num_done == tally.total:
            self._told_at = time.monotonic()
            progress.say(line)


def progress_line(tally: Tally) -> str:
    """`1200/6000 dialogues, 41.2/s, 1:56 left; math500 at 3 attempts: 52.1 % of 240/500`."""
    rate = tally.num_new / tally.seconds if tally.seconds else 0.0
    left_s = (tally.total - tally.num_done) / rate if rate else 0.0
    parts = [f"{tally.num_done}/{tally.total} dialogues, {rate:.1f}/s, {int(left_s) // 60}:{int(left_s) % 60:02d} left"]
    running = [point for point in tally.done if tally.done[point] < tally.asked[point]] or list(tally.done)[-1:]
    for point in running[:2]:
        benchmark, attempts, _ = point
        share = 100 * tally.solved[point] / tally.done[point]
        parts.append(
            f"{benchmark} at {attempts} attempt{'s' * (attempts > 1)}: {share:.1f} % "
            f"of {tally.done[point]}/{tally.asked[point]}"
        )
    return "; ".join(parts)
