"""Take the final answer out of a response: the last closed, non-empty box, or the stated answer.

Pure and linear in the length of the response, so that the parent process can run it on hostile text.
What an answer means is `equivalence`'s business.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

MAX_TAIL_CHARS = 65_536  # of a response only this much of its end is read
MAX_ANSWER_CHARS = 8_192  # a longer answer is not an answer
MAX_LINE_CHARS = 2_000  # of the line that states an answer without a box
MAX_WRAPPERS = 8  # layers of `$` and boxes around an answer
MAX_JOINER_CHARS = 40  # of ", and " between two boxes that are one answer

# <|im_end|> and its like (Qwen, Llama, Phi), DeepSeek's with full-width bars, Gemma's, SentencePiece's, Mistral's.
SPECIAL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_ ]{3,40}\|>|<｜[^<>｜]{3,40}｜>|<(?:start|end)_of_turn>|</?s>|<pad>|<eos>|<bos>|<unk>|\[/?INST\]"  # noqa: RUF001
)
_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,8}\{?|\\.|[{}]", re.DOTALL)
_JOINER = re.compile(r"[\s$]*(?:,|;|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\}|[\s,])*[\s$]*")
_BLANK = re.compile(r"(?:[\s{}$~]|\\[,;:! ])*")
_ANCHOR = re.compile(
    r"####[ \t]*|\b(?:final[ \t]+)?answer\b[ \t]*(?:\*\*)?[ \t]*(?:is|:|=)[ \t]*:?[ \t]*(?:\*\*)?[ \t]*",
    re.IGNORECASE,
)
_JSON_ANSWER = re.compile(r"\"(?:final_)?answer\"[ \t]*:[ \t]*(?:\"([^\"\n]{1,2000})\"|([^\s\",{}\[\]]{1,200}))")
_INLINE_MATH = re.compile(r"\$\$?([^$\n]{1,2000})\$\$?|\\\(([^\n]{1,2000}?)\\\)|\\\[([^\n]{1,2000}?)\\\]")
_UNBRACED_BOX = re.compile(r"\\boxed\s{1,8}([^\s{}$\\]{1,100})")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")  # a run of letters that is no LaTeX command


class Extraction(StrEnum):
    """Where the answer may stand."""

    BOXED = "boxed"  # in a box only
    AUTO = "auto"  # in a box, else after "the answer is" and its like, else a bare last line


def extract(response: str, *, mode: Extraction = Extraction.BOXED) -> str | None:
    r"""Return the final answer of `response`, stripped, or None when it states none.

    Text up to the last `</think>` is ignored, so are special tokens and all but the last `MAX_TAIL_CHARS`. Boxes side
    by side, joined by a comma, "and" or "or", are one answer: `\boxed{1} and \boxed{2}` gives `1,2`.
    """
    tail = SPECIAL_TOKEN.sub("", response[-MAX_TAIL_CHARS:].rpartition("</think>")[2])
    found = _last_box(tail)
    if found is None and mode is Extraction.AUTO:
        found = _stated(tail)
    return found if found is not None and len(found) <= MAX_ANSWER_CHARS else None


def unwrap(text: str) -> str:
    r"""Strip what may stand around a whole answer, some layers deep: space, `$..$`, `\(..\)`, `\[..\]`, `\boxed{}`."""
    text = text.strip()
    for _ in range(MAX_WRAPPERS):
        before = text
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and len(text) >= 2 * len(opening):
                if opening not in inner:
                    text = inner.strip()
                break
        if text.startswith(("\\boxed", "\\fbox")):
            whole = [box for box in _boxes(text) if box.start == 0 and box.end == len(text)]
            text = text[whole[0].content : -1].strip() if whole else text
        if text == before:
            break
    return text


def is_blank(text: str) -> bool:
    """Whether nothing but spaces, braces and dollar signs is there."""
    return _BLANK.fullmatch(text) is not None


@dataclass(slots=True)
class _Box:
    start: int  # of \boxed; -1 for a plain brace
    content: int  # where its content starts
    end: int = -1  # just after the closing brace
    is_filled: bool = False  # holds more than space and braces


def _boxes(text: str) -> Iterator[_Box]:
    """Yield every closed box, by where it closes; an escaped brace is no brace. One pass: nesting costs nothing."""
    stack = [_Box(-1, 0)]
    position = 0
    for token in _TOKEN.finditer(text):
        word = token.group()
        if _BLANK.fullmatch(text, position, token.start()) is None:
            stack[-1].is_filled = True
        position = token.end()
        if word == "}":
            if len(stack) > 1:
                box = stack.pop()
                stack[-1].is_filled |= box.is_filled
                box.end = token.end()
                if box.start >= 0:
                    yield box
        elif word == "{":
            stack.append(_Box(-1, token.end()))
        elif word.endswith("{") and word != r"\{":
            stack.append(_Box(token.start(), token.end()))
        elif not word.startswith((r"\boxed", r"\fbox")) and not is_blank(word):
            stack[-1].is_filled = True


def _last_box(text: str) -> str | None:
    boxes = [box for box in _boxes(text) if box.is_filled]
    if not boxes:
        return None
    start = boxes[-1].start
    parts = [text[boxes[-1].content : boxes[-1].end - 1]]
    for box in reversed(boxes[:-1]):
        if box.start >= start:
            continue  # nested in the one already taken
        between = text[box.end : start]
        if len(between) > MAX_JOINER_CHARS or not between.strip() or _JOINER.fullmatch(between) is None:
            break
        parts.append(text[box.content : box.end - 1])
        start = box.start
    return ",".join(unwrap(part) for part in reversed(parts))


def _stated(text: str) -> str | None:
    unbraced = _UNBRACED_BOX.findall(text)
    if unbraced:
        return str(unbraced[-1]).strip(" .,;:*") or None
    fields = _JSON_ANSWER.findall(text)
    if fields:
        return "".join(fields[-1])
    anchors = [match.end() for match in _ANCHOR.finditer(text)]
    if anchors:
        line = text[anchors[-1] :].lstrip("\n").partition("\n")[0][:MAX_LINE_CHARS]
        return _expression(line, prose_allowed=True)
    line = text.rstrip().rpartition("\n")[2][-MAX_LINE_CHARS:]
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
