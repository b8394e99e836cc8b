"""Dialogues kept for people: which, how they read, and that they stay within their bytes."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from learner_data import make_trajectory

from services.contracts.samples import read_dialogue, read_index, step_files, step_path
from services.contracts.wire import Task, Trajectory, Verdict
from services.learner.samples import Insight, Samples, choose, thin, token_texts


class Bytes:
    """A tokenizer with a token for each byte, which drops a leading space as SentencePiece ones do."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def batch_of(size: int) -> list[Trajectory]:
    return [make_trajectory(i, attempts=1 + i % 3) for i in range(size)]


def insight(batch: list[Trajectory], owned: list[int]) -> Insight:
    counts = [int(batch[i].action_mask.sum()) for i in owned]
    values = np.concatenate([np.full(n, i, dtype=np.float32) for i, n in zip(owned, counts, strict=True)])
    return Insight(np.array(owned), np.array([0, *np.cumsum(counts)]), values)


def samples(folder: Path, **options: Any) -> Samples:
    def task_of(trajectory: Trajectory) -> Task:
        i = trajectory.task_id
        return Task(task_id=i, batch=0, problem=f"What is {i}?", gold=(str(i),), max_attempts=3, seed=0)

    options = {"count": 4, "max_bytes": 1 << 20, "task_of": task_of, "load_tokenizer": Bytes} | options
    return Samples(folder, **options)


@pytest.mark.parametrize("text", ["so it is 4", " leading", "größer ≤ 𝄞 end", "日本"])
def test_texts_of_tokens_are_the_text_also_where_characters_are_split(text: str) -> None:
    texts = token_texts(Bytes(), list(text.encode()))
    assert len(texts) == len(text.encode())
    assert "".join(texts) == text.removeprefix(" ")


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    assert token_texts(Bytes(), list(b"a" + "≤".encode()[:2])) == ["a", "", "�"]


def test_every_kind_of_dialogue_is_chosen_before_a_second_of_one() -> None:
    batch = batch_of(20)
    attempts = (msgspec.structs.replace(batch[7].attempts[0], verdict=Verdict.CORRECT), *batch[7].attempts[1:])
    batch[7] = msgspec.structs.replace(batch[7], attempts=attempts[:1])
    assert 7 in choose(batch, range(20), count=3, seed=5)
    assert len(set(choose(batch, range(20), count=50, seed=5))) == 20


def test_what_is_kept_is_read_back_with_advantages_on_sampled_tokens_alone(tmp_path: Path) -> None:
    batch = batch_of(6)
    keeper = samples(tmp_path, count=2)
    keeper.keep(3, batch, insight(batch, [4, 1, 5]))
    keeper.close()
    index = read_index(step_path(tmp_path, 3))
    assert index.step == 3 and len(index.dialogues) == 2
    for found in index.dialogues:
        assert found.task_id in (4, 1, 5)
        dialogue = read_dialogue(step_path(tmp_path, 3), found.task_id)
        assert dialogue is not None and dialogue.problem == f"What is {found.task_id}?"
        mask = batch[found.task_id].action_mask
        assert [a is not None for a in dialogue.advantages] == mask.tolist()
        assert {a for a in dialogue.advantages if a is not None} == {float(found.task_id)}
        assert [p is not None for p in dialogue.logprobs] == mask.tolist()
    assert read_dialogue(step_path(tmp_path, 3), 99) is None


def test_a_tokenizer_that_fails_costs_the_samples_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise OSError("no tokenizer here")

    batch = batch_of(2)
    keeper = samples(tmp_path, load_tokenizer=broken)
    keeper.keep(1, batch, insight(batch, [0, 1]))
    keeper.close()
    assert step_files(tmp_path) == {} and "dialogues were not kept" in caplog.text


def test_a_full_folder_keeps_the_first_the_newest_and_thins_out_the_old(tmp_path: Path) -> None:
    for step in range(1, 101):
        step_path(tmp_path, step).write_bytes(b"x" * 100)
        thin(tmp_path, 2_000)
    steps = list(step_files(tmp_path))
    assert len(steps) == 20 and steps[0] == 1 and steps[-3:] == [98, 99, 100]
    gaps = np.diff(steps)
    assert gaps[:6].mean() > 2 * gaps[-6:].mean()


def test_a_resumed_run_forgets_the_steps_it_will_do_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        step_path(tmp_path, step).write_bytes(b"")
    samples(tmp_path).forget_after(2)
    assert list(step_files(tmp_path)) == [1, 2]
