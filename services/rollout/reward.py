"""Verdicts -> one number for the dialogue (design: +1 solved; else by the last attempt, -0.5 wrong box, -1 no box)."""

from collections.abc import Sequence

from services.contracts.rewards import NO_ANSWER, SOLVED, WRONG
from services.contracts.settings import DialogueSection
from services.contracts.wire import Verdict


def reward(verdicts: Sequence[Verdict], settings: DialogueSection) -> float:
    """Reward of a dialogue whose attempts were judged `verdicts`, in order; an unfinished attempt counts as NO_ANSWER.

    A correct k-th attempt earns `attempt_discount ** (k - 1)`. Otherwise `reward = "last"` goes by the last attempt;
    `reward = "paper"` keeps -0.5 once any attempt had an answer (paper.md section 1.4).
    """
    if Verdict.CORRECT in verdicts:
        return SOLVED * settings.attempt_discount ** verdicts.index(Verdict.CORRECT)
    judged = verdicts if settings.reward == "paper" else verdicts[-1:]
    return WRONG if any(verdict is not Verdict.NO_ANSWER for verdict in judged) else NO_ANSWER
