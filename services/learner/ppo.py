"""The arithmetic of one policy update (paper.md section 2, design.md section 4), over models given from outside.

First pass, without gradient: see `first_pass`. Then one optimiser step of the actor for each minibatch, and after
all of these the critic's, so that the new policy can be published meanwhile: neither's steps depend on the other's.
A step whose loss or gradient is not finite is skipped. Which trajectories, and what becomes of the new weights, is
decided elsewhere.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from services.contracts.config import ConfigError
from services.contracts.settings import LearnerSection
from services.contracts.wire import Trajectory
from services.learner.batch import Blocks, Layout, MicroBatch, Plan, Share, minibatches, plan
from services.learner.first_pass import FirstPass, FrozenModel, Start, inputs, where
from services.learner.kl import adapted, kl
from services.learner.losses import importance_weights, policy_loss_sum, value_loss_sum
from services.learner.ranks import Ranks
from services.learner.sampler import STREAM_MINIBATCH, generator
from services.learner.samples import Insight
from services.learner.schedule import lr_at
from services.learner.stopwatch import Stopwatch

GPU_INFERENCE_FACTOR = 4  # without gradients a block may be this much larger
CPU_INFERENCE_TOKENS = 4096  # larger blocks leave the caches: measured 1.5x slower

log = logging.getLogger(__name__)


class DivergedError(ConfigError):
    """Step after step without a finite gradient: with these settings, on these data, the run goes nowhere."""


class TrainedModel(FrozenModel, Protocol):
    """A model with an optimiser."""

    def step(
        self,
        micros: Sequence[MicroBatch],
        loss_of: Callable[[MicroBatch], Tensor],
        *,
        lr: float,
        enter: Callable[[str], None],
    ) -> float:
        """One optimiser step on the sum of the losses over micro-batches and ranks; returns the gradient norm.

        enter: told "forward", "backward" and "optimiser" as each begins. When the loss or the norm is not finite on
        any rank nothing is changed, and the norm returned is not finite.
        """


@dataclass(slots=True)
class PpoState:
    """What goes from update to update beside models and optimisers; a checkpoint holds it."""

    kl_coef: float
    nonfinite_in_row: int = 0  # optimiser steps skipped, up to now


class Prepared(NamedTuple):
    """A batch made ready to train on, from weights `version`."""

    trajectories: Sequence[Trajectory]
    version: int
    work: Plan
    order: list[int]  # minibatches of all epochs, in the order of the steps


class Ppo:
    """Updates actor and critic. critic: None unless `advantage` is "gae". reference: None when `kl_coef` is 0.

    total_updates: of the whole run. layout: of the micro-batches, as the models take them.
    """

    def __init__(
        self,
        actor: TrainedModel,
        critic: TrainedModel | None,
        reference: FrozenModel | None,
        *,
        config: LearnerSection,
        ranks: Ranks,
        seed: int,
        total_updates: int,
        layout: Layout = "padded",
    ) -> None:
        assert (reference is not None) == (config.kl_coef > 0)
        assert (critic is not None) == (config.advantage == "gae")
        self._actor, self._critic, self._reference = actor, critic, reference
        self._config, self._ranks, self._seed, self._layout = config, ranks, seed, layout
        self._minibatches = config.batch_dialogues // config.minibatch_dialogues
        self._steps_per_update = config.epochs * self._minibatches
        self._total_steps = total_updates * self._steps_per_update
        one_step = self._steps_per_update == 1
        self._first_pass = FirstPass(actor, critic, reference, config=config, ranks=ranks, one_step=one_step)
        self.state = PpoState(kl_coef=config.kl_coef)
        self.insight: Insight | None = None  # into the last update, for people
        self._sums: dict[str, list[Tensor]] = {}  # of the steps taken
        self._fresh: dict[str, list[Tensor]] = {}  # of the one under way

    def restore(self, state: PpoState) -> None:
        """Go on from a checkpoint; a fixed `kl_coef` is the configuration's."""
        self.state = state
        if not self._config.kl_target:
            self.state.kl_coef = self._config.kl_coef

    def prepare(self, trajectories: Sequence[Trajectory], *, version: int) -> Prepared:
        """Plan the update from weights `version`. Touches no model: another update may be under way meanwhile."""
        random = generator(self._seed, STREAM_MINIBATCH, version)
        parts = minibatches(len(trajectories), self._minibatches, random)
        known = self._first_pass.is_known(trajectories, version=version)
        # Membership stays over the epochs, so that ranks exchange nothing; the order is drawn anew.
        order = [int(i) for _ in range(self._config.epochs) for i in random.permutation(self._minibatches)]
        return Prepared(trajectories, version, self._plan(trajectories, parts, known=known), order)

    def ask(self, trajectories: Sequence[Trajectory], *, version: int) -> None:
        """Do the first pass over a part of a batch in advance, with the present weights, which are `version`."""
        known = self._first_pass.is_known(trajectories, version=version)
        new = [trajectory for trajectory, is_known in zip(trajectories, known, strict=True) if not is_known]
        if new and self._first_pass.asks:
            self._first_pass.ask(new, self._plan(new, [np.arange(len(new))]), version=version)

    @property
    def ask_tokens(self) -> int:
        """How many tokens are worth asking about at once; 0: there is nothing to ask."""
        return self._inference_tokens() * self._ranks.world if self._first_pass.asks else 0

    def update(
        self,
        trajectories: Sequence[Trajectory],
        *,
        version: int,
        prepared: Prepared | None = None,
        on_actor: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Train on one batch, the same on every rank, starting from weights `version`. Returns metrics.

        prepared: of these trajectories and this version, if that has been done. on_actor: called once the actor is
        what it will be and the critic is not. The seconds of the parts (`forward_s` and so on, `other_s`) add up to
        those of the whole. Raises DivergedError, on every rank, when too many steps in a row were skipped.
        """
        watch = Stopwatch(self._actor.device)
        self._sums = {}
        config, kl_coef = self._config, self.state.kl_coef
        if prepared is None:
            with watch.during("pack"):
                prepared = self.prepare(trajectories, version=version)
        with watch.during("first_pass"):
            start, work, metrics = self._first_pass(prepared.work, trajectories, kl_coef=kl_coef)
        self.insight = Insight(work.owned, work.packed.offsets, start.advantages.numpy())
        shares = [work.shares[which] for which in prepared.order]
        actor_norms: list[float] = []
        if version >= config.critic_warmup:
            loss_of = self._actor_loss(start)
            actor_norms = self._steps(self._actor, shares, loss_of, peak=config.lr, version=version, watch=watch)
        with watch.during("publish"):
            on_actor()
        critic_norms: list[float] = []
        if self._critic is not None:
            loss_of = self._critic_loss(self._critic, start)
            critic_norms = self._steps(
                self._critic, shares, loss_of, peak=config.critic_lr, version=version, watch=watch
            )
        task_ids = np.array([trajectory.task_id for trajectory in trajectories], dtype=np.int64)
        skipped = self._judge(shares, [actor_norms, critic_norms], task_ids=task_ids, version=version)
        metrics |= self._training_metrics()
        if config.kl_target and "kl_ref" in metrics:
            self.state.kl_coef = adapted(kl_coef, measured=metrics["kl_ref"], target=config.kl_target)
        last_step = (version + 1) * self._steps_per_update - 1
        return metrics | {
            "lr": self._lr(last_step, config.lr) if version >= config.critic_warmup else 0.0,
            "kl_coef": kl_coef,
            "nonfinite_steps": float(skipped),
            **_norm_metrics("grad_norm", actor_norms),
            **({"critic_lr": self._lr(last_step, config.critic_lr)} if self._critic else {}),
            **(_norm_metrics("critic_grad_norm", critic_norms) if self._critic else {}),
            "answered_ahead": float(prepared.work.known.sum()),
            **_seconds(watch.lap()),
        }

    def _plan(
        self, trajectories: Sequence[Trajectory], parts: Sequence[np.ndarray], *, known: np.ndarray | None = None
    ) -> Plan:
        return plan(
            trajectories,
            parts=parts,
            rank=self._ranks.rank,
            world=self._ranks.world,
            blocks=Blocks(self._layout, self._config.micro_tokens, self._inference_tokens()),
            reward_at=self._config.reward_at,
            known=known,
        )

    def _steps(
        self,
        model: TrainedModel,
        shares: Sequence[Share],
        loss_of: Callable[[MicroBatch, Share], Tensor],
        *,
        peak: float,
        version: int,
        watch: Stopwatch,
    ) -> list[float]:
        """A model's optimiser steps of this update. Returns the gradient norm of each, NaN of one without tokens."""
        norms = []
        for number, share in enumerate(shares, version * self._steps_per_update):
            if not share.num_actions:
                norms.append(math.nan)  # every dialogue in it was left out
                continue
            self._fresh = {}
            with watch.during("forward"):
                norm = model.step(
                    share.micros, partial(_of_share, loss_of, share), lr=self._lr(number, peak), enter=watch.enter
                )
            norms.append(norm if 0.0 <= norm < math.inf else math.inf)  # ZeRO-3 says -1 for NaN
            if math.isfinite(norms[-1]):
                for name, values in self._fresh.items():
                    self._sums.setdefault(name, []).extend(values)
        return norms

    def _judge(
        self, shares: Sequence[Share], norms: Sequence[Sequence[float]], *, task_ids: np.ndarray, version: int
    ) -> int:
        """How many steps were skipped, by either model."""
        skipped = 0
        for number, share in enumerate(shares):
            of_step = [found[number] for found in norms if found]
            if share.num_actions and of_step:
                is_finite = all(map(math.isfinite, of_step))
                skipped += not is_finite
                self._watch(is_finite=is_finite, task_ids=task_ids[share.members], version=version)
        return skipped

    def _watch(self, *, is_finite: bool, task_ids: np.ndarray, version: int) -> None:
        """Count steps that were skipped; end the run when they are too many."""
        if is_finite:
            self.state.nonfinite_in_row = 0
            return
        self.state.nonfinite_in_row += 1
        if self._ranks.leads:
            log.warning(
                "step skipped: loss or gradient not finite", extra={"version": version, "task_ids": task_ids.tolist()}
            )
        if self.state.nonfinite_in_row >= self._config.max_nonfinite_steps:
            raise DivergedError(
                f"learner.max_nonfinite_steps: {self.state.nonfinite_in_row} optimiser steps in a row had a loss or "
                f"gradient that is not finite, the last in the update from version {version} (dialogues "
                f"{task_ids.min()} to {task_ids.max()}); lower learner.lr and resume from the newest checkpoint"
            )

    def _inference_tokens(self) -> int:
        if self._actor.device.type == "cuda":
            return GPU_INFERENCE_FACTOR * self._config.micro_tokens
        return min(CPU_INFERENCE_TOKENS, self._config.micro_tokens)

    def _lr(self, step: int, peak: float) -> float:
        config = self._config
        return lr_at(step, total=self._total_steps, peak=peak, warmup=config.lr_warmup, min_ratio=config.lr_min_ratio)

    def _actor_loss(self, start: Start) -> Callable[[MicroBatch, Share], Tensor]:
        config, device, kl_coef = self._config, self._actor.device, self.state.kl_coef
        start = start.to(device)

        def loss_of(micro: MicroBatch, share: Share) -> Tensor:
            answer = self._actor(*inputs(micro, device), config.entropy_coef > 0, **where(micro))
            logprobs, entropies = (answer[0], answer[1]) if config.entropy_coef else (answer, None)
            flat = torch.from_numpy(micro.flat).to(device, non_blocking=True)
            old = logprobs.detach() if start.old is None else start.old[flat]
            behaviour = start.behaviour[flat]
            weights = importance_weights(old, behaviour, config.importance_cap)
            policy = policy_loss_sum(
                logprobs,
                old,
                weights,
                start.advantages[flat],
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
            )
            loss = policy.loss
            if start.reference is not None:
                distance = kl(logprobs, start.reference[flat], config.kl_estimator).sum()
                self._count(kl_ref=distance)
                loss = loss + kl_coef * distance
            if entropies is not None:
                loss = loss - config.entropy_coef * entropies.sum()
            self._count(
                actor_tokens=torch.tensor(float(micro.num_actions)),
                policy_loss=policy.loss,
                clip_fraction=policy.clipped_low + policy.clipped_high,
                clip_low_fraction=policy.clipped_low,
                clip_high_fraction=policy.clipped_high,
                kl_old=policy.kl_old,
                importance_mean=weights.sum(),
                importance_squares=weights.square().sum(),
                kl_behaviour=kl(behaviour, old).sum(),
                entropy=-old.sum() if entropies is None else entropies.sum(),
            )
            if config.dual_clip:
                self._count(dual_clip_fraction=policy.dual_clipped)
            return loss * self._factor(micro, share)

        return loss_of

    def _critic_loss(self, critic: TrainedModel, start: Start) -> Callable[[MicroBatch, Share], Tensor]:
        there = start.to(critic.device)
        assert there.values is not None and there.returns is not None
        before, targets = there.values, there.returns

        def loss_of(micro: MicroBatch, share: Share) -> Tensor:
            ids, positions, _ = inputs(micro, critic.device)
            flat = torch.from_numpy(micro.flat).to(critic.device, non_blocking=True)
            values = critic(ids, positions, **where(micro))
            value = value_loss_sum(values, before[flat], targets[flat], clip=self._config.value_clip)
            tokens = torch.tensor(float(micro.num_actions))
            self._count(value_loss=value.loss, value_clip_fraction=value.clipped, critic_tokens=tokens)
            return value.loss * self._factor(micro, share)

        return loss_of

    def _factor(self, micro: MicroBatch, share: Share) -> float:
        """What turns a micro-batch's token sum into its part of the minibatch's mean."""
        if self._config.loss_mean == "global":
            return 1.0 / share.num_actions
        return 1.0 / (max(1, micro.num_actions) * share.num_micros)

    def _count(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self._fresh.setdefault(name, []).append(value.detach())

    def _training_metrics(self) -> dict[str, float]:
        """Token means over the optimiser steps taken, on all ranks; nothing of a model that took none.

        kl_behaviour: k3 estimate of KL(sampling policy || ours at the start). importance_ess: effective share of the
        sample (Kish: mean weight squared over mean squared weight). entropy: of the whole distribution where
        `entropy_coef` asks for it, else mean of -log p of the sampled tokens, unbiased when sampling was on-policy.
        """
        names = sorted(self._sums)
        totals = self._ranks.sum([float(torch.stack(self._sums[name]).double().sum()) for name in names])
        sums = dict(zip(names, totals.tolist(), strict=True))
        critic_tokens, actor_tokens = sums.pop("critic_tokens", 0.0), sums.pop("actor_tokens", 0.0)
        means = {}
        for name, total in sums.items():
            tokens = critic_tokens if name.startswith("value_") else actor_tokens
            means[name] = total / tokens if tokens else 0.0
        if actor_tokens:
            means["importance_ess"] = means["importance_mean"] ** 2 / means.pop("importance_squares")
        return means


def _seconds(lap: dict[str, float]) -> dict[str, float]:
    """Of each part, and of the update as a whole."""
    return {f"{part}_s": seconds for part, seconds in lap.items()} | {"update_s": sum(lap.values())}


def _of_share(loss_of: Callable[[MicroBatch, Share], Tensor], share: Share, micro: MicroBatch) -> Tensor:
    return loss_of(micro, share)


def _norm_metrics(name: str, norms: Sequence[float]) -> dict[str, float]:
    """Mean and largest gradient norm, before clipping, of the steps taken; 0 without any."""
    taken = [norm for norm in norms if math.isfinite(norm)]
    return {name: float(np.mean(taken)) if taken else 0.0, f"{name}_max": max(taken, default=0.0)}
