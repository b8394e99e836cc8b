"""Before the first step of an update: what the weights at its start say of the batch, and the advantages.

Without gradient: log-probabilities under the policy and the reference, values. They can be asked for while the batch
is still coming in (`ask`). Out of them which dialogues are trained on at all, what each action earned, and how much
better that was than expected (`advantage`).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.contracts.settings import LearnerSection
from services.contracts.wire import Trajectory
from services.learner.advantage import Moments, gae, group_advantages, moments, returns_to_go, whiten
from services.learner.batch import MicroBatch, Plan
from services.learner.kl import kl
from services.learner.masking import without
from services.learner.mismatch import is_hopeless, per_dialogue
from services.learner.ranks import Ranks
from services.learner.sampler import group_of

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")

Float64 = NDArray[np.float64]


class FrozenModel(Protocol):
    """A model that only answers."""

    device: torch.device

    def __call__(self, *inputs: Tensor | bool, **where: Tensor) -> Tensor:
        """Forward pass; every rank does it equally often."""


class Answers(NamedTuple):
    """What the models say: fp32 CPU tensors [A], flat like `batch.Packed`; None where nobody asked."""

    old: Tensor | None  # None: the update is one step, whose own forward pass sees the very same weights
    values: Tensor | None
    reference: Tensor | None


class Start(NamedTuple):
    """What is known before the first step: fp32 tensors [A], flat like `batch.Packed`."""

    old: Tensor | None
    behaviour: Tensor
    reference: Tensor | None  # None where the loss has no KL
    values: Tensor | None  # None without a critic, like the returns
    advantages: Tensor
    returns: Tensor | None

    def to(self, device: torch.device) -> "Start":
        """The same on the device where the losses are computed."""
        there: Any = (None if tensor is None else tensor.to(device) for tensor in self)
        return Start(*there)


class FirstPass:
    """Prepares updates. critic, reference: None where the settings need none. one_step: an update is a single step."""

    def __init__(
        self,
        actor: FrozenModel,
        critic: FrozenModel | None,
        reference: FrozenModel | None,
        *,
        config: LearnerSection,
        ranks: Ranks,
        one_step: bool,
    ) -> None:
        self._actor, self._critic, self._reference = actor, critic, reference
        self._config, self._ranks = config, ranks
        self._kl_in_reward = reference is not None and config.kl_in == "reward"
        self._needs_old = not one_step or config.mismatch_limit > 0 or self._kl_in_reward
        self._known: dict[tuple[int, int], NDArray[np.float32]] = {}  # by `_identity`: [3, actions], like `Answers`
        self._known_version = -1

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask the models before an update."""
        return self._needs_old or self._critic is not None or self._reference is not None

    def is_known(self, trajectories: Sequence[Trajectory], *, version: int) -> NDArray[np.bool_]:
        """Which of them the models of `version` were asked about already."""
        if version != self._known_version:
            return np.zeros(len(trajectories), dtype=np.bool_)
        return np.array([_identity(trajectory) in self._known for trajectory in trajectories], dtype=np.bool_)

    @torch.no_grad()
    def ask(self, trajectories: Sequence[Trajectory], work: Plan, *, version: int) -> None:
        """Ask the models of `version` in advance; all ranks together. work: a plan of these trajectories."""
        if version != self._known_version:
            self._known, self._known_version = {}, version
        ends = np.cumsum(work.counts)
        found = np.zeros((3, int(ends[-1])))
        places = np.concatenate([np.zeros(0), *(np.arange(ends[i] - work.counts[i], ends[i]) for i in work.owned)])
        for row, answer in zip(found, self._ask(work), strict=True):
            if answer is not None:
                row[places.astype(np.int64)] = answer.numpy()
        whole = self._ranks.sum(found).astype(np.float32)
        for trajectory, end, count in zip(trajectories, ends, work.counts, strict=True):
            self._known[_identity(trajectory)] = whole[:, end - count : end]

    @torch.no_grad()
    def __call__(
        self, work: Plan, trajectories: Sequence[Trajectory], *, kl_coef: float
    ) -> tuple[Start, Plan, dict[str, float]]:
        """What the steps need, the plan without hopeless dialogues, metrics. trajectories: the whole batch."""
        task_ids = np.array([trajectory.task_id for trajectory in trajectories], dtype=np.int64)
        answers = self._ask(work)
        for i, start, end in zip(work.owned, work.packed.offsets, work.packed.offsets[1:], strict=False):
            if (known := self._known.get(_identity(trajectories[i]))) is not None and work.known[i]:
                for answer, row in zip(answers, known, strict=True):
                    if answer is not None:
                        answer[start:end] = torch.from_numpy(row)
        self._known = {}
        behaviour = torch.from_numpy(work.packed.behaviour)
        kept, metrics = self._judge(work, answers.old)
        work = without(work, kept, self._ranks)
        chosen = np.repeat(kept[work.owned], np.diff(work.packed.offsets))  # of this rank's tokens
        rewards = work.packed.rewards.astype(np.float64)
        if self._kl_in_reward and answers.old is not None and answers.reference is not None:
            distance = kl(answers.old, answers.reference, self._config.kl_estimator).double().numpy()
            rewards -= kl_coef * distance
            metrics["kl_ref"] = Moments(*self._ranks.sum(moments(distance[chosen])).tolist()).mean
        raw, returns = self._estimate(work, rewards, answers.values, task_ids, kept)
        whole = Moments(*self._ranks.sum(moments(raw[chosen])).tolist())
        is_whitened = self._config.advantage not in GROUP_ESTIMATORS
        advantages = whiten(raw, whole) if is_whitened else raw.astype(np.float32)
        metrics |= {"action_tokens": whole.number, "advantage_std": whole.variance**0.5}
        if answers.values is not None:
            metrics |= self._critic_metrics(returns[chosen], answers.values.double().numpy()[chosen])
        start = Start(
            old=answers.old,
            behaviour=behaviour,
            reference=None if self._kl_in_reward else answers.reference,
            values=answers.values,
            advantages=torch.from_numpy(advantages),
            returns=None if answers.values is None else torch.from_numpy(returns.astype(np.float32)),
        )
        return start, work, metrics

    def _ask(self, work: Plan) -> Answers:
        """Zeros for dialogues that are in no block of `work.inference`."""
        asked = (self._actor if self._needs_old else None, self._critic, self._reference)
        flat = torch.from_numpy(np.concatenate([[], *(micro.flat for micro in work.inference)]).astype(np.int64))
        said: list[list[Tensor]] = [[], [], []]
        for micro in work.inference:
            ids, positions, targets = inputs(micro, self._actor.device)
            for model, parts in zip(asked, said, strict=True):
                if model is not None:
                    tokens = (ids, positions) if model is self._critic else (ids, positions, targets)
                    parts.append(model(*tokens, **where(micro)))
        answers: list[Tensor | None] = []
        for model, parts in zip(asked, said, strict=True):
            answer = torch.zeros(len(work.packed.behaviour)) if model is not None else None
            if answer is not None and parts:
                answer[flat] = torch.cat(parts).cpu()  # one wait for the device, not one a block
            answers.append(answer)
        return Answers(*answers)

    def _judge(self, work: Plan, old: Tensor | None) -> tuple[NDArray[np.bool_], dict[str, float]]:
        """Which dialogues of the whole batch are kept."""
        if old is None or not self._config.mismatch_limit:
            return np.ones(len(work.counts), dtype=np.bool_), {}
        own = per_dialogue(old.numpy() - work.packed.behaviour, work.packed.offsets)
        mismatch = self._of_all(work, own)
        hopeless = is_hopeless(mismatch, limit=self._config.mismatch_limit)
        metrics = {"masked_dialogues": float(hopeless.sum())}
        if not hopeless.all():
            metrics |= {"mismatch_mean": float(mismatch[~hopeless].mean())}
            metrics |= {"mismatch_max": float(mismatch[~hopeless].max())}
        return ~hopeless, metrics

    def _estimate(
        self, work: Plan, rewards: Float64, values: Tensor | None, task_ids: NDArray[np.int64], kept: NDArray[np.bool_]
    ) -> tuple[Float64, Float64]:
        """Advantages and returns of this rank's actions, not yet whitened: [A] each."""
        config, offsets = self._config, work.packed.offsets
        if config.advantage == "gae":
            assert values is not None
            return gae(rewards, values.double().numpy(), offsets, gamma=config.gamma, lam=config.lam)
        if config.advantage == "reinforce_pp":
            returns = returns_to_go(rewards, offsets, gamma=config.gamma)
            return returns, returns
        own = np.array([rewards[a:b].sum() for a, b in itertools.pairwise(offsets)])
        groups = np.array([group_of(int(task_id), config.samples_per_problem) for task_id in task_ids], dtype=np.int64)
        scores = self._of_all(work, own)
        advantages = group_advantages(config.advantage, scores, groups, kept)[work.owned]
        flat = np.repeat(advantages, np.diff(offsets))
        return flat, flat

    def _of_all(self, work: Plan, own: Float64) -> Float64:
        """A figure of each dialogue of the whole batch, out of those of each rank's own."""
        every = np.zeros(len(work.counts))
        every[work.owned] = own
        return self._ranks.sum(every)

    def _critic_metrics(self, returns: Float64, values: Float64) -> dict[str, float]:
        """How good the critic is: over the action tokens of the batch."""
        totals = self._ranks.sum([*moments(returns), *moments(returns - values)]).tolist()
        whole, error = Moments(*totals[:3]), Moments(*totals[3:])
        explained = 1.0 - error.variance / whole.variance if whole.variance > 0 else 0.0
        return {"return_mean": whole.mean, "explained_variance": explained}


def inputs(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and targets on the device."""
    arrays = (micro.input_ids, micro.positions, micro.targets)
    ids, positions, targets = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return ids, positions, targets


def where(micro: MicroBatch) -> dict[str, Tensor]:
    """Where the dialogues of a row lie, as the models want to be told."""
    told = {"offsets": micro.offsets, "parents": micro.parents}
    return {name: torch.from_numpy(array) for name, array in told.items() if array is not None}


def _identity(trajectory: Trajectory) -> tuple[int, int]:
    """Tells a dialogue from another of the same task, which ran again after Redis lost the first."""
    return trajectory.task_id, hash(trajectory.token_ids.tobytes())
