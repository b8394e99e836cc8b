"""Segments alone decide what is trained; budgets and verdicts alone decide when a dialogue is over."""

import math

import numpy as np
import pytest
from fakes import make_task
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.settings import DialogueSection
from services.contracts.wire import FinishReason, Timings, Verdict, decode_trajectory, encode, spans_cover_actions
from services.rollout.dialogue import Dialogue, Sampled
from services.rollout.reward import reward

TIMINGS = Timings(generate_s=1.0, grade_s=0.5, total_s=1.5)
WRONG = Verdict.INCORRECT


def sampled(*token_ids: int, closed: bool = False, cut: bool = False, versions=None) -> Sampled:
    logprobs = [-0.1 * (i + 1) for i in range(len(token_ids))]
    spans = versions or ([(0, 0, len(token_ids))] if token_ids else [])
    return Sampled(token_ids, logprobs, spans, closed_turn=closed, hit_length=cut)


def make_dialogue(*, attempts: int = 3, context: int = 100, prompt: int = 4, **fields) -> Dialogue:
    section = DialogueSection(**fields)
    return Dialogue(
        task=make_task(attempts=attempts),
        settings=section,
        max_model_len=context,
        token_ids=list(range(90, 90 + prompt)),
        reward_of=lambda verdicts: reward(verdicts, section),
    )


def judge(dialogue: Dialogue, attempt: Sampled, verdict: Verdict) -> None:
    dialogue.add_attempt(attempt, verdict=verdict, extracted="3", grading_ms=2.0)


def finish(dialogue: Dialogue):
    return dialogue.trajectory(replica_id="r", timings=TIMINGS)


def test_a_correct_attempt_ends_the_dialogue():
    dialogue = make_dialogue()
    judge(dialogue, sampled(1, 2), Verdict.CORRECT)
    assert dialogue.finish_reason is FinishReason.SOLVED
    assert finish(dialogue).reward == 1.0


def test_the_last_allowed_attempt_ends_the_dialogue():
    dialogue = make_dialogue(attempts=2)
    judge(dialogue, sampled(1), WRONG)
    assert (dialogue.finish_reason, dialogue.attempts_left) == (None, 1)
    dialogue.add_feedback([50])
    judge(dialogue, sampled(2), WRONG)
    assert dialogue.finish_reason is FinishReason.ATTEMPTS
    assert finish(dialogue).token_ids.tolist() == [90, 91, 92, 93, 1, 50, 2]


def test_feedback_and_prompt_are_not_trained_and_a_sampled_end_of_turn_is():
    dialogue = make_dialogue(attempts=2, prompt=2)
    judge(dialogue, sampled(1, 7, closed=True), WRONG)
    dialogue.add_feedback([50, 51])
    judge(dialogue, sampled(2), WRONG)
    trajectory = finish(dialogue)
    assert trajectory.action_mask.tolist() == [False, False, True, True, False, False, True]
    np.testing.assert_allclose(trajectory.logprobs[[2, 3, 6]], [-0.1, -0.2, -0.1], rtol=1e-6)
    assert np.isnan(trajectory.logprobs[~trajectory.action_mask]).all()


def test_versions_move_with_the_attempt():
    dialogue = make_dialogue(attempts=1, prompt=2)
    judge(dialogue, sampled(1, 2, 3, versions=[(4, 0, 1), (5, 1, 3)]), WRONG)
    assert [(s.version, s.start, s.end) for s in finish(dialogue).versions] == [(4, 2, 3), (5, 3, 5)]


def test_tokens_without_a_version_are_refused():
    dialogue = make_dialogue(attempts=1)
    judge(dialogue, sampled(1, 2, 3, versions=[(4, 0, 2)]), WRONG)
    with pytest.raises(AssertionError, match="version spans"):
        finish(dialogue)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tokens_per_attempt": 5}, 5),
        ({"tokens_per_dialogue": 7}, 7),
        ({"context": 13}, 9),
        ({"context": 4}, 0),
    ],
)
def test_the_tightest_budget_counts(fields, expected):
    assert make_dialogue(**fields).budget == expected


def test_the_dialogue_budget_is_spent_by_all_attempts_and_not_by_feedback():
    dialogue = make_dialogue(tokens_per_dialogue=5)
    judge(dialogue, sampled(1, 2), WRONG)
    dialogue.add_feedback([50] * 10)
    assert dialogue.budget == 3


def test_an_attempt_cut_by_its_own_budget_may_be_followed_by_another():
    dialogue = make_dialogue(tokens_per_attempt=2)
    judge(dialogue, sampled(1, 2, cut=True), Verdict.NO_ANSWER)
    assert dialogue.finish_reason is None


def test_a_spent_dialogue_budget_ends_the_dialogue():
    dialogue = make_dialogue(tokens_per_dialogue=2)
    judge(dialogue, sampled(1, 2, cut=True), Verdict.NO_ANSWER)
    assert dialogue.finish_reason is FinishReason.LENGTH
    assert finish(dialogue).reward == -1.0


def test_feedback_that_leaves_no_room_ends_the_dialogue_and_is_not_kept():
    dialogue = make_dialogue(context=10, prompt=4)
    judge(dialogue, sampled(1, 2), WRONG)
    dialogue.add_feedback([50, 51, 52, 53])
    assert dialogue.finish_reason is FinishReason.LENGTH
    assert len(finish(dialogue).token_ids) == 6


def test_each_attempt_has_its_own_seed():
    dialogue = make_dialogue()
    first = dialogue.seed
    judge(dialogue, sampled(1), WRONG)
    assert dialogue.seed == first + 1


def test_an_attempt_without_tokens_is_an_attempt():
    dialogue = make_dialogue(attempts=2)
    judge(dialogue, sampled(), Verdict.NO_ANSWER)
    dialogue.add_feedback([50])
    judge(dialogue, sampled(1), WRONG)
    assert [(a.start, a.end) for a in finish(dialogue).attempts] == [(4, 4), (5, 6)]


ATTEMPT = st.tuples(st.lists(st.integers(0, 40), min_size=0, max_size=6), st.lists(st.integers(0, 40), max_size=4))


@given(st.lists(ATTEMPT, min_size=1, max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_the_mask_is_true_exactly_on_sampled_tokens(script, data):
    """All tokens come from one small vocabulary: no search in the text could tell sampled ones from the rest."""
    dialogue = make_dialogue(attempts=len(script), context=1000)
    expected = [(token, False) for token in dialogue.token_ids]
    for number, (tokens, feedback) in enumerate(script, start=1):
        swap = data.draw(st.integers(0, len(tokens)))
        spans = [(v, s, e) for v, s, e in ((number, 0, swap), (number + 1, swap, len(tokens))) if s < e]
        judge(dialogue, sampled(*tokens, versions=spans), WRONG)
        expected += [(token, True) for token in tokens]
        if number < len(script):
            dialogue.add_feedback(feedback)
            expected += [(token, False) for token in feedback]
    trajectory = finish(dialogue)
    assert list(zip(trajectory.token_ids.tolist(), trajectory.action_mask.tolist(), strict=True)) == expected
    assert [not math.isnan(x) for x in trajectory.logprobs] == trajectory.action_mask.tolist()
    assert spans_cover_actions(trajectory.versions, trajectory.action_mask)
    if trajectory.action_mask.any():
        decode_trajectory(encode(trajectory))
