"""The examples of a page under docs/: fenced blocks, and how one is run and compared; and the commands of any page.

A ```bash or ```python block is run; what follows it as ```json or ```text is what it must print. Commands in other
blocks and in the text install, start or destroy something: they are read, not run (tests/unit/test_docs_commands.py).
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Block(NamedTuple):
    language: str
    text: str
    line: int


class Command(NamedTuple):
    page: str
    text: str


PROGRAMS = (
    r"multiattempt|make|docker|kubectl|python|pytest|torchrun|deepspeed|pip|curl|vllm|\.venv/bin/\w+|deploy/\w+\.sh"
)
_ASSIGNMENTS = r"(?:\w+=(?:'[^']*'|\$\([^)]*\)|\S*) )*"
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def commands(page: str) -> list[Command]:
    """Each once: lines of blocks that say no language, or sh, and code in the text. page: below the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [re.sub(r"\\\n\s*", "", match[2]) for match in _BLOCK.finditer(text) if match[1] in ("", "sh")]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    prose = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", _BLOCK.sub("", text))]
    found = [line for line in lines if re.match(rf"{_ASSIGNMENTS}({PROGRAMS})(\s|$)", line)]
    found += [code for code in prose if re.match(rf"{_ASSIGNMENTS}({PROGRAMS}) ", code)]
    return [Command(page, re.sub(rf"^{_ASSIGNMENTS}(?=\w|\.)", "", line)) for line in dict.fromkeys(found)]


def words(command: str) -> list[str]:
    """Without what is said of it behind it, and without where its output goes; `...` is an experiment."""
    command = re.split(r"\s{3,}| #| > | \| ", command)[0]
    return ["configs/demo.toml" if word == "..." else word for word in shlex.split(command)]


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^ *```(\w+)\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], page.count("\n", 0, match.start()) + 1) for match in found]


def examples(page: str) -> list[tuple[Block, Block | None]]:
    """Blocks that are run, each with the output that follows it."""
    pairs = zip(blocks(page), [*blocks(page)[1:], None], strict=True)
    return [
        (block, follower if follower and follower.language in ("json", "text") else None)
        for block, follower in pairs
        if block.language in ("bash", "python")
    ]


def run(block: Block, folder: Path, *, replace: Mapping[str, str], env: Mapping[str, str] | None = None) -> str:
    """What it prints, run in `folder`."""
    text = block.text
    for old, new in replace.items():
        text = text.replace(old, new)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str, expected: Block | None, *, not_compared: Sequence[str] = ()) -> None:
    """Assert that it is what the page says, but for the values of the keys `not_compared`."""
    if expected is None:
        assert printed == ""
    elif expected.language == "text":
        assert printed == expected.text, printed
    else:
        found, wanted = (_stable(json.loads(text), not_compared) for text in (printed, expected.text))
        assert found == wanted, printed


def _stable(value: Any, not_compared: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_stable(entry, not_compared) for entry in value]
    if isinstance(value, dict):
        return {k: "" if k in not_compared else _stable(v, not_compared) for k, v in value.items()}
    return value
