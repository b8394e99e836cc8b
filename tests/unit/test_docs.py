"""The pages name what is there: functions, files, links."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALGORITHM = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(set(re.findall(r"`(services/[\w/]+\.py):([\w.]+)`", ALGORITHM)))
FOLDERS = "services|tests|docs|deploy|configs|benchmarks|experiments|requirements"


@cache
def defined(path: Path) -> frozenset[str]:
    """Functions and methods of a module: `f`, `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return frozenset(found)


@pytest.mark.parametrize(("path", "function"), FUNCTIONS, ids=[f"{path}:{name}" for path, name in FUNCTIONS])
def test_every_function_of_the_algorithm_exists(path: str, function: str) -> None:
    assert function in defined(ROOT / path)


def test_the_whole_arithmetic_is_in_the_algorithm() -> None:
    modules = ("losses", "advantage", "kl", "masking", "mismatch", "schedule")
    named = {function for path, function in FUNCTIONS if path.removeprefix("services/learner/")[:-3] in modules}
    public = {
        name
        for module in modules
        for name in defined(ROOT / "services" / "learner" / f"{module}.py")
        if not name.startswith("_") and "." not in name
    }
    assert public - named == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_files_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*\w\.\w+)[`: ]", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
