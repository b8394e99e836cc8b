"""`multiattempt`: train, serve, status, plot, doctor. A light door: nothing heavy is imported to parse arguments."""

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_CONFIG = 2
SERVICES = ("grader", "rollout", "learner")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIG, f"multiattempt: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong configuration, 130 or 143 stopped."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("train", "serve"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from services.contracts.config import ConfigError

    try:
        match arguments.command:
            case "train":
                return _train(arguments.config, rest, resume=arguments.resume)
            case "serve":
                return _serve(arguments.service, rest)
            case "status":
                from services.cli.status import show_status

                return asyncio.run(show_status(arguments.run))
            case "plot":
                return _plot(arguments.run)
            case "doctor":
                from services.cli.doctor import run_doctor

                return run_doctor()
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
    serve = commands.add_parser("serve", help="run one service", allow_abbrev=False, add_help=False)
    serve.add_argument("service", choices=SERVICES, help="arguments after it go to the service")
    status = commands.add_parser("status", help="look at a run")
    status.add_argument("run", type=Path, nargs="?", help="the run's folder; the newest under runs/ by default")
    plot = commands.add_parser("plot", help="draw a run's plots and print its table")
    plot.add_argument("run", type=Path, help="the run's folder, runs/<name>")
    commands.add_parser("doctor", help="check this machine")
    return parser


def _train(path: Path, overrides: Sequence[str], *, resume: bool) -> int:
    from services.cli.launcher import launch
    from services.cli.preflight import check
    from services.contracts.config import load

    config = load(path, overrides)
    check(config, resume=resume)
    command = shlex.join(["multiattempt", "train", str(path), *overrides])
    return asyncio.run(launch(config, resume=resume, command=command))


def _serve(service: str, rest: Sequence[str]) -> int:
    command = [sys.executable, "-m", f"services.{service}", *rest]
    os.execv(sys.executable, command)


def _plot(run: Path) -> int:
    from services.cli.status import resolved_config

    command = [sys.executable, "-m", "services.evaluation", "--config", str(resolved_config(run)), "--report"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
