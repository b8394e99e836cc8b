"""`multiattempt eval`: what it refuses, in one line; and which model is meant."""

import json
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.eval_arguments import split_overrides
from services.cli.evaluate import progress_line
from services.cli.model_source import find_model, fingerprint
from services.contracts.config import ConfigError, RunConfig, load
from services.evaluation.asking import Tally


def run(*words: object) -> int:
    try:
        return main(["eval", *map(str, words)])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def model_folder(folder: Path, **described: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **described}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: --benchmarks"),
        (["--benchmarks", "heldout"], "eval: a MODEL is missing, or running replicas by --rollout URL"),
        (["m", "--benchmarks", "aime25"], "unknown benchmark 'aime25'; known: aime24, "),
        (["m", "--benchmarks", "aime24", "--data", "nowhere"], "nowhere/aime24.jsonl: no such file"),
        (["m", "--benchmarks", "heldout", "--attempts", "1-65"], "--attempts: 1-65: a dialogue has 1 to 64 attempts"),
        (["m", "--benchmarks", "heldout,heldout"], "--benchmarks: one is named twice"),
        (["m", "--benchmarks", "heldout", "--temperature", "0", "--seeds", "2"], "--seeds: greedy"),
        (["m", "--benchmarks", "heldout", "--concurrency", "0"], "--concurrency: 0: at least 1"),
        (["m", "--benchmarks", "heldout", "--dialogue.reward", "best"], "--dialogue.reward: dialogue.reward"),
        (["m", "--benchmarks", "heldout", "--sampels", "2"], "unrecognized arguments: --sampels"),
        (["./none", "--benchmarks", "heldout"], "./none: no model there; expected a run's folder"),
        (["--rollout", "localhost:1", "--benchmarks", "heldout"], "--rollout: localhost:1: expected http://"),
        (["compare", "a", "b"], "a: no evaluation there"),
        (["show", "a"], "no evaluation there"),
        (["contamination", "gone.toml", "--benchmarks", "heldout"], "gone.toml: no such configuration file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    line = capsys.readouterr().err
    assert line.startswith("multiattempt: error: ") and line.count("\n") == 1 and said in line, line
    assert list(tmp_path.iterdir()) == []


def test_an_overrides_value_is_not_taken_for_the_model():
    words = [
        "--data.question_field",
        "Body,Question",
        "m",
        "--seeds",
        "2",
        "--data.digits=1",
        "--rollout.replicas",
        "2",
    ]
    assert split_overrides(words) == (
        ["m", "--seeds", "2"],
        ("--data.question_field", "Body,Question", "--data.digits=1", "--rollout.replicas", "2"),
    )


def test_contamination_is_told_by_the_exit_code(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": 2}\n{"question": "1+2", "answer": 3}\n')
    (tmp_path / "e.toml").write_text(
        f'[data]\nsource = "jsonl"\ntrain = "{tmp_path}/train.jsonl"\nheldout = "{tmp_path}/other.jsonl"\n'
    )
    (tmp_path / "other.jsonl").write_text('{"question": "5+5", "answer": 10}\n')
    words = ("contamination", tmp_path / "e.toml", "--benchmarks")
    assert run(*words, f"mine={tmp_path}/train.jsonl") == 3
    assert (
        "contamination: mine: 2 of 2 problems are among the 2 training problems (2 exactly" in capsys.readouterr().out
    )
    assert run(*words, "heldout") == 0


def test_a_models_folder_is_itself_with_no_more_context_than_it_has(tmp_path):
    source = find_model(str(model_folder(tmp_path / "small", max_position_embeddings=512)))
    assert (source.name, source.path) == ("small", str(tmp_path / "small"))
    assert load(None, [], env={}, base=source.base).model.max_model_len == 512


def test_a_checkpoint_brings_the_dialogues_it_was_trained_in(tmp_path):
    checkpoints = tmp_path / "runs" / "demo" / "checkpoints"
    config = load(None, ["--dialogue.template=paper", "--run.seed=7", "--learner.lr=1", "--rollout.threads=1"], env={})
    for name in ("v00000008", "v00000016"):
        model_folder(checkpoints / name / "hf")
        (checkpoints / name / "config.json").write_text(json.dumps(config.model_dump(mode="json") | {"old": {}}))
    source = find_model(str(tmp_path / "runs" / "demo"))
    assert (source.name, source.path) == ("demo-v00000016", str(checkpoints / "v00000016" / "hf"))
    found: RunConfig = load(None, ["--dialogue.reward=paper"], env={}, base=source.base)
    assert (found.dialogue.template, found.dialogue.reward, found.run.seed) == ("paper", "paper", 7)
    assert (found.learner.lr, found.rollout.threads) == (5e-7, 0)
    (checkpoints / "best").symlink_to("v00000008")
    assert find_model(str(tmp_path / "runs" / "demo")).name == "demo-v00000008"
    assert find_model(str(checkpoints / "v00000008" / "hf")) == find_model(str(checkpoints / "v00000008"))


def test_what_is_no_model_is_told(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="this run has no checkpoint yet"):
        find_model(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="no model there"):
        find_model(str(tmp_path))
    assert find_model("Qwen/Qwen2.5-Math-1.5B").name == "Qwen2.5-Math-1.5B"


def test_the_fingerprint_is_of_what_makes_the_model(tmp_path):
    folder = model_folder(tmp_path / "m")
    before = fingerprint(folder)
    (folder / "README.md").write_text("new")
    assert fingerprint(folder) == before
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert fingerprint(folder) != before


def test_progress_has_the_running_accuracy():
    tally = Tally(total=40, num_done=12, num_new=10, seconds=5.0)
    tally.asked.update({("gsm8k", 1, 1.0): 10, ("gsm8k", 2, 1.0): 30})
    tally.done.update({("gsm8k", 1, 1.0): 10, ("gsm8k", 2, 1.0): 2})
    tally.solved.update({("gsm8k", 2, 1.0): 1})
    assert progress_line(tally) == "12/40 dialogues, 2.0/s, 0:14 left; gsm8k at 2 attempts: 50.0 % of 2/30"
