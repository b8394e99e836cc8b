"""The experiment does what is missing, in order, and nothing twice; its folder holds one experiment."""

import json
import subprocess
from pathlib import Path

import msgspec
import pytest

from experiments.arms import ARMS, BY_NAME, CONFIG, Arm
from experiments.page import PAGE, write
from experiments.reproduce import ATTEMPTS, DIALOGUES, SAMPLES, Experiment
from services.contracts.config import ConfigError, load
from services.contracts.problems import Problem
from services.evaluation.journal import Journal
from services.evaluation.plan import Header, Settings, asks
from services.evaluation.summary import summarise
from tests.evaluation_data import make_dialogue

PROBLEMS = {f"p{i}": Problem(f"what is {i}?", (str(i),)) for i in range(6)}
SOME = tuple(BY_NAME[name] for name in ("multi", "single"))


class Commands:
    """Stands for `multiattempt`: leaves what its commands would leave.

    fails_at: the number of one that fails. writes_dialogues: evaluations are real ones, that a page can be made of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.words = folder, []
        self.fails_at, self.writes_dialogues = -1, False

    def __call__(self, *words: str) -> None:
        self.words.append(words)
        if len(self.words) == self.fails_at:
            raise subprocess.CalledProcessError(1, words)
        (self.train if words[0] == "train" else self.evaluate)(words)

    def train(self, words):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        run, steps = self.folder / flags["run.name"], load(CONFIG, [], env={}).run.steps
        hf = run / "checkpoints" / f"v{steps:08d}" / "hf"
        hf.mkdir(parents=True)
        (hf / "config.json").write_text("{}")
        row = {"dialogues": 4.0, "response_tokens": 10.0, "step_s": 2.0, "staleness_mean": 1.0, "reward": 0.5}
        lines = [json.dumps({"step": step, **row}) for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def evaluate(self, words):
        named = dict(zip(words[2::2], words[3::2], strict=False))
        output, feedback = Path(named["--output"]), named["--feedback"]
        output.mkdir(parents=True)
        if not self.writes_dialogues:
            (output / "results.json").write_text("{}")
            return
        settings = Settings(
            benchmarks=("heldout",), attempts=ATTEMPTS, seeds=DIALOGUES, samples=int(named["--samples"]),
            feedback=feedback,
        )  # fmt: skip
        header = Header(model=named["--name"], weights={}, settings=settings, data={"heldout": "d"}, dialogue=None)
        wanted = asks(settings, {"heldout": PROBLEMS})
        with Journal(output, header) as journal:
            for i, ask in enumerate(wanted):
                made = ask.max_attempts if feedback == "none" else min(ask.max_attempts, 1 + i % 3)
                verdicts = "w" * (made - 1) + ("c" if i % 2 else "w")
                journal.add(
                    make_dialogue(
                        ask.problem_id, verdicts, n=ask.max_attempts, seed=ask.seed_index, benchmark="heldout"
                    )
                )
            results = summarise(header, list(journal.done.values()))
        (output / "results.json").write_bytes(msgspec.json.encode(results))


def start_of(folder):
    return lambda config: folder / f"start-{config.dialogue.feedback}"


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path)


@pytest.fixture
def experiment(tmp_path, commands):
    def make(arms=SOME, *flags):
        return Experiment(tmp_path, arms, flags, command=commands, make_start=start_of(tmp_path))

    return make


def trained(commands):
    return [word for words in commands.words if words[0] == "train" for word in words if word.startswith("--run.name=")]


def test_every_training_of_every_arm_is_run_and_evaluated_once(experiment, commands):
    experiment().run()
    assert len(trained(commands)) == 6
    evaluated = [words for words in commands.words if words[0] == "eval"]
    assert len(evaluated) == 1 + 6  # the start and every training
    before = len(commands.words)
    experiment().run()
    assert len(commands.words) == before


def test_what_failed_is_done_when_it_is_run_again(experiment, commands):
    commands.fails_at = 5
    with pytest.raises(subprocess.CalledProcessError):
        experiment().run()
    failed = commands.words[-1]
    commands.fails_at = -1
    experiment().run()
    assert commands.words.count(failed) == 2
    assert len(trained(commands)) == len(set(trained(commands))) == 6


def test_an_interrupted_training_is_resumed(experiment, commands, tmp_path):
    (tmp_path / "multi-1" / "checkpoints" / "v00000020").mkdir(parents=True)
    experiment().run()
    resumed = [words for words in commands.words if "--resume" in words]
    assert [word for words in resumed for word in words if word.startswith("--run.name")] == ["--run.name=multi-1"]


def test_all_start_from_one_model_but_the_one_that_is_told_other_things(experiment, commands, tmp_path):
    experiment(ARMS).run()
    trainings = [words for words in commands.words if words[0] == "train"]
    for words in trainings:
        feedback = "none" if "--dialogue.feedback=none" in words else "truth"
        assert f"--model.path={tmp_path / f'start-{feedback}'}" in words


def test_all_share_their_problems(experiment, commands):
    experiment(ARMS).run()
    trainings = [words for words in commands.words if words[0] == "train"]
    assert not any(word.startswith("--data.") for words in trainings for word in words)


def test_independent_samples_are_drawn_where_feedback_is_compared_with_them(experiment, commands):
    experiment(ARMS).run()
    evaluations = [words for words in commands.words if words[0] == "eval"]
    drawn = {(words[words.index("--feedback") + 1], words[words.index("--samples") + 1]) for words in evaluations}
    assert drawn == {("truth", str(SAMPLES)), ("none", "0")}


def test_a_folder_with_another_experiment_is_left_alone(experiment, commands):
    experiment().run()
    before = len(commands.words)
    with pytest.raises(ConfigError, match="holds another experiment"):
        experiment(SOME, "--learner.lr=1e-4").run()
    assert len(commands.words) == before


def test_the_page_tells_every_arm_both_claims_and_the_ablations(experiment, commands, tmp_path):
    commands.writes_dialogues = True
    experiment(ARMS).run()
    page = write(tmp_path, ARMS).read_text()
    assert (tmp_path / PAGE).read_text() == page
    assert all(arm.title in page for arm in ARMS)
    for heading in ("The paper's claims", "Feedback against resampling", "Honest feedback against none", "Staleness"):
        assert f"## {heading}" in page
    assert "**not settled**" in page  # all arms answer alike here
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "reward.png"}


def test_the_page_of_some_arms_leaves_out_what_needs_the_others(experiment, commands, tmp_path):
    commands.writes_dialogues = True
    arms: tuple[Arm, ...] = (BY_NAME["multi"],)
    experiment(arms).run()
    page = write(tmp_path, arms).read_text()
    assert BY_NAME["multi"].title in page
    assert "claims" not in page and "Staleness" not in page
