"""What real vLLM sampled is what its weights say, token for token; and the same task is the same dialogue again.

Each engine runs the same 200 dialogues, several times, through the real DialogueRunner. The model writes boxes in one
token and byte by byte, with characters of several bytes in them.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from boxy_model import save_model
from dialogue_run import NUM_PREFIX, DialogueRun, Outcome, Pass
from exactness import agreement, recompute, share_identical
from transformers import Qwen2ForCausalLM

from services.contracts.config import RunConfig, load
from services.contracts.template import end_of_turn_ids, feedback_turn, prompt_ids, reply_ids
from services.contracts.wire import Attempt, Sampling, Task, Trajectory
from services.grader.answer import extract
from services.learner.arithmetic_model import build_tokenizer
from services.rollout.vllm_engine import BLOCK_TOKENS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
RUN_S = 150.0
NUM_TASKS = 200
TOKENS_PER_ATTEMPT = 24
DTYPES = ("float32", "bfloat16")
PASSES = (Pass(64), Pass(7, backwards=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in DTYPES}
    for dtype, folder in folders.items():
        save_model(folder, dtype=getattr(torch, dtype), spells=True)
    return folders


@pytest.fixture(scope="module")
def outcomes(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """By dtype; `other`: a second engine in fp32."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: DialogueRun(config(dtype), models[dtype], TASKS, passes, folder / name)
            for name, dtype, passes in (("float32", "float32", PASSES), ("bfloat16", "bfloat16", PASSES),
                                        ("other", "float32", PASSES[:1]))}  # fmt: skip
    return {name: run.wait(RUN_S) for name, run in runs.items()}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Qwen2ForCausalLM]:
    """The same weights in plain transformers."""
    return {
        dtype: Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        for dtype, folder in models.items()
    }


def config(dtype: str) -> RunConfig:
    flags = {
        "model.dtype": dtype, "model.max_model_len": "256", "dialogue.system_prompt": "You have {attempts}",
        "dialogue.tokens_per_attempt": str(TOKENS_PER_ATTEMPT), "rollout.device": "cpu", "rollout.threads": "1",
        "rollout.kv_cache_mb": "64",
    }  # fmt: skip
    return load(None, [f"--{key}={value}" for key, value in flags.items()], env={})


TASKS = [
    Task(task_id=i, batch=0, problem=f"{i}+1", gold=("7",) if i % 8 == 0 else ("8",), max_attempts=1 + i % 4,
         seed=1000 * i, sampling=Sampling(temperature=0.7 if i % 5 == 0 else None))
    for i in range(NUM_TASKS)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_behaviour_logprobs_are_those_of_the_weights(outcomes, references, dtype):
    for trajectories in outcomes[dtype].passes:
        pairs = [(task, trajectories[task.task_id]) for task in TASKS]
        found = agreement(
            [t.logprobs[t.action_mask] for _, t in pairs],
            [recompute(references[dtype], t, temperature=temperature(task)) for task, t in pairs],
        )
        assert found.num_tokens > 10 * NUM_TASKS
        if dtype == "float32":
            assert found.worst < 1e-4
        assert found.mean < 0.02
        assert 0 <= found.kl < 0.0005
        assert found.effective_share > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trajectory_is_its_prompt_its_attempts_and_its_feedback_and_nothing_else(outcomes, dtype):
    tokenizer, dialogue = build_tokenizer(), config(dtype).dialogue
    ends = end_of_turn_ids(tokenizer, dialogue)
    for trajectories in outcomes[dtype].passes:
        assert sorted(trajectories) == list(range(NUM_TASKS))
        for task in TASKS:
            trajectory = trajectories[task.task_id]
            ids, attempts = trajectory.token_ids.tolist(), trajectory.attempts
            expected = prompt_ids(tokenizer, dialogue, task.problem, max_attempts=task.max_attempts)
            for number, attempt in enumerate(attempts, start=1):
                assert attempt.start == len(expected)
                sampled = ids[attempt.start : attempt.end]
                expected += sampled
                if number < len(attempts):
                    turn = feedback_turn(dialogue, attempt.verdict, attempts_left=task.max_attempts - number)
                    expected += reply_ids(tokenizer, dialogue, turn, turn_closed=sampled[-1] in ends)
            assert ids == expected
            positions = np.concatenate([np.arange(attempt.start, attempt.end) for attempt in attempts])
            np.testing.assert_array_equal(np.flatnonzero(trajectory.action_mask), positions)
            np.testing.assert_array_equal(np.isfinite(trajectory.logprobs), trajectory.action_mask)
            np.testing.assert_array_equal(np.isnan(trajectory.logprobs), ~trajectory.action_mask)
            assert all(later.start > earlier.end for earlier, later in pairwise(attempts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attempt_ends_with_the_token_that_closes_its_first_box(outcomes, dtype):
    tokenizer = build_tokenizer()
    ends = end_of_turn_ids(tokenizer, config(dtype).dialogue)
    boxed = []
    for ids, attempt in attempts_of(outcomes[dtype].passes[0].values()):
        texts = [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        answers = [extract(text) for text in texts]
        assert all(answer is None for answer in answers[:-1])
        assert answers[-1] == attempt.extracted
        if answers[-1] is not None:
            boxed.append((ids, texts[-1]))
        else:
            assert ids[-1] in ends or len(ids) == TOKENS_PER_ATTEMPT
    spelled = [text for ids, text in boxed if "\\boxed{" not in tokenizer.convert_ids_to_tokens(ids)]
    assert len(spelled) > 20  # seven tokens to the brace
    for character in "é你🙂":
        assert any(f"\\boxed{{{character}}}" in text for text in spelled), character
    assert len(boxed) - len(spelled) > 20  # the brace and all before it in one token


def test_in_fp32_a_task_is_the_same_dialogue_on_another_engine_in_another_order_and_among_others(outcomes):
    first, backwards = outcomes["float32"].passes
    assert share_identical(first, backwards) == 1
    assert share_identical(first, outcomes["other"].passes[0]) == 1


def test_in_bf16_a_task_is_nearly_always_the_same_dialogue(outcomes):
    assert share_identical(*outcomes["bfloat16"].passes) > 0.9


def test_what_other_weights_cached_is_not_used_again(outcomes):
    for outcome in outcomes.values():
        assert outcome.cached_again == NUM_PREFIX // BLOCK_TOKENS * BLOCK_TOKENS
        assert outcome.cached_after_swap == 0


def temperature(task: Task) -> float:
    return task.sampling.temperature or 1.0  # None: the run's


def attempts_of(trajectories: Iterable[Trajectory]) -> Iterator[tuple[list[int], Attempt]]:
    """Sampled ids of every attempt, and the attempt."""
    for trajectory in trajectories:
        for attempt in trajectory.attempts:
            yield trajectory.token_ids[attempt.start : attempt.end].tolist(), attempt
