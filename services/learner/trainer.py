"""One update and one checkpoint, carried out by all ranks together.

Rank 0 calls `train` and `save`; the others sit in `follow` and do their part when told. The order of updates,
Redis and publishing are the business of `loop`, which only rank 0 runs.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.contracts.books import Books
from services.contracts.config import ConfigError, RunConfig, model_path
from services.contracts.wire import Trajectory, decode_trajectory, encode
from services.learner.checkpoint import Checkpoints, Manifest
from services.learner.deepspeed_engine import Engine, WeightSource, choose_backend, export_hf
from services.learner.models import Actor, load_actor, load_critic
from services.learner.ppo import Ppo, PpoState
from services.learner.ranks import Command, Ranks
from services.learner.samples import Insight

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
        policy: dict[str, Any] = {"temperature": config.sampling.temperature, "fp32_head": config.model.fp32_head}
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
        )
        self.source = WeightSource(self.actor, ranks)
        self.version = 0  # policy updates done
        self.next_task = 0  # the issue counter in the checkpoint that this run continues from
        self.books = Books()  # its books
        self._checkpoints = Checkpoints(config.run_dir / "checkpoints", keep=learner.checkpoint_keep)

    @classmethod
    def start(cls, config: RunConfig, *, resume: bool) -> "Trainer":
        """Join the ranks, load the models and, if `resume`, the newest checkpoint. Raises ConfigError."""
        learner = config.learner
        if learner.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError('learner.device: "cuda", but torch sees no GPU here; use "cpu" or "auto"')
        if threads := _threads(config):
            torch.set_num_threads(threads)
        backend = choose_backend(learner)
        ranks = Ranks.join(backend=backend, timeout_s=learner.take_timeout_s + COLLECTIVE_SLACK_S)
        if learner.minibatch_dialogues < ranks.world:
            raise ConfigError(
                f"learner.minibatch_dialogues: {learner.minibatch_dialogues} is fewer than the {ranks.world} ranks"
            )
        if backend == "nccl":
            torch.cuda.set_device(ranks.local_rank)
        trainer = cls(config, ranks)
        if resume:
            trainer._resume()
        return trainer

    @property
    def insight(self) -> Insight | None:
        """Into the last update, of this rank's dialogues."""
        return self._ppo.insight

    def train(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Rank 0: one update on this batch. Returns metrics; `version` is then one higher."""
        self.ranks.command(Command.TRAIN, self.version)
        if self.ranks.world > 1:
            self.ranks.share([encode(trajectory) for trajectory in trajectories])
        return self._train(trajectories)

    def save(self, next_task: int, books: Books) -> Path:
        """Rank 0: write a checkpoint of the present version; durable when this returns.

        Raises CheckpointError when the disk refuses, after which saving may be tried again. With several ranks only
        lack of space found beforehand is reported so; a failure half way ends the process, because the others wait.
        """
        need = sum(engine.checkpoint_bytes for engine in self._engines().values()) + self.source.num_bytes
        manifest = self._manifest(next_task, books)
        if self.ranks.world == 1:
            return self._checkpoints.save(manifest, self._write, need_bytes=need)
        target = self._checkpoints.begin(self.version, need_bytes=need)
        self.ranks.command(Command.SAVE, self.version)
        self._write(target)
        return self._checkpoints.commit(manifest)

    def follow(self) -> None:
        """The other ranks: do what rank 0 says until it says stop. Raises RuntimeError when rank 0 is gone."""
        while True:
            command, value = self.ranks.await_command()
            if command is Command.TRAIN:
                assert value == self.version, f"rank 0 trains from version {value}, this rank is at {self.version}"
                self._train([decode_trajectory(message) for message in self.ranks.share(None)])
            elif command is Command.GATHER:
                self.source.gather(value)
            elif command is Command.SAVE:
                self._write_engines(self._checkpoints.temporary(value))
            else:
                return

    def close(self) -> None:
        """Let the other ranks go and leave the group."""
        if self.ranks.leads:
            self.ranks.command(Command.STOP)
        self.ranks.leave()

    def _train(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        metrics = self._ppo.update(trajectories, version=self.version)
        self.version += 1
        return metrics

    def _engines(self) -> dict[str, Engine]:
        """Those with an optimiser, by their folder in a checkpoint."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})

    def _write(self, target: Path) -> None:
        self._write_engines(target)
        (target / PPO_STATE).write_text(json.dumps(asdict(self._ppo.state)), encoding="utf-8")
        export_hf(self.source, self._module, self._model_path, target / "hf")

    def _write_engines(self, target: Path) -> None:
        for name, engine in self._engines().items():
            engine.save(target / name)
        self.ranks.barrier()

    def _resume(self) -> None:
        found = self._checkpoints.latest()
        if found is None:
            log.info("no checkpoint yet, starting at version 0")
            return
        path, manifest = found
        now = self._manifest(0, Books())
        for name, setting in (
            ("world_size", "learner.processes"),
            ("zero_stage", "learner.zero_stage"),
            ("dtype", "model.dtype"),
            ("seed", "run.seed"),
        ):
            before, after = getattr(manifest, name), getattr(now, name)
            if before != after:
                raise ConfigError(
                    f"{setting}: {after}, but checkpoint {path} has {before}: set it back, or rename the run"
                )
        for name, engine in self._engines().items():
            engine.load(path / name)
        self._ppo.restore(PpoState(**json.loads((path / PPO_STATE).read_text(encoding="utf-8"))))
        self.version, self.next_task, self.books = manifest.version, manifest.next_task, manifest.books
        log.info("resumed", extra={"version": self.version, "checkpoint": str(path)})

    def _manifest(self, next_task: int, books: Books) -> Manifest:
        return Manifest(
            version=self.version,
            next_task=next_task,
            books=books,
            seed=self._config.run.seed,
            world_size=self.ranks.world,
            zero_stage=self._config.learner.zero_stage,
            dtype=self._config.model.dtype,
        )


def _threads(config: RunConfig) -> int:
    """CPU threads of this rank; 0 leaves torch's choice, all cores."""
    learner = config.learner
    if learner.threads or learner.processes == 1:
        return learner.threads
    return max(1, torch.get_num_threads() // learner.processes)
