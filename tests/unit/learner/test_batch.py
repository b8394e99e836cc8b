from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_data import logprobs_from_logits, make_trajectory

from services.contracts.wire import Trajectory
from services.learner.batch import (
    Blocks,
    Plan,
    buckets,
    defect,
    fingerprint,
    minibatches,
    pack,
    plan,
    shard,
    whole_groups_first,
)


def make_batch(count: int) -> list[Trajectory]:
    return [make_trajectory(i, attempts=1 + i % 3) for i in range(count)]


def make_plans(
    trajectories: Sequence[Trajectory], *, world: int, micro_tokens: int, num_minibatches: int = 1
) -> list[Plan]:
    parts = minibatches(len(trajectories), num_minibatches, np.random.default_rng(0))
    return [
        plan(trajectories, parts=parts, rank=r, world=world, blocks=Blocks("padded", micro_tokens, 64))
        for r in range(world)
    ]


class ToyModel(torch.nn.Module):
    """Causal: an embedding, a running mean over the past, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[None, :, None]
        return logprobs_from_logits(self.head(hidden.flatten(0, 1)[positions]), targets, 1.0)


def loss_and_gradients(plans: list[Plan]) -> tuple[float, list[torch.Tensor]]:
    """Global token mean of -logprob over all minibatches, summed over ranks as the optimiser would."""
    model, total = ToyModel(), torch.zeros(())
    for part in plans:
        for share in part.shares:
            for micro in share.micros:
                arrays = (torch.from_numpy(a) for a in (micro.input_ids, micro.positions, micro.targets))
                total = total - model(*arrays).sum() / share.num_actions
    total.backward()
    return total.item(), [p.grad for p in model.parameters() if p.grad is not None]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(4, 200), st.integers(4, 17))
def test_any_division_into_ranks_and_micro_batches_has_the_same_loss_and_gradients(
    world: int, micro_tokens: int, count: int
) -> None:
    batch = make_batch(count)
    loss, gradients = loss_and_gradients(make_plans(batch, world=world, micro_tokens=micro_tokens))
    whole_loss, whole_gradients = loss_and_gradients(make_plans(batch, world=1, micro_tokens=10**6))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradients, whole_gradients, rtol=1e-4, atol=1e-6)


def test_logprobs_land_where_their_tokens_are() -> None:
    batch = make_batch(7)
    (mine,) = make_plans(batch, world=1, micro_tokens=20, num_minibatches=2)
    found = np.full(len(mine.packed.behaviour), -1)
    for micro in mine.inference:
        found[micro.flat] = micro.targets
    assert np.array_equal(found, np.concatenate(mine.packed.targets))
    rows = [micro.input_ids.flatten()[micro.positions] for micro in mine.inference]
    assert all(len(row) == micro.num_actions for row, micro in zip(rows, mine.inference, strict=True))


def test_a_position_predicts_the_token_after_it() -> None:
    batch = make_batch(1)
    (mine,) = make_plans(batch, world=1, micro_tokens=100)
    micro = mine.shares[0].micros[0]
    ids = batch[0].token_ids
    assert np.array_equal(ids[micro.positions + 1], micro.targets)
    assert np.array_equal(np.flatnonzero(batch[0].action_mask), micro.positions + 1)


def test_every_dialogue_is_in_exactly_one_minibatch_on_one_rank() -> None:
    batch = make_batch(23)
    plans = make_plans(batch, world=3, micro_tokens=30, num_minibatches=4)
    assert sum(len(p.packed.inputs) for p in plans) == 23
    tokens = sum(int(t.action_mask.sum()) for t in batch)
    assert sum(m.num_actions for p in plans for s in p.shares for m in s.micros) == tokens
    assert sum(s.num_actions for s in plans[0].shares) == tokens


def test_ranks_have_equally_many_micro_batches() -> None:
    plans = make_plans(make_batch(13), world=3, micro_tokens=20, num_minibatches=2)
    counts = [[len(share.micros) for share in p.shares] + [len(p.inference)] for p in plans]
    assert counts[0] == counts[1] == counts[2]
    real = sum(micro.num_actions > 0 for p in plans for micro in p.shares[0].micros)
    assert real == plans[0].shares[0].num_micros


def test_micro_batches_stay_under_their_tokens_unless_one_dialogue_alone_does_not() -> None:
    lengths = np.array([3, 50, 7, 7, 8, 2, 30])
    cuts = buckets(np.arange(7), lengths, micro_tokens=32)
    assert sorted(int(i) for cut in cuts for i in cut) == list(range(7))
    assert all(len(cut) == 1 or len(cut) * lengths[cut].max() <= 32 for cut in cuts)
    assert [int(cut[0]) for cut in cuts[:2]] == [1, 6]


def test_shards_are_balanced() -> None:
    lengths = np.arange(1, 101)
    shards = shard(np.arange(100), lengths, 4)
    assert [len(s) for s in shards] == [25] * 4
    totals = [int(lengths[s].sum()) for s in shards]
    assert max(totals) - min(totals) <= 100


def test_a_trajectory_without_actions_is_refused() -> None:
    empty = make_trajectory(3)
    empty.action_mask[:] = False
    with pytest.raises(ValueError, match="trajectory 3"):
        pack([empty])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"reward": float("nan")}, "not finite"),
        ({"logprobs": np.full(13, -np.inf, np.float32)}, "not finite"),
        ({"action_mask": np.zeros(13, bool)}, "at least one action"),
        ({"action_mask": np.ones(13, bool)}, "needs a prompt"),
    ],
)
def test_a_trajectory_that_cannot_be_trained_on_says_why(change: dict[str, Any], reason: str | None) -> None:
    found = defect(msgspec.structs.replace(make_trajectory(0), **change))  # it has 13 tokens
    assert found is None if reason is None else reason in str(found)


def test_a_batch_has_another_fingerprint_when_anything_that_is_trained_on_differs() -> None:
    batch = make_batch(4)
    first = batch[0]
    logprobs = first.logprobs.copy()
    logprobs[-1] -= 1e-6
    tokens = first.token_ids.copy()
    tokens[0] += 1
    others = [
        batch[1:],
        [batch[1], batch[0], *batch[2:]],
        [msgspec.structs.replace(first, task_id=99), *batch[1:]],
        [msgspec.structs.replace(first, reward=first.reward - 0.5), *batch[1:]],
        [msgspec.structs.replace(first, logprobs=logprobs), *batch[1:]],
        [msgspec.structs.replace(first, token_ids=tokens), *batch[1:]],
    ]
    assert fingerprint(make_batch(4)) == fingerprint(batch)
    assert len({fingerprint(one) for one in [batch, *others]}) == 7


def test_a_batch_takes_whole_groups_before_broken_ones_and_else_what_came_first() -> None:
    there = [make_trajectory(i) for i in (9, 2, 0, 5, 4, 3, 8, 1, 6)]  # of three each: 0-2 and 3-5 whole, 7 is lost
    order = [trajectory.task_id for trajectory in whole_groups_first(there, 3)]
    assert order == [2, 0, 1, 5, 4, 3, 8, 6, 9]


def test_without_groups_a_batch_takes_what_came_first() -> None:
    there = [make_trajectory(i) for i in (9, 2, 0)]
    assert whole_groups_first(there, 1) == there
