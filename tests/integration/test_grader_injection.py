"""Model text is never run as code: payloads that would leave a mark, and an audit of every comparison of the corpus."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sympy

from services.grader import no_eval

ROOT = Path(__file__).parents[2]
MARK = "mark"
# A comparison raises none of these while it runs, except for what `is_text_of_a_library` says.
AUDITED = """
import contextlib, json, os, sys
os.environ["SYMPY_GROUND_TYPES"] = "python"
from services.grader import confinement, no_eval
from services.grader.answer import extract, Extraction
from services.grader.equivalence import compare
compare("2(x+1)", ["2x+2"], alarm_s=5)
seen = []
REFUSED = confinement._REFUSED_EVENTS
def hook(event, arguments):
    if event in ("compile", "exec"):
        name = os.fsdecode(arguments[1] or "?") if event == "compile" else arguments[0].co_filename
        text = arguments[0] if event == "compile" else arguments[0].co_names
        if not name.startswith(("/", "<frozen ")) and not confinement.is_text_of_a_library(sys._getframe(1)):
            seen.append([event, name, repr(text)[:100]])
    elif event.startswith(REFUSED) or (event == "open" and arguments[2] & confinement._WRITING):
        seen.append([event, repr(arguments)[:100], ""])
sys.addaudithook(hook)
for line in sys.stdin:
    response, gold = json.loads(line)
    answer = extract(response, mode=Extraction.AUTO)
    if answer is not None:
        compare(answer, [gold], alarm_s=5)
print(json.dumps(seen))
"""
UNSEALED = """
import sympy.parsing.sympy_parser
from services.grader import confinement, no_eval
no_eval.seal = lambda: None
"""

COMMANDS = (
    "__import__('os').system('touch mark')",
    "__import__('pathlib').Path('mark').write_text('x')",
    "open('mark','w').close()",
    "exec(\"open('mark','w')\")",
    "eval(\"__import__('os').mkdir('mark')\")",
    "(lambda: __import__('os').system('touch mark'))()",
    "[__import__('os').system('touch mark') for _ in (1,)]",
    "().__class__.__bases__[0].__subclasses__()[104]().load_module('os').system('touch mark')",
    "getattr(__import__('os'), 'sys'+'tem')('touch mark')",
    "Lambda(x, __import__('os').system('touch mark'))(1)",
    "Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('mark','w')",
    "sympify(\"__import__('os').system('touch mark')\")",
    "parse_expr(\"__import__('os').system('touch mark')\")",
    "lambdify((), \"__import__('os').system('touch mark')\")()",
    "Function('f')(open('mark','w'))",
    "1 if __import__('os').system('touch mark') else 2",
    "f\"{__import__('os').system('touch mark')}\"",
    "{0.__class__.__init__.__globals__}",
    "import os; os.system('touch mark')",
    "print(open('/etc/passwd').read())",
    "; touch mark",
    "$(touch mark)",
    "`touch mark`",
    "| touch mark",
    "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
    r"\immediate\write18{touch mark}",
    r"\input{|touch mark}",
    r"\newwrite\f\openout\f=mark\write\f{x}\closeout\f",
    "cos\nsystem\n(S'touch mark'\ntR.",
)
DRESSES = (
    "{}",
    r"\text{{{}}}",
    r"\mathrm{{{}}}",
    r"\operatorname{{{}}}",
    r"\frac{{{}}}{{2}}",
    r"\sqrt{{{}}}",
    r"x_{{{}}}",
    r"\left({}\right)",
    "({}, 1)",
    r"\{{{}, 1\}}",
    "2+{}",
    "x={}",
    "x^{{{}}}",
    r"\begin{{pmatrix}}{}\\1\end{{pmatrix}}",
    r"\log_{{{}}}(2)",
    "1e{}",
    "0x{}",
)
PAYLOADS = [dress.format(command) for command in COMMANDS for dress in DRESSES]


def events_of(pairs: list[tuple[str, str]], directory: Path) -> list[list[str]]:
    """What grading these (response, gold) pairs did, of what no comparison has any business to do."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUDITED], input="\n".join(map(json.dumps, pairs)), text=True,
        cwd=directory, capture_output=True, timeout=110, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("place", ["answer", "gold"])
def test_payloads_run_nothing_and_leave_no_mark(place: str, tmp_path: Path) -> None:
    boxes = [rf"\boxed{{{payload}}}" for payload in PAYLOADS]
    pairs = [(box, "x+1") for box in boxes] if place == "answer" else [(r"\boxed{x+1}", gold) for gold in PAYLOADS]
    assert events_of(pairs, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_no_comparison_of_the_corpus_runs_text(tmp_path: Path) -> None:
    rows = [
        json.loads(line)
        for path in sorted((ROOT / "tests/grading_corpus").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line.strip()
    ]
    pairs = [(row["response"], gold) for row in rows for gold in _as_list(row["gold"])]
    assert len(pairs) > 500
    assert events_of(pairs, tmp_path) == []


def _as_list(gold: str | list[str]) -> list[str]:
    return [gold] if isinstance(gold, str) else gold


def test_the_audit_sees_text_that_is_run(tmp_path: Path) -> None:
    """The proof that the tests above can fail: without the seal, latex2sympy2 has sympy evaluate the digits."""
    opened = AUDITED.replace("from services.grader import confinement, no_eval\n", UNSEALED).replace(
        "compare(answer, [gold], alarm_s=5)", "no_eval.sympy.Number('7')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", opened], input=json.dumps((r"\boxed{x+7}", "x+8")), text=True,
        cwd=tmp_path, capture_output=True, timeout=60, check=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ["compile", "<string>", "b'Integer (7 )'"] in json.loads(done.stdout)


@pytest.mark.parametrize(("text", "number"), [("12", sympy.Integer(12)), (" -3", sympy.Integer(-3)), ("007", 7)])
def test_whole_numbers_are_read_exactly(text: str, number: sympy.Integer) -> None:
    assert no_eval.read_number(text) == number


@pytest.mark.parametrize("text", ["0.5", ".25", "3.", "1.5e3", "0.123456789012345678901234567890"])
def test_decimals_are_read_as_sympy_reads_them(text: str) -> None:
    found = no_eval.read_number(text)
    assert found == sympy.Float(text) and found._prec == sympy.Float(text)._prec


@pytest.mark.parametrize("text", ["", "x", "1+1", "1e9999999", "__import__('os')", "٣", "1_000", "0x10", "1 2", "1;2"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(sympy.SympifyError):
        no_eval.read_number(text)
