"""Trajectories/s of the whole system, against TRL's GRPO trainer on the same machine: `make bench-e2e`.

Both train the same model from the same start in fp32, on the same prompts, with the same sampling, the same token
budget and end of an attempt, GRPO with groups of 8 and no reference model, one optimiser step on every `minibatch`
trajectories, each trajectory used once. Ours is `multiattempt train`: launcher, Valkey, grader over HTTP, vLLM,
DeepSpeed, weights published after every batch. TRL 1.16 runs in `.venv-trl` (`benchmarks/trl_grpo.py`), generating with
transformers, as it does without a GPU, and compares answers by a regular expression in its own process. fp32 because
CPUs without instructions for bf16 multiply it several times slower, on either side. `--section.key=value` sets for both
sides, as far as TRL has it, what is set differently here: `--model.dtype=bfloat16`.

- `single`: one attempt each, the next batch generated while one is learned from, as the settings that are shipped do.
- `single, synchronous`: the same on-policy, as TRL is: nothing is generated while the learner works.
- `multi`: up to five attempts; ours alone, for TRL has no such thing.

They take turns, ROUNDS times; medians are compared. The last lines printed are one JSON object per claim.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks import rollout
from services.contracts.config import RunConfig, load
from services.contracts.problems import load_problems
from services.contracts.template import prompt_ids
from services.learner.prepare import prepare
from services.learner.stopwatch import STEP_PARTS
from tests.processes import ROOT

GROUP = 8
NUM_PROBLEMS = 4096
TIMEOUT_S = 900.0
# Batches not counted: at first engines and allocators settle, and what is generated ahead has not been yet; in the end
# nothing is generated any more, and a checkpoint is written. TRL has neither of these.
WARM_UP, AT_END = 2, 2
TRL_WARM_UP = 1


@dataclass(frozen=True)
class Model:
    """What to train. end: the token at which TRL ends an attempt, as ours does by itself."""

    config: str
    flags: tuple[str, ...]
    end: str
    counted: int
    """Batches that are measured."""


MODELS = {
    # 0.8 M parameters, answers of about 9 tokens.
    "demo": Model("configs/demo.toml", (), end="}", counted=15),
    "tinyqwen": Model(  # 14 M parameters, vocabulary of 49,152, attempts of about 30 tokens, some of 128
        "configs/demo.toml",
        (
            "--model.source=pretrained", "--model.warmup_steps=0", "--dialogue.tokens_per_attempt=128",
            "--dialogue.tokens_per_dialogue=640", "--model.max_model_len=1024", "--learner.batch_dialogues=64",
            "--learner.minibatch_dialogues=16",
        ),
        end="<|im_end|>",
        counted=2,
    ),
    "smollm2": Model(  # 135 M parameters, sums after an example; an attempt ends with the model's turn
        rollout.MODELS["smollm2"].config,
        (
            *rollout.MODELS["smollm2"].flags, "--dialogue.stop_at_box=false", "--model.dtype=float32",
            "--learner.zero_stage=0", "--learner.batch_dialogues=16", "--learner.minibatch_dialogues=8",
        ),
        end="<|im_end|>",
        counted=4,
    ),
}  # fmt: skip
CASES = {
    "single": ("--dialogue.max_attempts=1", "--learner.max_staleness=1"),
    "single, synchronous": (
        "--dialogue.max_attempts=1", "--learner.max_staleness=0", "--learner.threads=0", "--rollout.threads=0",
    ),
    "multi": ("--dialogue.max_attempts=5", "--learner.max_staleness=1"),
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Of one run, after its warm-up."""

    trajectories_per_s: float
    tokens: float  # sampled in one trajectory
    parts: dict[str, float]  # where a batch's seconds went


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, "trl"], default=[*CASES, "trl"])
    parser.add_argument("--start", type=Path, help="the model to start from, instead of making it")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    arguments, flags = parser.parse_known_args()
    found: dict[tuple[str, str], list[Speed]] = {}
    for name in MODELS if arguments.model == "all" else [arguments.model]:
        with tempfile.TemporaryDirectory(prefix="bench-e2e-") as temporary:
            folder = Path(temporary)
            start = arguments.start or starting_model(name, folder, flags)
            for number in range(arguments.rounds):
                for case in arguments.cases:
                    place = folder / f"{number}-{case.replace(', ', '-')}"
                    config = configured(name, start, place, *CASES["single" if case == "trl" else case], *flags)
                    speed = trl(name, config, start, arguments.trl_python) if case == "trl" else ours(name, config)
                    found.setdefault((name, case), []).append(speed)
                    parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in speed.parts.items())
                    print(
                        f"{name}, {case}: {speed.trajectories_per_s:.2f} trajectories/s of {speed.tokens:.1f} tokens; "
                        f"a batch: {parts}",
                        flush=True,
                    )
    report(found)


def configured(name: str, start: Path | None, folder: Path, *flags: str) -> RunConfig:
    """The demo's settings, changed to what is compared."""
    model = [f"--model.path={start}", "--model.source=pretrained", "--model.warmup_steps=0"] if start else []
    common = (f"--run.dir={folder}", "--run.name=e2e", "--evaluation.enabled=false", "--learner.advantage=grpo")
    same = (f"--learner.samples_per_problem={GROUP}", "--learner.kl_coef=0", "--learner.checkpoint_every=10000")
    devices = ("--rollout.device=cpu", "--learner.device=cpu", f"--run.steps={WARM_UP + MODELS[name].counted + AT_END}")
    return load(ROOT / MODELS[name].config, [*MODELS[name].flags, *model, *common, *same, *devices, *flags], env={})


def starting_model(name: str, folder: Path, flags: Sequence[str]) -> Path:
    """Folder of the model that all start from."""
    if name == "tinyqwen":
        return rollout.make_tinyqwen(folder / "model")
    return prepare(configured(name, None, folder, *flags))


def ours(name: str, config: RunConfig) -> Speed:
    """A run of the whole system."""
    file = ROOT / MODELS[name].config
    flags = [f"--{section}.{key}={_text(value)}" for section, key, value in _changed(config, file)]
    command = [sys.executable, "-m", "services.cli", "train", str(file), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    counted = lines[WARM_UP:-AT_END]
    seconds = [line["step_s"] for line in counted]
    parts = {part: statistics.fmean(line[f"{part}_s"] for line in counted) for part in STEP_PARTS}
    tokens = statistics.fmean(line["response_tokens"] for line in counted)
    return Speed(config.learner.batch_dialogues * len(counted) / sum(seconds), tokens, parts)


def trl(name: str, config: RunConfig, start: Path, python: Path) -> Speed:
    """A run of TRL's trainer."""
    folder = config.run.dir
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(start)
    problems = [
        {
            "prompt": tokenizer.decode(prompt_ids(tokenizer, config.dialogue, problem.question, max_attempts=1)),
            "gold": problem.gold[0],
        }
        for problem in load_problems(config).train[:NUM_PROBLEMS]
    ]
    settings = {
        "model": str(start), "folder": str(folder / "trl"), "problems": problems, "end": MODELS[name].end,
        "threads": os.cpu_count(), "batch": config.learner.batch_dialogues, "group": GROUP, "lr": config.learner.lr,
        "minibatch": config.learner.minibatch_dialogues, "max_tokens": config.dialogue.tokens_per_attempt,
        "batches": TRL_WARM_UP + MODELS[name].counted, "seed": config.run.seed, "dtype": config.model.dtype,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [str(python), str(ROOT / "benchmarks/trl_grpo.py"), str(folder / "settings.json")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL failed: {done.stderr[-3000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')][TRL_WARM_UP:]
    seconds, generating = ([line[part] for line in lines] for part in ("seconds", "generate_s"))
    parts = {"generate": statistics.fmean(generating), "rest": statistics.fmean(seconds) - statistics.fmean(generating)}
    tokens = statistics.fmean(line["tokens"] for line in lines)
    return Speed(config.learner.batch_dialogues * len(lines) / sum(seconds), tokens, parts)


def report(found: dict[tuple[str, str], list[Speed]]) -> None:
    """A line of JSON for each case of ours."""
    speed = {key: statistics.median(one.trajectories_per_s for one in runs) for key, runs in found.items()}
    for (name, case), rate in speed.items():
        if case == "trl":
            continue
        reference = speed.get((name, "trl")) if case != "multi" else None
        claim = {
            "benchmark": "e2e",
            "case": f"{name}, {case}",
            "ours": round(rate, 2),
            "reference": reference and round(reference, 2),
            "ratio": reference and round(rate / reference, 2),
            "unit": "trajectories/s",
        }
        print(json.dumps(claim))


def _changed(config: RunConfig, file: Path) -> Sequence[tuple[str, str, object]]:
    """Every setting that is not the file's, as (section, name, JSON value)."""
    plain = load(file, [], env={}).model_dump(mode="json")
    return [
        (section, key, value)
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if plain[section][key] != value
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
