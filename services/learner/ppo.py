"""The arithmetic of one PPO update (paper.md section 2, design.md section 4), over models given from outside.

First pass, without gradient: log-probabilities under the weights at the start of the update, values, reference. Then
GAE and whitening over the whole batch. Then one optimiser step of actor and critic for each minibatch. Which
trajectories, and what becomes of the new weights, is decided elsewhere.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.contracts.settings import LearnerSection
from services.contracts.wire import Trajectory
from services.learner.advantage import Moments, gae, moments, whiten
from services.learner.batch import MicroBatch, Plan, Share, minibatches, plan
from services.learner.losses import importance_weights, k3_sum, policy_loss_sum, value_loss_sum
from services.learner.ranks import Ranks
from services.learner.sampler import STREAM_MINIBATCH, generator
from services.learner.schedule import lr_at

GPU_INFERENCE_FACTOR = 4  # without gradients a block may be this much larger
CPU_INFERENCE_TOKENS = 4096  # larger blocks leave the caches: measured 1.5x slower


class FrozenModel(Protocol):
    """A model that only answers."""

    device: torch.device

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Forward pass; every rank does it equally often."""


class TrainedModel(FrozenModel, Protocol):
    """A model with an optimiser."""

    def step(self, micros: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], Tensor], *, lr: float) -> float:
        """One optimiser step on the sum of the losses over micro-batches and ranks; returns the gradient norm."""


class Start(NamedTuple):
    """What is known before the first step: fp32 CPU tensors [A], flat like `batch.Packed`."""

    old: Tensor | None  # None: the update is one step, whose own forward pass sees the very same weights
    behaviour: Tensor
    reference: Tensor | None
    values: Tensor
    advantages: Tensor
    returns: Tensor


class Ppo:
    """Updates actor and critic. reference: needed when `kl_coef` > 0. total_updates: of the whole run."""

    def __init__(
        self,
        actor: TrainedModel,
        critic: TrainedModel,
        reference: FrozenModel | None,
        *,
        config: LearnerSection,
        ranks: Ranks,
        seed: int,
        total_updates: int,
    ) -> None:
        assert (reference is not None) == (config.kl_coef > 0)
        self._actor, self._critic, self._reference = actor, critic, reference
        self._config, self._ranks, self._seed = config, ranks, seed
        self._minibatches = config.batch_dialogues // config.minibatch_dialogues
        self._steps_per_update = config.epochs * self._minibatches
        self._total_steps = total_updates * self._steps_per_update
        self._sums: dict[str, list[Tensor]] = {}

    def update(self, trajectories: Sequence[Trajectory], *, version: int) -> dict[str, float]:
        """Train on one batch, the same on every rank, starting from weights `version`. Returns metrics.

        Raises FloatingPointError when a gradient was not finite. The weights here are then spoilt: do not publish them.
        """
        started = time.monotonic()
        self._sums = {}
        random = generator(self._seed, STREAM_MINIBATCH, version)
        work = plan(
            trajectories,
            parts=minibatches(len(trajectories), self._minibatches, random),
            rank=self._ranks.rank,
            world=self._ranks.world,
            micro_tokens=self._config.micro_tokens,
            inference_tokens=self._inference_tokens(),
        )
        start, metrics = self._start(work)
        prepared = time.monotonic()
        step = version * self._steps_per_update
        actor_norms, critic_norms = [], []
        for _ in range(self._config.epochs):
            # Membership stays as drawn, so that ranks need not exchange anything; the order is drawn anew.
            for number in random.permutation(self._minibatches):
                share = work.shares[number]
                if version >= self._config.critic_warmup:
                    lr = self._lr(step, self._config.lr)
                    actor_norms.append(self._actor.step(share.micros, self._actor_loss(start, share), lr=lr))
                critic_lr = self._lr(step, self._config.critic_lr)
                critic_norms.append(self._critic.step(share.micros, self._critic_loss(start, share), lr=critic_lr))
                step += 1
        if not all(0.0 <= norm < np.inf for norm in [*actor_norms, *critic_norms]):  # ZeRO-3 says -1 for NaN
            raise FloatingPointError(f"update from version {version}: gradient norms {actor_norms}, {critic_norms}")
        metrics |= self._training_metrics()
        metrics |= {
            "lr": self._lr(step - 1, self._config.lr) if actor_norms else 0.0,
            "critic_lr": critic_lr,
            "grad_norm": float(np.mean(actor_norms)) if actor_norms else 0.0,
            "critic_grad_norm": float(np.mean(critic_norms)),
            "prepare_s": prepared - started,
            "update_s": time.monotonic() - prepared,
        }
        return metrics

    def _inference_tokens(self) -> int:
        if self._actor.device.type == "cuda":
            return GPU_INFERENCE_FACTOR * self._config.micro_tokens
        return min(CPU_INFERENCE_TOKENS, self._config.micro_tokens)

    def _lr(self, step: int, peak: float) -> float:
        config = self._config
        return lr_at(step, total=self._total_steps, peak=peak, warmup=config.lr_warmup, min_ratio=config.lr_min_ratio)

    @torch.no_grad()
    def _start(self, work: Plan) -> tuple[Start, dict[str, float]]:
        packed = work.packed
        values = torch.zeros(len(packed.behaviour))
        old = torch.zeros_like(values) if self._steps_per_update > 1 else None
        reference = torch.zeros_like(values) if self._reference is not None else None
        for micro in work.inference:
            ids, positions, targets = _inputs(micro, self._actor.device)
            flat = torch.from_numpy(micro.flat)
            if old is not None:
                old[flat] = self._actor(ids, positions, targets).cpu()
            values[flat] = self._critic(ids, positions).cpu()
            if self._reference is not None and reference is not None:
                reference[flat] = self._reference(ids, positions, targets).cpu()
        config = self._config
        raw, returns = gae(packed.rewards, values.numpy(), packed.offsets, gamma=config.gamma, lam=config.lam)
        whole = Moments(*self._ranks.sum(moments(raw)).tolist())
        start = Start(
            old=old,
            behaviour=torch.from_numpy(packed.behaviour),
            reference=reference,
            values=values,
            advantages=torch.from_numpy(whiten(raw, whole)),
            returns=torch.from_numpy(returns.astype(np.float32)),
        )
        return start, self._start_metrics(start, raw=whole, exact_returns=returns)

    def _actor_loss(self, start: Start, share: Share) -> Callable[[MicroBatch], Tensor]:
        config = self._config

        def loss_of(micro: MicroBatch) -> Tensor:
            device = self._actor.device
            logprobs = self._actor(*_inputs(micro, device))
            flat = torch.from_numpy(micro.flat)
            old = logprobs.detach() if start.old is None else start.old[flat].to(device)
            behaviour = start.behaviour[flat].to(device)
            policy = policy_loss_sum(
                logprobs,
                old,
                behaviour,
                start.advantages[flat].to(device),
                clip=config.clip,
                importance_cap=config.importance_cap,
            )
            loss = policy.loss
            self._count(policy_loss=policy.loss, clip_fraction=policy.clipped, kl_old=policy.kl_old)
            if start.reference is not None:
                kl = k3_sum(logprobs, start.reference[flat].to(device))
                self._count(kl_ref=kl)
                loss = loss + config.kl_coef * kl
            weights = importance_weights(old, behaviour, config.importance_cap)
            self._count(
                actor_tokens=torch.tensor(float(micro.num_actions)),
                importance_mean=weights.sum(),
                importance_squares=weights.square().sum(),
                kl_behaviour=k3_sum(behaviour, old),
                entropy=-old.sum(),
            )
            return loss * self._factor(micro, share)

        return loss_of

    def _critic_loss(self, start: Start, share: Share) -> Callable[[MicroBatch], Tensor]:
        def loss_of(micro: MicroBatch) -> Tensor:
            device = self._critic.device
            ids, positions, _ = _inputs(micro, device)
            flat = torch.from_numpy(micro.flat)
            old, returns = start.values[flat].to(device), start.returns[flat].to(device)
            loss = value_loss_sum(self._critic(ids, positions), old, returns, clip=self._config.value_clip)
            self._count(value_loss=loss, critic_tokens=torch.tensor(float(micro.num_actions)))
            return loss * self._factor(micro, share)

        return loss_of

    def _factor(self, micro: MicroBatch, share: Share) -> float:
        """What turns a micro-batch's token sum into its part of the minibatch's mean."""
        if self._config.loss_mean == "global":
            return 1.0 / share.num_actions
        return 1.0 / (max(1, micro.num_actions) * share.num_micros)

    def _count(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self._sums.setdefault(name, []).append(value.detach())

    def _training_metrics(self) -> dict[str, float]:
        """Token means over all optimiser steps and ranks; nothing of the actor while only the critic is trained.

        kl_behaviour: k3 estimate of KL(sampling policy || ours at the start). importance_ess: effective share of the
        sample. entropy: mean of -log p of the sampled tokens, unbiased when sampling was on-policy.
        """
        names = sorted(self._sums)
        totals = self._ranks.sum([float(sum(self._sums[name])) for name in names])
        sums = dict(zip(names, totals.tolist(), strict=True))
        means = {"value_loss": sums.pop("value_loss") / sums.pop("critic_tokens")}
        if "actor_tokens" in sums:
            tokens = sums.pop("actor_tokens")
            means |= {name: total / tokens for name, total in sums.items()}
            means["importance_ess"] = means["importance_mean"] ** 2 / means.pop("importance_squares")
        return means

    def _start_metrics(self, start: Start, *, raw: Moments, exact_returns: NDArray[np.float64]) -> dict[str, float]:
        """How good the critic is: over the action tokens of the batch."""
        errors = exact_returns - start.values.double().numpy()
        totals = self._ranks.sum([*moments(exact_returns), *moments(errors)]).tolist()
        returns, error = Moments(*totals[:3]), Moments(*totals[3:])
        return {
            "action_tokens": returns.number,
            "return_mean": returns.mean,
            "advantage_std": raw.variance**0.5,
            "explained_variance": 1.0 - error.variance / returns.variance if returns.variance > 0 else 0.0,
        }


def _inputs(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    arrays = (micro.input_ids, micro.positions, micro.targets)
    ids, positions, targets = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return ids, positions, targets
