"""What one attempt earns by its verdict (design.md section 3). What a dialogue earns is its environment's to say."""

from services.contracts.wire import Verdict

SOLVED = 1.0
WRONG = -0.5
NO_ANSWER = -1.0


def attempt_reward(verdict: Verdict) -> float:
    """+1 correct, -1 without an answer, -0.5 for any other answer (one that could not be compared is not accepted)."""
    if verdict is Verdict.CORRECT:
        return SOLVED
    return NO_ANSWER if verdict is Verdict.NO_ANSWER else WRONG
