"""Take the final answer out of a response: the last closed, non-empty box, or the stated answer.

Pure and linear in the length of the response, so that the parent process can run it on hostile text.
What an answer means is `equivalence`'s business.
"""

import re
from collections.abc import Iterator
from enum import StrEnum

MAX_TAIL_CHARS = 65_536  # of a response only this much of its end is read
MAX_ANSWER_CHARS = 8_192  # a longer answer is not an answer

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,8}\{?|\\.|[{}]", re.DOTALL)
_JOINER = re.compile(r"[\s$]*(?:,|;|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\}|[\s,])*[\s$]*")
_BLANK = re.compile(r"(?:[\s{}$~]|\\[,;:! ])*")
_ANCHOR = re.compile(
    r"####[ \t]*|\b(?:final[ \t]+)?answer\b[ \t]*(?:\*\*)?[ \t]*(?:is|:|=)[ \t]*:?[ \t]*(?:\*\*)?[ \t]*", re.IGNORECASE
)
_INLINE_MATH = re.compile(r"\$\$?([^$\n]{1,2000})\$\$?|\\\(([^\n]{1,2000}?)\\\)|\\\[([^\n]{1,2000}?)\\\]")
_UNBRACED_BOX = re.compile(r"\\boxed\s{1,8}([^\s{}$\\]{1,100})")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")  # a run of letters that is no LaTeX command


class Extraction(StrEnum):
    """Where the answer may stand."""

    BOXED = "boxed"  # in a box only
    AUTO = "auto"  # in a box, else after "the answer is" and its like, else a bare last line


def extract(response: str, *, mode: Extraction = Extraction.BOXED) -> str | None:
    r"""Return the final answer of `response`, stripped, or None when it states none.

    Text up to the last `</think>` is ignored, and so is all but the last `MAX_TAIL_CHARS`. Boxes side by side,
    joined by a comma, "and" or "or", are one answer: `\boxed{1} and \boxed{2}` gives `1,2`.
    """
    tail = response[-MAX_TAIL_CHARS:].rpartition("</think>")[2]
    found = _last_box(tail)
    if found is None and mode is Extraction.AUTO:
        found = _stated(tail)
    return found if found is not None and len(found) <= MAX_ANSWER_CHARS else None


def unwrap(text: str) -> str:
    r"""Strip what may stand around a whole answer: spaces, `$..$`, `\(..\)`, `\[..\]`, `\boxed{..}`."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and len(text) >= 2 * len(opening):
                if opening not in inner:
                    text = inner.strip()
                break
        boxes = list(_boxes(text)) if text.startswith(("\\boxed", "\\fbox")) else []
        if boxes and boxes[-1][0] == 0 and boxes[-1][1] == len(text):
            text = boxes[-1][2].strip()
    return text


def is_blank(text: str) -> bool:
    """Whether nothing but spaces, braces and dollar signs is there."""
    return _BLANK.fullmatch(text) is not None


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, content) of every closed box, by where it closes; an escaped brace is no brace."""
    stack: list[tuple[int, int] | None] = []  # (start of the box, start of its content); None: a plain brace
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word == "}":
            opened = stack.pop() if stack else None
            if opened is not None:
                yield opened[0], token.end(), text[opened[1] : token.start()]
        elif word == "{":
            stack.append(None)
        elif word.endswith("{") and word != r"\{":
            stack.append((token.start(), token.end()))


def _last_box(text: str) -> str | None:
    boxes = [box for box in _boxes(text) if not is_blank(re.sub(r"\\(?:boxed|fbox)", "", box[2]))]
    if not boxes:
        return None
    start, _, content = boxes[-1]
    parts = [unwrap(content)]
    for earlier_start, earlier_end, earlier in reversed(boxes[:-1]):
        if earlier_start >= start:
            continue  # nested in the one already taken
        between = text[earlier_end:start]
        if earlier_end > start or len(between) > 40 or not between.strip() or _JOINER.fullmatch(between) is None:
            break
        parts.append(unwrap(earlier))
        start = earlier_start
    return ",".join(reversed(parts))


def _stated(text: str) -> str | None:
    unbraced = _UNBRACED_BOX.findall(text)
    if unbraced:
        return str(unbraced[-1]).strip(" .,;:*") or None
    anchors = [match.end() for match in _ANCHOR.finditer(text)]
    if anchors:
        line = text[anchors[-1] :].lstrip("\n").partition("\n")[0]
        return _expression(line, prose_allowed=True)
    line = text.rstrip().rpartition("\n")[2]
    return _expression(line, prose_allowed=False)


def _expression(line: str, *, prose_allowed: bool) -> str | None:
    """The expression that a line states: a bare line, else its last inline formula; else None."""
    line = re.sub(r"^(?:\*\*|[>\-*] )|\*\*$", "", line.strip().rstrip(".").strip()).strip().rstrip(".")
    formulas = ["".join(groups) for groups in _INLINE_MATH.findall(line)]
    if formulas:
        line = formulas[-1]
    elif prose_allowed:
        line = re.split(r"\.\s|\*\*", line)[0]
    elif _PROSE.search(line):
        return None
    line = unwrap(line.strip(" *"))
    return None if is_blank(line) else line
