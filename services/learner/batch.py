"""From trajectories to arrays: what each rank trains on, in which micro-batches. NumPy only.

Every rank sees the whole batch and computes the same plan, so no rank need ask another. Layout: all action tokens of
a rank's dialogues lie flat, one dialogue behind the other (feedback and prompt deleted); a micro-batch is a block of
input ids with, for each of its action tokens, the position that predicts it and the place in the flat arrays. The
block is one row in which dialogues of any lengths lie behind one another ("packed"), the same with what they have in
common only once ("shared", see `prefixes`), or a row for each of them, right-padded ("padded"). What a loss does with
them is in `losses` and `ppo`.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.contracts.rewards import attempt_reward
from services.contracts.wire import Trajectory
from services.learner import prefixes
from services.learner.sampler import group_of

Int64 = NDArray[np.int64]
RewardAt = Literal["dialogue", "attempt"]
Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. B rows of T tokens, of which A predict an action; A = 0 only keeps ranks in step."""

    input_ids: Int64  # in one row [1, T]; padded [B, T] with 0: under causal attention nothing looks at the padding
    positions: Int64  # [A] in the flattened [B * T]: position t predicts token t + 1
    targets: Int64  # [A] the action tokens themselves
    flat: Int64  # [A] place of each in the rank's flat arrays
    offsets: NDArray[np.int32] | None = None  # of one row [S + 1]: where each segment begins in it, and its end
    parents: NDArray[np.int32] | None = None  # shared [S]: the segment before each, or -1; else each is a dialogue

    @property
    def num_actions(self) -> int:
        """A."""
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class Packed:
    """A rank's dialogues, flat. D dialogues, A action tokens."""

    behaviour: NDArray[np.float32]  # [A] log-probability when sampled
    rewards: NDArray[np.float32]  # [A] earned by each action
    offsets: Int64  # [D + 1]
    inputs: tuple[Int64, ...]  # per dialogue: ids up to its last action, exclusive (nothing after is predicted)
    predicts: tuple[Int64, ...]  # per dialogue: positions that predict an action
    targets: tuple[Int64, ...]  # per dialogue: its actions


def defect(trajectory: Trajectory) -> str | None:
    """Why this trajectory cannot be trained on; None when it can. One of them would spoil or end every update."""
    mask = trajectory.action_mask
    if not mask.any() or mask[0]:
        return "needs a prompt and at least one action token"
    if not (np.isfinite(trajectory.logprobs[mask]).all() and np.isfinite(trajectory.reward)):
        return "a log-probability or the reward is not finite"
    return None


def fingerprint(trajectories: Sequence[Trajectory]) -> str:
    """16 hexadecimal digits that differ when what is trained on differs: tasks, tokens, log-probabilities, rewards."""
    found = hashlib.sha256()
    for trajectory in trajectories:
        found.update(f"{trajectory.task_id} {trajectory.reward!r} {len(trajectory.token_ids)};".encode())
        for array in (trajectory.token_ids, trajectory.action_mask, trajectory.logprobs):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def whole_groups_first(trajectories: Sequence[Trajectory], samples_per_problem: int) -> list[Trajectory]:
    """Reordered by group: the larger first, else what came first. A group lacks a member whose dialogue was lost."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(group_of(trajectory.task_id, samples_per_problem), []).append(trajectory)
    return [trajectory for group in sorted(groups.values(), key=len, reverse=True) for trajectory in group]


def action_rewards(trajectory: Trajectory, reward_at: RewardAt) -> NDArray[np.float32]:
    """What each action token earns: [actions].

    "dialogue": the reward at the last one (paper.md section 2). "attempt": the same, and every earlier attempt what
    its verdict is worth, at its own last token.
    """
    actions = np.flatnonzero(trajectory.action_mask)
    rewards = np.zeros(len(actions), dtype=np.float32)
    rewards[-1] = trajectory.reward
    if reward_at == "attempt":
        for attempt in trajectory.attempts[:-1]:
            rewards[np.searchsorted(actions, attempt.end) - 1] += attempt_reward(attempt.verdict)
    return rewards


def pack(trajectories: Sequence[Trajectory], *, reward_at: RewardAt = "dialogue") -> Packed:
    """Flatten trajectories. Raises ValueError for one without actions, or whose first token is an action."""
    inputs, predicts, targets, behaviour, rewards = [], [], [], [], []
    for trajectory in trajectories:
        actions = np.flatnonzero(trajectory.action_mask)
        if not len(actions) or actions[0] == 0:
            raise ValueError(f"trajectory {trajectory.task_id}: needs a prompt and at least one action token")
        inputs.append(trajectory.token_ids[: actions[-1]].astype(np.int64))
        predicts.append(actions - 1)
        targets.append(trajectory.token_ids[actions].astype(np.int64))
        behaviour.append(trajectory.logprobs[actions])
        rewards.append(action_rewards(trajectory, reward_at))
    counts = [len(actions) for actions in targets]
    return Packed(
        behaviour=np.concatenate(behaviour) if behaviour else np.zeros(0, np.float32),
        rewards=np.concatenate(rewards) if rewards else np.zeros(0, np.float32),
        offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        inputs=tuple(inputs),
        predicts=tuple(predicts),
        targets=tuple(targets),
    )


def minibatches(num_dialogues: int, num_minibatches: int, random: np.random.Generator) -> list[Int64]:
    """A random partition of the dialogues into minibatches of (nearly) equal size."""
    return [np.sort(part) for part in np.array_split(random.permutation(num_dialogues), num_minibatches)]


def shard(members: Int64, lengths: Int64, world: int) -> list[Int64]:
    """Divide a minibatch among ranks: equal numbers of dialogues, similar numbers of tokens (dealt there and back)."""
    by_length = members[np.argsort(-lengths[members], kind="stable")]
    place = np.arange(len(by_length))
    turn, seat = place // world, place % world
    owner = np.where(turn % 2 == 0, seat, world - 1 - seat)
    return [np.sort(by_length[owner == rank]) for rank in range(world)]


def buckets(members: Int64, lengths: Int64, micro_tokens: int) -> list[Int64]:
    """Cut dialogues into micro-batches of similar lengths: rows x longest <= micro_tokens.

    A dialogue longer than `micro_tokens` gets a micro-batch of its own. Longest first: the first one shows whether
    memory suffices.
    """
    by_length = members[np.argsort(-lengths[members], kind="stable")]
    found, start = [], 0
    while start < len(by_length):
        rows = max(1, micro_tokens // max(1, int(lengths[by_length[start]])))
        found.append(by_length[start : start + rows])
        start += rows
    return found


def bins(members: Int64, lengths: Int64, micro_tokens: int) -> list[Int64]:
    """Fill micro-batches with dialogues of any lengths up to `micro_tokens`: the longest first, each where it fits.

    A dialogue longer than `micro_tokens` gets a micro-batch of its own.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for i in members[np.argsort(-lengths[members], kind="stable")].tolist():
        length = int(lengths[i])
        place = next((place for place, left in enumerate(room) if left >= length), len(found))
        if place == len(found):
            found.append([])
            room.append(micro_tokens)
        found[place].append(i)
        room[place] -= length
    return [np.array(one, dtype=np.int64) for one in found]


def micro_batch(packed: Packed, members: Int64, layout: Layout = "padded") -> MicroBatch:
    """The block of these dialogues (indices into `packed`)."""
    inputs = [packed.inputs[i] for i in members]
    lengths = [len(ids) for ids in inputs]
    offsets = parents = None
    if layout == "shared":
        ids, offsets, parents, places = prefixes.grow(inputs)
        input_ids = ids[None]
    elif layout == "packed":
        input_ids = np.concatenate(inputs)[None]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        places = [np.arange(start, end) for start, end in itertools.pairwise(offsets.tolist())]
    else:
        input_ids = np.zeros((len(members), max(lengths)), dtype=np.int64)
        for row, ids in zip(input_ids, inputs, strict=True):
            row[: len(ids)] = ids
        places = [np.arange(length) + row * max(lengths) for row, length in enumerate(lengths)]
    return MicroBatch(
        input_ids=input_ids,
        positions=np.concatenate([place[packed.predicts[i]] for i, place in zip(members, places, strict=True)]),
        targets=np.concatenate([packed.targets[i] for i in members]),
        flat=np.concatenate([np.arange(packed.offsets[i], packed.offsets[i + 1]) for i in members]),
        offsets=offsets,
        parents=parents,
    )


def empty_micro_batch() -> MicroBatch:
    """One token, no action: what a rank with fewer micro-batches than others passes, so that collectives match."""
    nothing = np.zeros(0, dtype=np.int64)
    return MicroBatch(input_ids=np.zeros((1, 1), dtype=np.int64), positions=nothing, targets=nothing, flat=nothing)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank does in one minibatch."""

    members: Int64  # the minibatch's dialogues on all ranks, as indices into the batch
    micros: list[MicroBatch]
    num_actions: int  # of the minibatch on all ranks: the global token mean divides by it
    num_micros: int  # of the minibatch on all ranks, without the empty ones


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank does in one update."""

    packed: Packed  # its dialogues
    owned: Int64  # [D] which they are, as indices into the batch
    counts: Int64  # action tokens of every dialogue in the batch
    shares: list[Share]  # per minibatch
    inference: list[MicroBatch]  # its dialogues that are not known, in larger blocks
    known: NDArray[np.bool_]  # [dialogues of the batch] what the models were asked about before


class Blocks(NamedTuple):
    """How dialogues are cut into micro-batches."""

    layout: Layout
    micro_tokens: int  # of those that are trained on
    inference_tokens: int  # of those that are only asked about


def plan(
    trajectories: Sequence[Trajectory],
    *,
    parts: Sequence[Int64],
    rank: int,
    world: int,
    blocks: Blocks,
    reward_at: RewardAt = "dialogue",
    known: NDArray[np.bool_] | None = None,
) -> Plan:
    """Rank `rank`'s part of an update. parts: the minibatches, as indices into `trajectories`.

    known: of which trajectories the models were asked before; None: of none. A pure function of its arguments; all
    ranks get the same number of micro-batches in each minibatch.
    """
    counts = np.array([int(t.action_mask.sum()) for t in trajectories], dtype=np.int64)
    lengths = np.array([int(np.flatnonzero(t.action_mask)[-1]) for t in trajectories], dtype=np.int64)
    dialogues = [t.token_ids[:length] for t, length in zip(trajectories, lengths, strict=True)]
    by_part = [shard(part, lengths, world) for part in parts]
    owned = np.concatenate([ranks[rank] for ranks in by_part])
    packed = pack([trajectories[i] for i in owned], reward_at=reward_at)
    local = {int(i): place for place, i in enumerate(owned)}

    def cut(members: Int64, micro_tokens: int) -> list[Int64]:
        if blocks.layout == "shared":
            return prefixes.cut(members, dialogues, micro_tokens)
        return (bins if blocks.layout == "packed" else buckets)(members, lengths, micro_tokens)

    def build(cuts: list[list[Int64]]) -> list[MicroBatch]:
        mine = [
            micro_batch(packed, np.array([local[int(i)] for i in members]), blocks.layout) for members in cuts[rank]
        ]
        return mine + [empty_micro_batch()] * (max(map(len, cuts)) - len(mine))

    shares = []
    for part, ranks in zip(parts, by_part, strict=True):
        cuts = [cut(members, blocks.micro_tokens) for members in ranks]
        shares.append(Share(part, build(cuts), int(counts[part].sum()), sum(map(len, cuts))))
    known = np.zeros(len(trajectories), dtype=np.bool_) if known is None else known
    everyone = [np.concatenate([ranks[r] for ranks in by_part]) for r in range(world)]
    inference = build([cut(members[~known[members]], blocks.inference_tokens) for members in everyone])
    return Plan(packed, owned, counts, shares, inference, known)
