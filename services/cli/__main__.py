"""`multiattempt`: train, serve, grade, chat, ... A light door: nothing heavy is imported to parse arguments."""

import argparse
import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_CONFIG = 2
SERVICES = ("grader", "rollout", "learner", "console")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIG, f"multiattempt: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong configuration, 130 or 143 stopped."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("train", "serve", "prepare", "eval"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from services.contracts.config import ConfigError

    try:
        match arguments.command:
            case "train" | "prepare":
                return _begin(arguments, rest)
            case "serve":
                return _serve(arguments.service, rest)
            case "eval" | "grade":
                return _measure(arguments, rest)
            case "chat":
                return _chat(arguments)
            case "status" | "audit":
                return _look(arguments)
            case "plot":
                return _plot(arguments.run)
            case "doctor":
                from services.cli.doctor import run_doctor

                return run_doctor(is_gpu=arguments.gpu)
            case _:
                parser.error("a command is missing")
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="multiattempt", description="Multi-attempt reinforcement learning.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="run an experiment on this machine", allow_abbrev=False)
    train.add_argument("config", type=Path, help="TOML file; any setting can follow as --section.key value")
    train.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    train.add_argument(
        "--accept-changes", action="store_true", help="with --resume: although settings of the algorithm have changed"
    )
    serve = commands.add_parser("serve", help="run one service", allow_abbrev=False, add_help=False)
    serve.add_argument("service", choices=SERVICES, help="arguments after it go to the service")
    prepare = commands.add_parser(
        "prepare", help="make a run ready for services that are started one by one (containers)", allow_abbrev=False
    )
    prepare.add_argument("config", type=Path, help="TOML file; any setting can follow as --section.key value")
    commands.add_parser(
        "eval", help="accuracy of a model against allowed attempts, on benchmarks", allow_abbrev=False, add_help=False
    )
    _add_grade(commands)
    _add_chat(commands)
    status = commands.add_parser("status", help="look at a run")
    status.add_argument("run", type=Path, nargs="?", help="the run's folder; the newest under runs/ by default")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.add_argument("--redis", default="", metavar="URL", help="a run's Redis, where its folder is not here")
    status.add_argument("--name", default="", help="with --redis: the run's name")
    audit = commands.add_parser("audit", help="is every task of a run accounted for? Exit code 1 if not")
    audit.add_argument("run", type=Path, nargs="?", help="the run's folder; the newest under runs/ by default")
    audit.add_argument("--json", action="store_true", help="print JSON, with every offending task")
    plot = commands.add_parser("plot", help="draw a run's plots and print its table")
    plot.add_argument("run", type=Path, help="the run's folder, runs/<name>")
    doctor = commands.add_parser("doctor", help="check this machine")
    doctor.add_argument("--gpu", action="store_true", help="its GPUs instead: about a minute, on the machine with them")
    return parser


def _add_grade(commands: "argparse._SubParsersAction[_Parser]") -> None:
    grade = commands.add_parser(
        "grade",
        help="is an answer right? One response, or a file of them",
        description="Grade responses against gold answers, in this process or by a running grader (--url).",
        epilog="Exit code 0: graded, right or wrong; 1: a bad line in the file, or no grader; 2: a mistake on this "
        "command line; 3: with --check, not correct. What begins with a minus sign is written --gold=-x, or after --.",
    )
    grade.add_argument("response", nargs="?", help="the model's output; only its final answer counts")
    grade.add_argument("--gold", action="append", help="the right answer; repeat it for several, any of which is right")
    grade.add_argument(
        "--file", help="JSON lines with response, gold, and maybe id and extraction; - is standard input"
    )
    grade.add_argument("--output", type=Path, help="with --file: where to write the results, as JSON lines")
    grade.add_argument(
        "--extraction",
        choices=("boxed", "auto"),
        default="auto",
        help="boxed: the last closed \\boxed{}; auto, the default here: else the stated answer or a bare last line",
    )
    grade.add_argument("--url", help="a running grader, with GRADER_API_KEY as its token; by default none is needed")
    grade.add_argument(
        "--workers", type=int, help="worker processes without --url; by default 1, with --file all cores"
    )
    grade.add_argument("--json", action="store_true", help="print JSON")
    grade.add_argument("--check", action="store_true", help="exit code 3 unless everything is correct")


def _measure(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    if arguments.command == "eval":
        from services.cli.eval_arguments import main as evaluate

        return evaluate(rest, _Parser)
    return _grade(arguments)


def _grade(arguments: argparse.Namespace) -> int:
    from services.cli.grade import GradeOptions, run_grade

    return run_grade(
        GradeOptions(
            response=arguments.response,
            gold=arguments.gold,
            file=arguments.file,
            output=arguments.output,
            extraction=arguments.extraction,
            url=arguments.url,
            workers=arguments.workers,
            is_json=arguments.json,
            is_check=arguments.check,
        )
    )


def _add_chat(commands: "argparse._SubParsersAction[_Parser]") -> None:
    chat = commands.add_parser(
        "chat",
        help="a dialogue with a running replica, in the terminal",
        description="Give a model a problem and watch its attempts. Without --gold you judge them: y, n or none. "
        "Without PROBLEM it asks for one after the other.",
        epilog="Ctrl-C ends the dialogue, Ctrl-D the session. Exit code 0: done; 1: a dialogue did not come to its "
        "end; 2: a mistake on this command line, or no replica.",
    )
    chat.add_argument("problem", nargs="?", metavar="PROBLEM", help="run this one and exit")
    chat.add_argument("--gold", action="append", help="the right answer, for the grader; repeat it for several")
    chat.add_argument("--url", help="the replica; by default one of the run's")
    chat.add_argument("--run", type=Path, help="the run's folder; the newest under runs/ by default")
    chat.add_argument("--attempts", type=int, default=5, help="how many the model is allowed, 5 by default")
    chat.add_argument("--seed", type=int, help="of the sampling; by default another each time")
    chat.add_argument("--temperature", type=float, help="0 is greedy; by default the run's")


def _chat(arguments: argparse.Namespace) -> int:
    from services.cli.chat import ChatOptions, run_chat

    return run_chat(
        ChatOptions(
            problem=arguments.problem,
            gold=arguments.gold,
            url=arguments.url,
            run=arguments.run,
            attempts=arguments.attempts,
            seed=arguments.seed,
            temperature=arguments.temperature,
        )
    )


def _begin(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    if arguments.command == "train":
        return _train(arguments.config, rest, resume=arguments.resume, accept_changes=arguments.accept_changes)
    from services.cli.prepare import run_prepare

    return run_prepare(arguments.config, rest)


def _train(path: Path, overrides: Sequence[str], *, resume: bool, accept_changes: bool) -> int:
    from services.cli.launcher import launch
    from services.cli.preflight import check
    from services.contracts.config import load

    config = load(path, overrides)
    check(config, resume=resume, accept_changes=accept_changes)
    command = shlex.join(["multiattempt", "train", str(path), *overrides])
    command = re.sub(r"(://[^/@\s]*:)[^@\s]*@", r"\1***@", command)  # it is shown: no password in it
    return asyncio.run(launch(config, resume=resume, accept_changes=accept_changes, command=command))


def _serve(service: str, rest: Sequence[str]) -> int:
    command = [sys.executable, "-m", f"services.{service}", *rest]
    os.execv(sys.executable, command)


def _look(arguments: argparse.Namespace) -> int:
    if arguments.command == "status":
        from services.cli.status import show_status

        watched = show_status(arguments.run, redis_url=arguments.redis, name=arguments.name, is_watch=arguments.watch)
        try:
            return asyncio.run(watched)
        except KeyboardInterrupt:  # how one stops watching
            return 0
    from services.cli.audit import run_audit

    return asyncio.run(run_audit(arguments.run, is_json=arguments.json))


def _plot(run: Path) -> int:
    from services.contracts.runs import resolved_config

    command = [sys.executable, "-m", "services.evaluation", "--config", str(resolved_config(run)), "--report"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
