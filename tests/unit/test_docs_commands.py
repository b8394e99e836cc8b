"""Every command that the pages show is one that exists: it is read by the parser that would run it.

What is cheap is run elsewhere: ```bash blocks by tests/integration/test_*_docs.py, the settings' page by
tests/unit/contracts/test_reference.py, the demo and the stack by tests/e2e and tests/deploy.
"""

import argparse
import contextlib
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import docs_examples
import pytest
import yaml
from docs_examples import ROOT, Command

from services.cli.__main__ import _parser
from services.cli.eval_arguments import COMMANDS as COMMANDS_OF_EVAL
from services.cli.eval_arguments import main as evaluate
from services.console.__main__ import main as console
from services.contracts.config import RunConfig, load
from services.grader.__main__ import main as grader
from services.learner.__main__ import main as learner
from services.rollout.__main__ import main as rollout

PAGES = ["README.md", "SECURITY.md", "deploy/kubernetes/README.md", *docs_examples.pages()]
COMMANDS = [command for page in PAGES for command in docs_examples.commands(page)]
SERVICES = {"console": console, "grader": grader, "learner": learner, "rollout": rollout}
EXIT_CONFIG = 2
OF_A_READER = {"words.toml"}  # written by following the page: tests/integration/test_rollout_docs.py does
NOT_READ = {
    "pip install": "installs over the network; the lock files are what is tested",
    "docker build": "needs Docker: tests/deploy builds the images where it is",
    "docker run": "needs Docker, as do the next three",
    "docker inspect": "",
    "docker kill": "",
    "docker stop": "",
    "kubectl": "needs a cluster: tests/deploy/test_kubernetes.py checks the manifests against the schemas",
    "curl": "needs the stack; the examples of the API pages are run",
    "vllm serve": "vLLM's own command",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_a_command_of_the_pages_exists(command: Command, tmp_path: Path) -> None:
    text = command.text
    if not text.startswith(tuple(NOT_READ)):
        check(docs_examples.words(text), tmp_path)


def check(words: list[str], tmp_path: Path) -> None:
    match words:
        case ["docker", "compose", *rest]:
            compose(rest, tmp_path)
        case ["multiattempt", *rest]:
            multiattempt(rest, tmp_path)
        case ["make", target, *variables]:
            targets = [name for name in TARGETS if fnmatch(name, target.replace("...", "*"))]
            assert targets, f"no target {target}"
            assert {word.partition("=")[0] for word in variables} <= set(re.findall(r"\w+", MAKEFILE))
        case ["torchrun" | "deepspeed", *rest]:
            multiattempt(rest[rest.index("multiattempt") + 1 :], tmp_path)
        case [("python" | ".venv/bin/python"), "-m", module, *rest] if module != "pytest":
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
        case ["pytest", *paths] | [("python" | ".venv/bin/python"), "-m", "pytest", *paths] | ["python", *paths]:
            assert paths and all((ROOT / path).exists() for path in paths)
        case [script, *_]:
            assert (ROOT / script).is_file()


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)
STACK = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


class UnderstoodError(Exception):
    """The words were: nothing shall come of them."""


class Reader(argparse.ArgumentParser):
    """Parses, and no more."""

    def parse_args(self, *words: Any) -> NoReturn:  # type: ignore[override]
        super().parse_args(*words)
        raise UnderstoodError


def multiattempt(arguments: list[str], tmp_path: Path) -> None:
    """A service is told a configuration that does not exist: what it says of everything else comes before."""
    if len(arguments) == 1:  # in the text: its name alone
        assert f"\n    {arguments[0]} " in _parser().format_help()
        return
    if arguments[0] == "eval" and arguments[1:] in [[command] for command in COMMANDS_OF_EVAL]:
        return
    parsed, rest = _parser().parse_known_args(arguments)
    if parsed.command == "eval":
        with pytest.raises(UnderstoodError):
            evaluate(rest, Reader)
    elif parsed.command == "serve":
        nowhere = [word if "/" not in word else str(tmp_path / "none") for word in rest]
        config = [] if parsed.service == "console" else ["--config", str(tmp_path / "none")]
        with contextlib.chdir(tmp_path):  # where no run is that could be served
            assert SERVICES[parsed.service]([*nowhere, *config]) == EXIT_CONFIG
    elif parsed.command in ("train", "prepare"):
        if parsed.config.name not in OF_A_READER:
            load(ROOT / parsed.config, rest, env={})
    else:
        assert rest == []


def compose(words: list[str], tmp_path: Path) -> None:
    """Its own flags, the services named, and the command that is run in one of them."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-f", dest="files", action="append", default=[])
    parser.add_argument("--profile", choices={name for one in STACK.values() for name in one.get("profiles", ())})
    parser.add_argument("action", choices=("up", "down", "build", "logs", "exec", "run", "cp"))
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(words)
    assert all((ROOT / path).exists() for path in parsed.files)
    rest = [word.partition("=")[0].partition(":")[0] for word in parsed.rest if not word.startswith("-")]
    match parsed.action:
        case "exec":
            check(parsed.rest[1:], tmp_path)
            rest = rest[:1]
        case "run" | "cp":
            rest = rest[:1]
    assert set(rest) <= set(STACK)


@pytest.mark.parametrize(
    "command",
    [
        "multiattempt statsu runs/demo",
        "multiattempt status --wach",
        "multiattempt train configs/demo.toml --learner.lrr 1",
        "multiattempt train configs/none.toml",
        "multiattempt serve learner --config c.json --resum=1",
        "multiattempt serve grader --ports 3",
        "multiattempt eval runs/demo --benchmark aime24 --atempts 2",
        "multiattempt eval show --wrng runs/x",
        "make dmeo",
        "make demo TORCH_INDX=x",
        "docker compose up -d grafana3",
        "docker compose exec learner multiattempt sttus",
        "pytest tests/none",
        "python -m services.none",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError, argparse.ArgumentError)):
        check(shlex.split(command), tmp_path)


def test_the_pages_have_commands_and_each_exception_is_one() -> None:
    assert len(COMMANDS) > 80
    assert [name for name in NOT_READ if not any(command.text.startswith(name) for command in COMMANDS)] == []


def test_the_menu_lists_every_target_that_has_a_description() -> None:
    menu = ["make", "--no-print-directory", "help"]  # `make test` says which folder a make within it enters
    shown = subprocess.run(menu, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == set(re.findall(r"^([\w-]+):.*##", MAKEFILE, re.M))


@pytest.mark.parametrize("page", PAGES)
def test_the_environment_variables_named_are_settings(page: str) -> None:
    for section, key in re.findall(r"MULTIATTEMPT_([A-Z]+)__([A-Z_]+)", (ROOT / page).read_text(encoding="utf-8")):
        if section != "SECTION":
            settings = type(getattr(RunConfig(), section.lower())).model_fields
            assert key.lower().removesuffix("_file") in settings, f"{section}__{key}"
