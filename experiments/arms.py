"""What is trained: the arms of the experiment, each the same configuration with few settings changed.

All start from one model (warm-up included), learn from one set of problems and are judged on another, the same for all;
a training seed decides the order of problems, the numbers of attempts, sampling and the critic's head.
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
    also_blind: bool = False
    """Those of FEWER are evaluated without feedback too."""


MULTI, SINGLE, SYNCHRONOUS, STALE, BLIND = "multi", "single", "synchronous", "stale-4", "blind"
ARMS = (
    Arm(MULTI, "multi-attempt, N in 1..5", also_blind=True),
    Arm(SINGLE, "single attempt, N = 1", ("--dialogue.max_attempts=1",)),
    Arm(
        SYNCHRONOUS,
        "staleness 0",
        # Nothing is generated while the learner works, so each has both cores in its turn.
        ("--learner.max_staleness=0", "--learner.threads=0", "--rollout.threads=0"),
        FEWER,
    ),
    Arm(STALE, "staleness 4", ("--learner.max_staleness=4",), FEWER),
    Arm(BLIND, "multi-attempt without feedback", ("--dialogue.feedback=none",), FEWER, also_blind=True),
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

    @property
    def feedback(self) -> tuple[Feedback, ...]:
        """What its model is evaluated with."""
        return ("truth", "none") if self.arm.also_blind and self.seed in FEWER else ("truth",)


def trainings(arms: Sequence[Arm] = ARMS) -> list[Training]:
    """All of them: first those that the claims are about, and one seed after the other, so that what is there at any
    time is a whole experiment, only smaller.
    """
    first = [arm for arm in arms if arm.name in (MULTI, SINGLE)]
    rest = [arm for arm in arms if arm not in first]
    return [Training(arm, seed) for group in (first, rest) for seed in SEEDS for arm in group if seed in arm.seeds]
