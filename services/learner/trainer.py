"""One update and one checkpoint, carried out by all ranks together.

Rank 0 calls `train` and `save`; the others sit in `follow` and do their part when told. The order of updates,
Redis and publishing are the business of `loop`, which only rank 0 runs.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch

from services.contracts.books import Books
from services.contracts.config import ConfigError, RunConfig, model_path
from services.contracts.wire import Trajectory, decode_trajectory, encode
from services.learner.algorithm import CONFIG, kept
from services.learner.batch import Layout
from services.learner.checkpoint import Checkpoints, Manifest
from services.learner.deepspeed_engine import Engine, WeightSource, choose_backend
from services.learner.export import HfExporter
from services.learner.host_copy import HostCopies
from services.learner.models import Actor, can_pack, load_actor, load_critic
from services.learner.ppo import Ppo, PpoState, Prepared
from services.learner.ranks import Command, Ranks
from services.learner.samples import Insight
from services.learner.saver import Saver
from services.learner.universal import convert

PPO_STATE = "ppo.json"  # in a checkpoint
COLLECTIVE_SLACK_S = 600.0  # on top of waiting for a batch: publishing, a checkpoint on a slow disk

log = logging.getLogger(__name__)


class Trainer:
    """Models, optimisers and their checkpoints. Build it in every rank with `Trainer.start`."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._config, self.ranks = config, ranks
        self._model_path = model_path(config)
        learner = config.learner
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        policy: dict[str, Any] = {
            "temperature": config.sampling.temperature,
            "fp32_head": config.model.fp32_head,
            "keep_bytes": learner.logits_mb << 20,
        }
        recompute = learner.gradient_checkpointing
        self._module: Actor = load_actor(self._model_path, dtype=dtype, gradient_checkpointing=recompute, **policy)
        self.actor = Engine(self._module, config=learner, dtype=dtype, ranks=ranks, lr=learner.lr)
        self.critic: Engine | None = None
        if learner.advantage == "gae":
            critic = load_critic(self._model_path, dtype=dtype, seed=config.run.seed, gradient_checkpointing=recompute)
            self.critic = Engine(critic, config=learner, dtype=dtype, ranks=ranks, lr=learner.critic_lr)
        self._reference: Engine | None = None
        if learner.kl_coef > 0:
            frozen = load_actor(self._model_path, dtype=dtype, **policy)
            self._reference = Engine(frozen, config=learner, dtype=dtype, ranks=ranks, lr=None)
        self._ppo = Ppo(
            self.actor,
            self.critic,
            self._reference,
            config=learner,
            ranks=ranks,
            seed=config.run.seed,
            total_updates=config.run.steps,
            layout=_layout(self._module, self.actor.device, dtype),
        )
        self._staged: Prepared | None = None
        self.source = WeightSource(self.actor, ranks)
        self.version = 0  # policy updates done
        self.next_task = 0  # the issue counter in the checkpoint that this run continues from
        self.books = Books()  # its books
        self._checkpoints = Checkpoints(
            config.run_dir / "checkpoints",
            keep=learner.checkpoint_keep,
            metric=learner.checkpoint_best,
        )
        self._saver = Saver(self._checkpoints, ranks, self._engines(), is_async=learner.checkpoint_async)
        self._exporter = HfExporter(config, self._module, self._model_path)

    @classmethod
    def start(cls, config: RunConfig, *, resume: bool) -> "Trainer":
        """Join the ranks, load the models and, if `resume`, the newest checkpoint. Raises ConfigError."""
        learner = config.learner
        if learner.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError('learner.device: "cuda", but torch sees no GPU here; use "cpu" or "auto"')
        if threads := _threads(config):
            torch.set_num_threads(threads)
        backend = choose_backend(learner)
        ranks = Ranks.join(
            backend=backend,
            timeout_s=learner.take_timeout_s + COLLECTIVE_SLACK_S,
            lost_s=learner.rank_timeout_s,
        )
        if learner.minibatch_dialogues < ranks.world:
            raise ConfigError(
                f"learner.minibatch_dialogues: {learner.minibatch_dialogues} is fewer than the {ranks.world} ranks"
            )
        if backend == "nccl":
            torch.cuda.set_device(ranks.local_rank)
        trainer = cls(config, ranks)
        if ranks.leads:
            trainer._checkpoints.tidy()
        if resume:
            trainer._resume()
        return trainer

    @property
    def insight(self) -> Insight | None:
        """Into the last update, of this rank's dialogues."""
        return self._ppo.insight

    def stage(self, trajectories: Sequence[Trajectory], version: int) -> None:
        """Rank 0: pack the batch that will be trained on from `version`, while the update before it is under way."""
        self._staged = self._ppo.prepare(trajectories, version=version)

    @property
    def ask_tokens(self) -> int:
        """How many tokens are worth an `ask`; 0: none."""
        return self._ppo.ask_tokens

    def ask(self, trajectories: Sequence[Trajectory]) -> None:
        """Rank 0: what the models say of a part of the next batch, while the rest of it is still coming in."""
        self.ranks.command(Command.ASK, self.version)
        if self.ranks.world > 1:
            self.ranks.share([encode(trajectory) for trajectory in trajectories])
        self._ppo.ask(trajectories, version=self.version)

    def train(
        self, trajectories: Sequence[Trajectory], *, on_actor: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Rank 0: one update on this batch. Returns metrics; `version` is then one higher.

        on_actor: called as soon as the weights of that version are there to be published, before the critic's steps.
        """
        self.ranks.command(Command.TRAIN, self.version)
        if self.ranks.world > 1:
            self.ranks.share([encode(trajectory) for trajectory in trajectories])

        def publish() -> None:
            self.version += 1
            on_actor()
            self.ranks.command(Command.GO_ON)

        return self._train(trajectories, publish)

    def save(self, next_task: int, books: Books, figures: Mapping[str, float]) -> Future[Path]:
        """Rank 0: begin a checkpoint of the present version; training may go on when this returns.

        figures: means over the updates since the checkpoint before. The future holds the durable checkpoint.
        CheckpointError, raised here or by the future: the disk refuses, and saving may be tried again.
        """
        need = sum(engine.checkpoint_bytes for engine in self._engines().values()) + self.source.num_bytes
        score = _score(figures, self._config.learner.checkpoint_best)
        manifest = msgspec.structs.replace(self._manifest(next_task, books), score=score)

        def add(copies: HostCopies) -> Callable[[Path], None]:
            state, version = json.dumps(asdict(self._ppo.state)), self.version
            weights = {name: copies.copy(tensor) for name, tensor in self.source}

            def write(target: Path) -> None:
                (target / PPO_STATE).write_text(state, encoding="utf-8")
                (target / CONFIG).write_text(kept(self._config), encoding="utf-8")
                self._exporter.write(target / "hf", weights, version=version, figures=figures)

            return write

        return self._saver.save(manifest, add, need_bytes=need)

    def follow(self) -> None:
        """The other ranks: do what rank 0 says until it says stop. Raises RuntimeError when rank 0 is gone."""
        while True:
            command, value = self.ranks.await_command()
            if command in (Command.TRAIN, Command.ASK):
                assert value == self.version, f"rank 0 is at version {value}, this rank at {self.version}"
                trajectories = [decode_trajectory(message) for message in self.ranks.share(None)]
                if command is Command.TRAIN:
                    self._train(trajectories, self._follow_publishing)
                else:
                    self._ppo.ask(trajectories, version=value)
            elif command is Command.GATHER:
                self.source.gather(value)
            elif command is Command.SAVE:
                self._saver.follow(value)
            else:
                return

    def close(self) -> None:
        """Write what is still to be written, let the other ranks go and leave the group."""
        self._saver.close()
        if self.ranks.leads:
            self.ranks.command(Command.STOP)
        self.ranks.leave()

    def _train(self, trajectories: Sequence[Trajectory], on_actor: Callable[[], None]) -> dict[str, float]:
        staged, self._staged = self._staged, None
        if staged and (
            staged.version != self.version or list(map(id, staged.trajectories)) != list(map(id, trajectories))
        ):
            staged = None  # some were given up meanwhile, because Redis lost them
        return self._ppo.update(trajectories, version=self.version, prepared=staged, on_actor=on_actor)

    def _follow_publishing(self) -> None:
        """The other ranks, between the actor's steps and the critic's."""
        self.version += 1
        while True:
            command, value = self.ranks.await_command()
            if command is Command.GO_ON:
                return
            assert command is Command.GATHER, command
            self.source.gather(value)

    def _engines(self) -> dict[str, Engine]:
        """Those with an optimiser, by their folder in a checkpoint."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})

    def _resume(self) -> None:
        found = self._checkpoints.latest() if self.ranks.leads else None
        name = self.ranks.share([found[0].name.encode()] if found else [])  # another host may see the folder later
        if not name:
            log.info("no checkpoint yet, starting at version 0")
            return
        path = self._checkpoints.folder / name[0].decode()
        manifest = self._checkpoints.read(path)
        if manifest.dtype != self._config.model.dtype:
            raise ConfigError(
                f"model.dtype: {self._config.model.dtype}, but checkpoint {path} has {manifest.dtype}: set it back, "
                "or rename the run"
            )
        missing = [name for name in self._engines() if not (path / name).is_dir()]
        if missing:
            raise ConfigError(
                f"learner.advantage: it needs a {missing[0]}, and checkpoint {path} has none: rename the run"
            )
        self._load_engines(path, manifest)
        self._ppo.restore(PpoState(**json.loads((path / PPO_STATE).read_text(encoding="utf-8"))))
        self.version, self.next_task, self.books = manifest.version, manifest.next_task, manifest.books
        log.info("resumed", extra={"version": self.version, "checkpoint": str(path)})

    def _load_engines(self, path: Path, manifest: Manifest) -> None:
        stage = self._config.learner.zero_stage
        then, now = (manifest.world_size, manifest.zero_stage), (self.ranks.world, stage)
        if (stage == 0) != (manifest.zero_stage == 0):
            raise ConfigError(
                f"learner.zero_stage: {stage}, but checkpoint {path} has {manifest.zero_stage}: from or to 0 there is "
                "no way; set it back, or rename the run"
            )
        if then == now or stage == 0:  # without ZeRO every rank has everything
            for name, engine in self._engines().items():
                engine.load(path / name)
            return
        converted = self._checkpoints.scratch(f"universal-{path.name}")
        if self.ranks.leads:
            log.info("converting the checkpoint for other ranks", extra={"then": then, "now": now})
            convert(path, list(self._engines()), converted)
        self.ranks.barrier()
        for name, engine in self._engines().items():
            engine.load(converted / name, is_universal=True)
        self.ranks.barrier()
        if self.ranks.leads:
            shutil.rmtree(converted)

    def _manifest(self, next_task: int, books: Books) -> Manifest:
        return Manifest(
            version=self.version,
            next_task=next_task,
            books=books,
            seed=self._config.run.seed,
            world_size=self.ranks.world,
            zero_stage=self._config.learner.zero_stage,
            dtype=self._config.model.dtype,
            metric=self._config.learner.checkpoint_best,
        )


def _score(figures: Mapping[str, float], metric: str) -> float | None:
    """Of a checkpoint, higher is better; None without a figure of that name. `metric`: see `checkpoint_best`."""
    value = figures.get(metric.removeprefix("-"))
    return -value if value is not None and metric.startswith("-") else value


def _layout(module: Actor, device: torch.device, dtype: torch.dtype) -> Layout:
    """Of the micro-batches, the best that the attention can do."""
    if not can_pack(module):
        return "padded"
    if device.type == "cpu":
        return "shared"
    return "padded" if dtype is torch.float32 else "packed"  # the kernel is of half precision, and of whole dialogues


def _threads(config: RunConfig) -> int:
    """CPU threads of this rank; 0 leaves torch's choice, all cores."""
    learner = config.learner
    here = int(os.environ.get("LOCAL_WORLD_SIZE", learner.processes))  # torchrun's and DeepSpeed's launchers say it
    if learner.threads or here == 1:
        return learner.threads
    return max(1, len(os.sched_getaffinity(0)) // here)
