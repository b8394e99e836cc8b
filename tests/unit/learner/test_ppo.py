"""The update itself, over small torch models with a plain optimiser: no DeepSpeed, no processes."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_data import logprobs_and_entropy, logprobs_from_logits, make_trajectory

from services.contracts.config import load
from services.contracts.settings import LearnerSection
from services.contracts.wire import Trajectory, Verdict
from services.learner.batch import MicroBatch, action_rewards
from services.learner.ppo import DivergedError, Ppo, PpoState
from services.learner.ranks import Ranks

VOCAB = 50
Enter = Callable[[str], None]


class Toy(torch.nn.Module):
    """Causal: an embedding, a running mean over the past, a head; an actor, or with `outputs` 1 a critic."""

    def __init__(self, outputs: int = VOCAB, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, outputs)
        self.outputs, self.device = outputs, torch.device("cpu")
        self.optimiser = torch.optim.SGD(self.parameters(), lr=1.0)
        self.steps = 0

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[None, :, None]
        out = self.head(hidden.flatten(0, 1)[positions])
        if self.outputs == 1:
            return out.squeeze(-1)
        return (logprobs_and_entropy if rest[1:] == (True,) else logprobs_from_logits)(out, rest[0], 1.0)

    def step(
        self, micros: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], torch.Tensor], *, lr: float, enter: Enter
    ) -> float:
        self.optimiser.zero_grad()
        for micro in micros:
            enter("forward")
            loss = loss_of(micro)
            enter("backward")
            loss.backward()
        enter("optimiser")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf))
        if math.isfinite(norm):
            self.optimiser.param_groups[0]["lr"] = lr
            self.optimiser.step()
        self.steps += 1
        return norm


class Poisoned(Toy):
    """Its gradients are not numbers in these steps."""

    def __init__(self, bad: range) -> None:
        super().__init__()
        self.bad = bad

    def step(
        self, micros: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], torch.Tensor], *, lr: float, enter: Enter
    ) -> float:
        if self.steps in self.bad:
            return super().step(micros, lambda micro: loss_of(micro) * math.nan, lr=lr, enter=enter)
        return super().step(micros, loss_of, lr=lr, enter=enter)


def settings(**flags: object) -> LearnerSection:
    base = {"batch_dialogues": 8, "minibatch_dialogues": 4, "micro_tokens": 40, "lr": 0.1, "critic_lr": 0.1}
    return load(None, [f"--learner.{name}={value}" for name, value in (base | flags).items()], env={}).learner


def make_ppo(config: LearnerSection, actor: Toy | None = None) -> Ppo:
    return Ppo(
        actor or Toy(),
        Toy(1) if config.advantage == "gae" else None,
        Toy(seed=1) if config.kl_coef else None,
        config=config,
        ranks=Ranks(rank=0, local_rank=0, world=1, control=None),
        seed=0,
        total_updates=10,
    )


def sampled(count: int, *, first: int = 0) -> list[Trajectory]:
    """Dialogues whose log-probabilities are those of a fresh `Toy`, or nearly."""
    batch = []
    for i in range(first, first + count):
        trajectory = make_trajectory(i, attempts=1 + i % 3)
        actions = np.flatnonzero(trajectory.action_mask)
        with torch.no_grad():
            exact = Toy()(
                torch.from_numpy(trajectory.token_ids.astype(np.int64))[None],
                torch.from_numpy(actions - 1),
                torch.from_numpy(trajectory.token_ids[actions].astype(np.int64)),
            )
        logprobs = np.full(len(trajectory.token_ids), np.nan, dtype=np.float32)
        logprobs[actions] = exact.numpy() + np.random.default_rng(i).normal(0, 0.1, len(actions))
        batch.append(msgspec.structs.replace(trajectory, logprobs=logprobs))
    return batch


def weights(ppo: Ppo) -> list[torch.Tensor]:
    models = [model for model in (ppo._actor, ppo._critic) if isinstance(model, Toy)]
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce_pp")


@pytest.mark.parametrize("flags", [{"advantage": name} for name in ESTIMATORS] + [{"loss_mean": "paper"}], ids=str)
def test_a_hopeless_dialogue_leaves_what_a_batch_without_it_would(flags: dict[str, str]) -> None:
    batch = sampled(8)
    mask = batch[5].action_mask
    broken = msgspec.structs.replace(batch[5], logprobs=np.where(mask, batch[5].logprobs - 9, np.nan).astype("f4"))
    groups = {"samples_per_problem": 4} if flags.get("advantage") in ("grpo", "dr_grpo", "rloo") else {}
    # One micro-batch a minibatch; for "paper", whose loss is a mean of theirs, each dialogue has its own.
    micro = {"micro_tokens": 1} if "loss_mean" in flags else {"micro_tokens": 10_000}
    config = settings(minibatch_dialogues=8, **flags, **groups, **micro)
    with_it = make_ppo(config)
    metrics = with_it.update([*batch[:5], broken, *batch[6:]], version=0)
    without = make_ppo(config)
    expected = without.update([*batch[:5], *batch[6:]], version=0)
    assert (metrics["masked_dialogues"], expected["masked_dialogues"]) == (1.0, 0.0)
    torch.testing.assert_close(weights(with_it), weights(without), rtol=1e-4, atol=1e-6)
    for name in [name for name in expected if name != "masked_dialogues" and not name.endswith("_s")]:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_with_every_dialogue_hopeless_nothing_moves() -> None:
    ppo = make_ppo(settings())
    before = weights(ppo)
    worst = [msgspec.structs.replace(t, logprobs=t.logprobs - 50) for t in sampled(8)]
    assert ppo.update(worst, version=0)["masked_dialogues"] == 8.0
    torch.testing.assert_close(weights(ppo), before, rtol=0, atol=0)


@pytest.mark.parametrize("micro_tokens", [1, 17, 10_000])
@pytest.mark.parametrize(
    "flags", [{}, {"advantage": "reinforce_pp", "kl_in": "reward"}, {"entropy_coef": 0.01}], ids=str
)
def test_any_split_into_micro_batches_is_the_same_update(micro_tokens: int, flags: dict[str, object]) -> None:
    batch = sampled(8)
    found, expected = make_ppo(settings(micro_tokens=micro_tokens, **flags)), make_ppo(settings(**flags))
    figures = [ppo.update(batch, version=0) for ppo in (found, expected)]
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-6)
    assert figures[0]["policy_loss"] == pytest.approx(figures[1]["policy_loss"], rel=1e-4, abs=1e-6)


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_dialogues_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ppo = make_ppo(settings(epochs=2), Poisoned(range(1, 2)))
    with caplog.at_level(logging.WARNING):
        metrics = ppo.update(sampled(8, first=80), version=0)
    assert metrics["nonfinite_steps"] == 1.0 and ppo.state.nonfinite_in_row == 0
    (record,) = [r for r in caplog.records if "skipped" in r.message]
    assert len(record.task_ids) == 4 and set(record.task_ids) < set(range(80, 88))  # type: ignore[attr-defined]
    assert all(math.isfinite(value) for value in metrics.values())


def test_too_many_of_them_in_a_row_end_the_run_even_over_a_restart() -> None:
    config = settings(max_nonfinite_steps=3)
    first = make_ppo(config, Poisoned(range(2)))
    first.update(sampled(8), version=0)
    assert first.state == PpoState(kl_coef=0.01, nonfinite_in_row=2)
    second = make_ppo(config, Poisoned(range(2)))
    second.restore(first.state)
    with pytest.raises(DivergedError, match=r"max_nonfinite_steps: 3 optimiser steps in a row .* version 1 "):
        second.update(sampled(8), version=1)


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_every_estimator_makes_what_was_rewarded_likelier_and_only_gae_has_a_critic(advantage: str) -> None:
    config = settings(advantage=advantage, samples_per_problem=4, kl_coef=0, lr=1.0, lr_warmup=0)
    batch = [msgspec.structs.replace(t, reward=1.0 if i % 2 else -1.0) for i, t in enumerate(sampled(8))]
    ppo = make_ppo(config)
    before = [float(np.nansum(t.logprobs)) for t in batch]
    metrics = ppo.update(batch, version=0)
    after = []
    for trajectory in batch:
        actions = np.flatnonzero(trajectory.action_mask)
        ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
        assert isinstance(ppo._actor, Toy)
        after.append(float(ppo._actor(ids[None], torch.from_numpy(actions - 1), ids[actions]).sum().detach()))
    change = np.array(after) - before
    assert change[1::2].mean() > change[::2].mean()
    assert ("value_loss" in metrics) == ("explained_variance" in metrics) == (advantage == "gae")


def test_the_kl_coefficient_follows_its_target_from_update_to_update() -> None:
    ppo = make_ppo(settings(kl_target=1e-6, kl_coef=0.1))
    assert [ppo.update(sampled(8), version=v)["kl_coef"] for v in (0, 1)] == pytest.approx([0.1, 0.102])
    fixed = make_ppo(settings(kl_coef=0.3))
    fixed.restore(PpoState(kl_coef=0.1))
    assert fixed.state.kl_coef == 0.3


def test_a_kl_in_the_reward_is_taken_off_each_actions_return() -> None:
    # One step, no whitening of a lone difference: with dr_grpo the group's mean score falls out.
    batch = [msgspec.structs.replace(t, reward=0.0) for t in sampled(8)]
    flags: dict[str, object] = {"advantage": "dr_grpo", "samples_per_problem": 4, "kl_coef": 0.5}
    still, pulled = make_ppo(settings(**flags | {"kl_coef": 0})), make_ppo(settings(**flags, kl_in="reward"))
    assert still.update(batch, version=0)["advantage_std"] == 0.0
    metrics = pulled.update(batch, version=0)
    assert metrics["advantage_std"] > 0 and metrics["kl_ref"] > 0


def test_rewards_of_attempts_stand_at_their_last_tokens() -> None:
    verdicts = (Verdict.INCORRECT, Verdict.NO_ANSWER, Verdict.CORRECT)
    trajectory = make_trajectory(0, attempts=3)
    attempts = [msgspec.structs.replace(a, verdict=v) for a, v in zip(trajectory.attempts, verdicts, strict=True)]
    trajectory = msgspec.structs.replace(trajectory, attempts=tuple(attempts), reward=0.81)
    lengths = [attempt.end - attempt.start for attempt in attempts]
    expected = np.zeros(sum(lengths), dtype=np.float32)
    expected[np.cumsum(lengths) - 1] = [-0.5, -1.0, 0.81]
    np.testing.assert_array_equal(action_rewards(trajectory, "attempt"), expected)
    expected[np.cumsum(lengths)[:2] - 1] = 0.0
    np.testing.assert_array_equal(action_rewards(trajectory, "dialogue"), expected)
