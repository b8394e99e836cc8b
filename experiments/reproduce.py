"""`make reproduce`: train every arm, evaluate each of its models, write what came out. Goes on where it stopped.

Each training is `multiattempt train`, each evaluation `multiattempt eval`, with all the processes they are made of. An
interrupted one is gone on with by the same command; what is finished is not done again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.arms import ARMS, BY_NAME, CONFIG, Arm, Training, trainings
from services.contracts.config import ConfigError, RunConfig, load
from services.learner.prepare import prepare

START = "start"
IDENTITY = "experiment.json"
ATTEMPTS = (1, 2, 3, 4, 5)
DIALOGUES = 3  # of each problem and number of attempts
SAMPLES = 6  # independent ones of each problem, to compare with at the same tokens
REPLICAS = ("--rollout.replicas=2", "--rollout.threads=1")  # of an evaluation: one for each core


def multiattempt(*words: str) -> None:
    """Run one command to its end, its output beside ours. Raises CalledProcessError."""
    print(f"   multiattempt {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "services.cli", *words], check=True)


class Experiment:
    """One folder of trainings and evaluations."""

    def __init__(
        self,
        folder: Path,
        arms: Sequence[Arm],
        flags: Sequence[str] = (),
        *,
        problems: int | None = None,
        command: Callable[..., None] = multiattempt,
        make_start: Callable[[RunConfig], Path] = prepare,
    ) -> None:
        """flags: changes to every training, as --section.key=value. problems: at most so many are asked.

        command: runs `multiattempt` with these words. make_start: makes the model that all start from.
        """
        self.folder, self.arms, self._flags, self._problems = folder, arms, tuple(flags), problems
        self._command, self._make_start = command, make_start

    def run(self) -> None:
        """Do what is missing. Raises ConfigError; CalledProcessError when a training or an evaluation fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        jobs = [(training, feedback) for training in trainings(self.arms) for feedback in training.arm.feedback]
        self._evaluate(START, str(CONFIG), "truth", self._shared())
        for number, (training, feedback) in enumerate(jobs, start=1):
            print(f"== {number}/{len(jobs)}: {training.name}, evaluated with feedback {feedback}", flush=True)
            self._train(training)
            checkpoint = self.checkpoint(training)
            self._evaluate(evaluation_name(training, feedback), str(checkpoint), feedback, ())

    def checkpoint(self, training: Training) -> Path:
        """Where its last update is: nothing is chosen by how well it does."""
        return self.folder / training.name / "checkpoints" / f"v{self._config().run.steps:08d}"

    def _train(self, training: Training) -> None:
        folder, target = self.folder / training.name, self.checkpoint(training)
        if (target / "hf" / "config.json").is_file():
            return
        start = self._make_start(self._config(*(training.arm.flags if training.arm.own_start else ())))
        words = [
            "train", str(CONFIG), *self._shared(), *training.arm.flags, f"--run.name={training.name}",
            f"--run.seed={training.seed}", "--model.source=pretrained", f"--model.path={start}",
            "--model.warmup_steps=0",
        ]  # fmt: skip
        resume = ["--resume"] if any((folder / "checkpoints").glob("v*")) else []
        self._command(*words, *resume)

    def _evaluate(self, name: str, model: str, feedback: str, flags: Sequence[str]) -> None:
        output = self.folder / "evaluations" / name
        if (output / "results.json").is_file():
            return
        some = [] if self._problems is None else [f"--problems={self._problems}"]
        self._command(
            "eval", model, "--benchmarks", "heldout", "--attempts", ",".join(map(str, ATTEMPTS)), "--seeds",
            str(DIALOGUES), "--samples", str(SAMPLES if feedback == "truth" else 0), "--feedback", feedback, "--name",
            name, "--output", str(output), *some, *REPLICAS, *flags,
        )  # fmt: skip

    def _shared(self) -> list[str]:
        return [f"--run.dir={self.folder}", *self._flags]

    def _config(self, *flags: str) -> RunConfig:
        return load(CONFIG, [*self._shared(), *flags], env={})

    def _claim(self) -> None:
        """Say once what this folder holds. Raises ConfigError where it is another experiment."""
        config = self._config().model_dump(mode="json")
        arms = {arm.name: arm.flags for arm in self.arms}
        evaluated = [ATTEMPTS, DIALOGUES, SAMPLES, self._problems]
        told = json.dumps({"config": config, "arms": arms, "evaluated": evaluated}, indent=1, sort_keys=True)
        path = self.folder / IDENTITY
        if path.exists() and path.read_text() != told:
            raise ConfigError(
                f"{self.folder} holds another experiment ({IDENTITY}); move it away, or --output elsewhere"
            )
        path.write_text(told)


def evaluation_name(training: Training, feedback: str) -> str:
    """Of the evaluation's folder, and of its model in tables."""
    return training.name if feedback == "truth" else f"{training.name}-{feedback}"


def main() -> int:
    """0: done; 1: a training or an evaluation failed; 2: a mistake on the command line; 130: stopped."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), help="folder; runs/reproduce by default")
    parser.add_argument("--arms", default=",".join(BY_NAME), help=f"some of {', '.join(BY_NAME)}")
    parser.add_argument("--problems", type=int, help="at most so many held-out problems; all by default")
    parser.add_argument("--report", action="store_true", help="only write the page, of what is there")
    arguments, flags = parser.parse_known_args()
    if unknown := [name for name in arguments.arms.split(",") if name not in BY_NAME]:
        parser.error(f"--arms: {unknown[0]} is none of {', '.join(BY_NAME)}")
    arms = [arm for arm in ARMS if arm.name in arguments.arms.split(",")]
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: its threads' spinning collapses beside others
    started = time.monotonic()
    try:
        experiment = Experiment(arguments.output, arms, flags, problems=arguments.problems)
        if not arguments.report:
            experiment.run()
        from experiments.page import write

        page = write(arguments.output, arms)
    except ConfigError as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"reproduce: stopped ({error.returncode}); the same command goes on where it stopped", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    except KeyboardInterrupt:
        return 130
    print(f"done in {(time.monotonic() - started) / 60:.0f} minutes on {os.cpu_count()} cores: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
