"""What is trained: the arms of the experiment, each the same configuration with few settings changed.

All but the one without feedback start from one model, warm-up included. All learn from one set of problems and are
judged on another, the same for all; a training seed decides the order of problems, the numbers of attempts, sampling
and the critic's head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.evaluation.plan import Feedback

CONFIG = Path("configs/reproduce.toml")
SEEDS = (1, 2, 3)
FEWER = (1,)  # of what stands beside the two arms that the claims are about


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training. title: as tables call it; flags: beyond CONFIG; seeds: a training for each."""

    name: str
    title: str
    flags: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    own_start: bool = False
    """Its warm-up shows its own dialogues: what it is told in them stands in no other's."""
    feedback: tuple[Feedback, ...] = ("truth",)
    """What its models are evaluated with."""


MULTI, SINGLE, SYNCHRONOUS, STALE, BLIND = "multi", "single", "synchronous", "stale-4", "blind"
ARMS = (
    Arm(MULTI, "multi-attempt, N in 1..5"),
    Arm(SINGLE, "single attempt, N = 1", ("--dialogue.max_attempts=1",)),
    Arm(
        SYNCHRONOUS,
        "staleness 0",
        # Nothing is generated while the learner works, so each has both cores in its turn.
        ("--learner.max_staleness=0", "--learner.threads=0", "--rollout.threads=0"),
        FEWER,
    ),
    Arm(STALE, "staleness 4", ("--learner.max_staleness=4",), FEWER),
    Arm(
        BLIND,
        "multi-attempt without feedback",
        ("--dialogue.feedback=none",),
        FEWER,
        own_start=True,
        feedback=("truth", "none"),
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}


@dataclass(frozen=True, slots=True)
class Training:
    """One run."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.arm.name}-{self.seed}"


def trainings(arms: Sequence[Arm] = ARMS) -> list[Training]:
    """All of them: first those that the claims are about, and one seed after the other, so that what is there at any
    time is a whole experiment, only smaller.
    """
    first = [arm for arm in arms if arm.name in (MULTI, SINGLE)]
    rest = [arm for arm in arms if arm not in first]
    return [Training(arm, seed) for group in (first, rest) for seed in SEEDS for arm in group if seed in arm.seeds]
