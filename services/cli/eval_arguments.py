"""The words of `multiattempt eval`: run (the default), compare, show, contamination. Parses, then imports."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMMANDS = ("compare", "show", "contamination")
SEEDS = 3

Parser = Callable[..., argparse.ArgumentParser]

MORE = """Further commands: eval compare A B, eval show RESULTS, eval contamination CONFIG; each has --help.
Exit code 0: done; 1: failed, what is finished is kept; 2: a mistake on this command line; 130: stopped. The same
command goes on where it stopped."""


def main(words: Sequence[str], parser: Parser) -> int:
    """Run one command. words: those after `eval`; parser: makes one. Returns the exit code. Raises ConfigError."""
    command = words[0] if words and words[0] in COMMANDS else ""
    match command:
        case "compare":
            return _compare(words[1:], parser)
        case "show":
            return _show(words[1:], parser)
        case "contamination":
            return _contamination(words[1:], parser)
        case _:
            return _run(words, parser)


def _run(words: Sequence[str], make: Parser) -> int:
    parser = make(
        prog="multiattempt eval",
        description="Accuracy against allowed attempts, with intervals.",
        epilog=MORE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a run's folder, a checkpoint, a Hugging Face folder or name, or an experiment's TOML file",
    )  # fmt: skip
    _add_benchmarks(parser)
    parser.add_argument("--attempts", default="1-5", help="numbers of allowed attempts: 1-7, 1,3,5; 1-5 by default")
    parser.add_argument(
        "--rollout", action="append", default=[], metavar="URL", help="ask this running replica; repeat it for several"
    )
    parser.add_argument("--output", type=Path, help="folder; by default runs/evaluations/ and the model's name")
    parser.add_argument("--name", help="what the model is called in results")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; 1 by default")
    parser.add_argument("--seeds", type=int, help="dialogues of each problem; 3 by default, greedy 1")
    parser.add_argument(
        "--samples", type=int, help="independent samples for pass@k; by default twice the most attempts; 0: none"
    )
    parser.add_argument(
        "--sample-temperature", type=float, help="of these; by default as --temperature, or 1 where that is greedy"
    )
    parser.add_argument(
        "--feedback", choices=("truth", "none"), default="truth",
        help="truth: the model is told whether it was right; none: it is only asked to try again, right or wrong",
    )  # fmt: skip
    parser.add_argument("--problems", type=int, help="at most so many of each benchmark, drawn by --seed")
    parser.add_argument("--seed", type=int, default=42, help="of sampling and intervals; 42 by default")
    parser.add_argument("--concurrency", type=int, help="dialogues at once; by default twice what the engine decodes")
    words, overrides = split_overrides(words)
    options = parser.parse_args(words)

    from services.cli.evaluate import EvalOptions, run_eval
    from services.evaluation.plan import Settings, parse_attempts

    attempts = parse_attempts(options.attempts)
    is_greedy = options.temperature == 0
    own_temperature = 1.0 if is_greedy else options.temperature
    settings = Settings(
        benchmarks=_names(options.benchmarks),
        attempts=attempts,
        seeds=(1 if is_greedy else SEEDS) if options.seeds is None else options.seeds,
        samples=2 * max(attempts) if options.samples is None else options.samples,
        temperature=options.temperature,
        sample_temperature=own_temperature if options.sample_temperature is None else options.sample_temperature,
        feedback=options.feedback,
        seed=options.seed,
        problems=options.problems,
    )
    return run_eval(
        EvalOptions(
            model=options.model,
            settings=settings,
            data=options.data,
            urls=tuple(options.rollout),
            output=options.output,
            name=options.name,
            concurrency=options.concurrency,
            overrides=overrides,
        )
    )


def _compare(words: Sequence[str], make: Parser) -> int:
    parser = make(
        prog="multiattempt eval compare",
        description="Two evaluations of the same problems, paired by problem: differences and p-values.",
    )
    parser.add_argument("first", metavar="A[,A...]", help="folder of an evaluation; several are pooled as seeds of one")
    parser.add_argument("second", metavar="B[,B...]", help="of another")
    parser.add_argument("--output", type=Path, help="folder for comparison.json, comparison.md and the pictures")
    options = parser.parse_args(words)

    from services.evaluation.compare import compare, markdown, pool
    from services.evaluation.outcome import draw_results, read_evaluated, write_comparison
    from services.evaluation.summary import summarise

    sides = [
        pool([read_evaluated(Path(folder)) for folder in given.split(",")]) for given in (options.first, options.second)
    ]
    comparison = compare(*sides)
    print(markdown(comparison), end="")
    if options.output is not None:
        write_comparison(options.output, comparison)
        draw_results([summarise(side.header, side.dialogues) for side in sides], options.output)
    return 0


def _show(words: Sequence[str], make: Parser) -> int:
    parser = make(prog="multiattempt eval show", description="Read the dialogues of an evaluation.")
    parser.add_argument("results", type=Path, help="folder of an evaluation")
    parser.add_argument("--wrong", action="store_true", help="not solved in the end")
    parser.add_argument("--solved", action="store_true", help="solved in the end")
    parser.add_argument("--attempts", type=int, help="so many were made")
    parser.add_argument("--allowed", type=int, help="so many were allowed")
    parser.add_argument("--benchmark", help="of this one")
    parser.add_argument("--problem", help="the beginning of its id, or words of its question")
    parser.add_argument("--limit", type=int, default=10, help="at most so many; 10 by default")
    options = parser.parse_args(words)

    from services.evaluation.journal import read_dialogues, read_header
    from services.evaluation.show import Filter, count, readable, select

    folder = options.results if options.results.is_dir() else options.results.parent
    read_header(folder)
    dialogues = read_dialogues(folder)
    wanted = Filter(
        benchmark=options.benchmark,
        is_wrong=options.wrong,
        is_solved=options.solved,
        attempts_made=options.attempts,
        max_attempts=options.allowed,
        problem=options.problem,
    )
    found = select(dialogues, wanted)
    shown = found[: max(0, options.limit)]
    for dialogue in shown:
        print(readable(dialogue))
    print(count(shown, len(found), len(dialogues)))
    return 0


def _contamination(words: Sequence[str], make: Parser) -> int:
    parser = make(
        prog="multiattempt eval contamination",
        description="Are problems of benchmarks among those that an experiment trains on?",
        epilog="Exit code 3 when some are.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="TOML file; any setting can follow as --section.key value")
    _add_benchmarks(parser)
    words, overrides = split_overrides(words)
    options = parser.parse_args(words)

    from services.contracts.config import load
    from services.contracts.problems import load_problems
    from services.evaluation.benchmarks import load as load_benchmark
    from services.evaluation.contamination import overlaps, report

    config = load(options.config, overrides)
    sets = [load_benchmark(name, folder=options.data, config=config) for name in _names(options.benchmarks)]
    train = load_problems(config).train
    found = overlaps(train, {one.name: one.problems for one in sets})
    sys.stdout.writelines(f"{line}\n" for line in report(found, num_train=len(train)))
    return 3 if any(overlap.num_found for overlap in found) else 0


def _add_benchmarks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmarks", action="append", required=True, metavar="NAME,...",
        help="aime24, amc23, math500, minerva_math, olympiadbench, gsm8k, svamp, asdiv, mawps; heldout: of the run's "
        "[data]; NAME=FILE.jsonl or NAME=hub:DATASET:SPLIT: any other, by --data.question_field and so on",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder with NAME.jsonl; by default from the Hugging Face hub")


def split_overrides(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Words of the command itself, and `--section.key value` among them: a value is never taken for MODEL."""
    own: list[str] = []
    overrides: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        is_override = word.startswith("--") and "." in word.partition("=")[0]
        (overrides if is_override else own).append(word)
        if is_override and "=" not in word and queue and not queue[0].startswith("--"):
            overrides.append(queue.pop(0))
    return own, tuple(overrides)


def _names(given: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for text in given for name in map(str.strip, text.split(",")) if name)
