"""`multiattempt grade` up to the grader: its arguments, and the lines of a file."""

import io
import json
import subprocess
import sys

import pytest

from services.cli import grade as command
from services.cli.__main__ import main
from services.cli.grade import BadLine, parse_line, read_chunks
from services.grader.client import Question


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grade"], "give a response or --file"),
        (["grade", "7", "--file", "x"], "give a response or --file"),
        (["grade", "7"], "--gold is missing"),
        (["grade", "--file", "x", "--gold", "7"], "every line has its own `gold`"),
        (["grade", "7", "--gold", "7", "--output", "x"], "--output goes with --file"),
        (["grade", "7", "--gold", "7", "--url", "http://x", "--workers", "2"], "--workers is for"),
        (["grade", "7", "--gold", "7", "--url", "localhost:8000"], "--url: the grader's address begins with http://"),
        (["grade", "7", "--gold", "7", "--workers", "0"], "--workers: "),
        (["grade", "7", "--gold", "7", "--extraction", "all"], "invalid choice: 'all'"),
        (["grade", "--file", "/nowhere.jsonl"], "--file /nowhere.jsonl: No such file"),
        (["grade", "--file", __file__, "--output", __file__], "is the file to be graded"),
        (["grade", "--file", __file__, "--output", "/nowhere/x"], "--output /nowhere/x: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("multiattempt: error: ") and error.count("\n") == 1 and said in error


def test_without_the_graders_libraries_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from services.cli.__main__ import main; sys.exit(main(['grade', '7', '--gold', '7']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "fastapi is missing): pip install 'multi-attempt-rl[grader]'" in done.stderr


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ('{"response": "x", "gold": "7"}', Question("x", ["7"], "auto")),
        ('{"response": "", "gold": ["7", 8], "id": 3}', Question("", ["7", "8"], "auto", "3")),
        ('{"response": "x", "gold": 0.5, "extraction": "boxed", "id": "a", "prompt": "?"}',
         Question("x", ["0.5"], "boxed", "a")),
    ],
)  # fmt: skip
def test_a_good_line_is_a_question(line: str, question: Question) -> None:
    assert parse_line(line.encode(), "auto") == question


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON .*column 2"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"1" * 5_000, "not JSON that can be read"),
        (b"[1]", "not an object; write"),
        (b'{"gold": "7"}', "`response` is missing; .* wanted"),
        (b'{"response": null, "gold": "7"}', "`response` is null; .* wanted"),
        (b'{"response": "x"}', "`gold` is missing; .* wanted"),
        (b'{"response": "x", "gold": []}', r"`gold` is \[\]; .* wanted"),
        (b'{"response": "x", "gold": [["7"]]}', "`gold` is .* wanted"),
        (b'{"response": "x", "gold": "7", "id": []}', r"`id` is \[\]; .* wanted"),
        (b'{"response": "x", "gold": "7", "extraction": "all"}', '`extraction` is "all"; write boxed or auto'),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_what_to_do(line: bytes, said: str) -> None:
    with pytest.raises(BadLine, match=said):
        parse_line(line, "auto")


def test_chunks_are_bounded_and_know_where_their_lines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHUNK_LINES", 3)
    monkeypatch.setattr(command, "MAX_LINE_BYTES", 100)
    good = json.dumps({"response": "x", "gold": "7"}).encode()
    text = b"\n".join([good, b"", b"x" * 350, good, b"{", good, good, good])
    bad: list[tuple[int, str]] = []
    chunks = list(read_chunks(io.BytesIO(text), "auto", lambda number, error: bad.append((number, str(error)))))
    assert [[line.number for line in chunk] for chunk in chunks] == [[1, 4, 6], [7, 8]]
    assert chunks[-1][-1].end == len(text) and chunks[0][0].end == len(good) + 1
    assert [number for number, _ in bad] == [3, 5] and "more than 100 bytes" in bad[0][1]


def test_long_lines_make_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHUNK_BYTES", 1_000)
    line = json.dumps({"response": "x" * 400, "gold": "7"}).encode() + b"\n"
    assert [len(chunk) for chunk in read_chunks(io.BytesIO(line * 7), "auto", lambda *_: None)] == [3, 3, 1]


def test_the_door_stays_light() -> None:
    code = (
        "import sys, services.cli.__main__; print(*sorted({'rich', 'httpx', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
