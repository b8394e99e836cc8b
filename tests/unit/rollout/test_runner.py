"""One dialogue with a scripted engine and grader: where attempts end, what is trained, what is graded."""

import msgspec
import pytest
from fakes import ABORTED, FakeEngine, FakeGrader, make_task

from services.contracts.config import load
from services.contracts.template import end_of_turn_ids
from services.contracts.wire import FinishReason, Verdict, decode_progress, encode, spans_cover_actions
from services.grader.client import GraderUnavailableError
from services.learner.arithmetic_model import build_tokenizer
from services.rollout.runner import DialogueRunner, GenerationAborted, UnrunnableTask

CORRECT, WRONG, NO_ANSWER = Verdict.CORRECT, Verdict.INCORRECT, Verdict.NO_ANSWER


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def make_runner(tokenizer):
    def make(engine, grader, *flags):
        config = load(None, ["--dialogue.system_prompt=", *flags], env={})
        return DialogueRunner(config, engine=engine, grader=grader, tokenizer=tokenizer, replica_id="r")

    return make


async def test_an_attempt_ends_at_the_token_that_closes_the_box(make_runner, ids, tokenizer):
    engine, grader = FakeEngine([ids("so \\boxed{3} and more")]), FakeGrader(CORRECT)
    trajectory = await make_runner(engine, grader).run(make_task())
    assert grader.responses == ["so \\boxed{3}"]
    assert tokenizer.decode(trajectory.token_ids[trajectory.action_mask]) == "so \\boxed{3}"
    assert spans_cover_actions(trajectory.versions, trajectory.action_mask)


async def test_versions_are_cut_with_the_tokens(make_runner, ids):
    engine = FakeEngine([ids("\\boxed{3} and more")], swap_at=2)
    trajectory = await make_runner(engine, FakeGrader(CORRECT)).run(make_task())
    start = trajectory.attempts[0].start
    assert [(s.version, s.start - start, s.end - start) for s in trajectory.versions] == [(0, 0, 2), (1, 2, 3)]


async def test_a_sampled_end_of_turn_is_trained_and_not_spliced_in_again(make_runner, ids, tokenizer):
    config = load(None, [], env={})
    [end] = ids("<|im_end|>")
    assert end in end_of_turn_ids(tokenizer, config.dialogue)
    engine = FakeEngine([[*ids("none"), end], ids("\\boxed{2}")])
    trajectory = await make_runner(engine, FakeGrader(NO_ANSWER, CORRECT)).run(make_task())
    attempt = trajectory.attempts[0]
    assert trajectory.token_ids[attempt.end - 1] == end
    assert trajectory.action_mask[attempt.end - 1]
    assert trajectory.token_ids[attempt.end] != end
    assert not trajectory.action_mask[attempt.end]


async def test_an_end_of_turn_spliced_in_after_a_box_is_not_trained(make_runner, ids):
    engine = FakeEngine([ids("\\boxed{3}"), ids("\\boxed{2}")])
    trajectory = await make_runner(engine, FakeGrader(WRONG, CORRECT)).run(make_task())
    [end] = ids("<|im_end|>")
    attempt = trajectory.attempts[0]
    assert trajectory.token_ids[attempt.end] == end
    assert not trajectory.action_mask[attempt.end]


async def test_the_second_prompt_is_the_first_one_the_attempt_and_honest_feedback(make_runner, ids, tokenizer):
    engine = FakeEngine([ids("\\boxed{3}!!"), ids("\\boxed{2}")])
    trajectory = await make_runner(engine, FakeGrader(WRONG, CORRECT)).run(make_task(attempts=2))
    first, second = engine.prompts
    assert second[: len(first) + 3] == first + ids("\\boxed{3}")
    assert "You have 1 attempt left" in tokenizer.decode(second[len(first) :])
    assert trajectory.token_ids.tolist() == second + ids("\\boxed{2}")
    assert engine.seeds == [7, 8]


async def test_where_verdicts_are_kept_every_attempt_is_made_and_asked_for_alike(make_runner, ids, tokenizer):
    engine = FakeEngine([ids("\\boxed{2}"), ids("\\boxed{3}"), ids("\\boxed{2}")])
    runner = make_runner(engine, FakeGrader(CORRECT, WRONG, CORRECT))
    trajectory = await runner.run(make_task(attempts=3), feedback="none")
    assert [attempt.verdict for attempt in trajectory.attempts] == [CORRECT, WRONG, CORRECT]
    assert trajectory.finish_reason is FinishReason.SOLVED
    told = tokenizer.decode(trajectory.token_ids[~trajectory.action_mask])
    assert "You have 2 attempts left. Try again." in told and "You have 1 attempt left. Try again." in told
    assert "incorrect" not in told


async def test_where_verdicts_are_kept_only_the_last_attempt_earns(make_runner, ids):
    engine, grader = FakeEngine([ids("\\boxed{2}"), ids("\\boxed{3}")]), FakeGrader(CORRECT, WRONG)
    trajectory = await make_runner(engine, grader, "--dialogue.feedback=none").run(make_task(attempts=2))
    assert not trajectory.is_solved
    assert trajectory.finish_reason is FinishReason.ATTEMPTS
    assert trajectory.reward == -0.5


async def test_the_words_after_an_attempt_without_a_verdict_can_be_set(make_runner, ids, tokenizer):
    engine = FakeEngine([ids("\\boxed{2}"), ids("\\boxed{2}")])
    runner = make_runner(
        engine, FakeGrader(CORRECT, CORRECT), "--dialogue.feedback=none", "--dialogue.feedback_none={n} more."
    )
    trajectory = await runner.run(make_task(attempts=2))
    assert "1 more." in tokenizer.decode(trajectory.token_ids[~trajectory.action_mask])


async def test_a_caller_may_ask_for_other_feedback_than_the_run_has(make_runner, ids):
    engine, grader = FakeEngine([ids("\\boxed{2}"), ids("\\boxed{3}")]), FakeGrader(CORRECT, WRONG)
    runner = make_runner(engine, grader, "--dialogue.feedback=none")
    trajectory = await runner.run(make_task(attempts=2), feedback="truth")
    assert [attempt.verdict for attempt in trajectory.attempts] == [CORRECT]
    assert trajectory.reward == 1.0


async def test_without_stop_at_box_the_attempt_runs_on(make_runner, ids):
    engine, grader = FakeEngine([ids("\\boxed{3} or \\boxed{4}")]), FakeGrader(CORRECT)
    await make_runner(engine, grader, "--dialogue.stop_at_box=false").run(make_task())
    assert grader.responses == ["\\boxed{3} or \\boxed{4}"]


async def test_a_spent_budget_ends_the_dialogue(make_runner, ids):
    engine = FakeEngine([ids("thinking on and on")])
    trajectory = await make_runner(engine, FakeGrader(NO_ANSWER), "--dialogue.tokens_per_dialogue=5").run(make_task())
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert trajectory.action_mask.sum() == 5


async def test_a_prompt_without_room_for_one_token_can_never_run(make_runner, ids):
    exact = FakeEngine([ids("x")])
    await make_runner(exact, FakeGrader(NO_ANSWER)).run(make_task(attempts=1))
    length = len(exact.prompts[0])
    with pytest.raises(UnrunnableTask, match=f"the prompt has {length} tokens, the context is {length}"):
        await make_runner(FakeEngine([]), FakeGrader(), f"--model.max_model_len={length}").run(make_task())
    engine = FakeEngine([ids("xyz")])
    trajectory = await make_runner(engine, FakeGrader(NO_ANSWER), f"--model.max_model_len={length + 1}").run(
        make_task()
    )
    assert trajectory.action_mask.sum() == 1


async def test_a_gold_answer_nobody_can_parse_can_never_run(make_runner, ids):
    runner = make_runner(FakeEngine([ids("\\boxed{3}")]), FakeGrader(Verdict.UNPARSABLE_GOLD))
    with pytest.raises(UnrunnableTask, match="gold"):
        await runner.run(make_task())


async def test_a_grader_that_is_away_gives_no_trajectory(make_runner, ids):
    with pytest.raises(GraderUnavailableError):
        await make_runner(FakeEngine([ids("\\boxed{3}")]), FakeGrader(None)).run(make_task())


async def test_an_attempt_that_somebody_else_ended_is_not_judged(make_runner):
    grader = FakeGrader()
    with pytest.raises(GenerationAborted):
        await make_runner(FakeEngine([ABORTED]), grader).run(make_task())
    assert grader.responses == []


@pytest.mark.parametrize("done", [1, 2])
async def test_a_resumed_dialogue_is_the_one_that_was_never_interrupted(make_runner, ids, done):
    script = [ids("\\boxed{3}"), [*ids("none"), *ids("<|im_end|>")], ids("so \\boxed{2}")]
    verdicts, saved = [WRONG, NO_ANSWER, CORRECT], []
    whole = await make_runner(FakeEngine(script, swap_at=1), FakeGrader(*verdicts)).run(
        make_task(), on_progress=saved.append
    )
    assert [len(progress.attempts) for progress in saved] == [1, 2]
    engine = FakeEngine(script[done:], swap_at=1)
    progress = decode_progress(encode(saved[done - 1]))
    resumed = await make_runner(engine, FakeGrader(*verdicts[done:])).run(make_task(), resume=progress)
    assert resumed.token_ids.tobytes() == whole.token_ids.tobytes()
    assert resumed.logprobs.tobytes() == whole.logprobs.tobytes()
    assert resumed.action_mask.tobytes() == whole.action_mask.tobytes()
    assert (resumed.versions, resumed.attempts) == (whole.versions, whole.attempts)
    assert (resumed.reward, resumed.finish_reason) == (whole.reward, whole.finish_reason)
    assert engine.seeds == [7 + attempt for attempt in range(done, 3)]
    assert resumed.timings.total_s >= progress.timings.total_s


async def test_progress_of_weights_that_are_too_old_for_the_task_is_not_gone_on_with(make_runner, ids):
    script, saved = [ids("\\boxed{3}"), ids("\\boxed{2}")], []
    await make_runner(FakeEngine(script, swap_at=2), FakeGrader(WRONG, CORRECT)).run(
        make_task(), on_progress=saved.append
    )
    assert {span.version for span in saved[0].versions} == {0, 1}  # the oldest decides
    engine = FakeEngine(script)
    newer = msgspec.structs.replace(make_task(), min_version=1)
    await make_runner(engine, FakeGrader(WRONG, CORRECT)).run(newer, resume=saved[0])
    assert len(engine.prompts) == 2


async def test_a_dialogue_that_ends_leaves_no_progress(make_runner, ids):
    saved = []
    engine = FakeEngine([ids("\\boxed{3}")] * 2)
    await make_runner(engine, FakeGrader(WRONG, WRONG)).run(make_task(attempts=2), on_progress=saved.append)
    assert len(saved) == 1
