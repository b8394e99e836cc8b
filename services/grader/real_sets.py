r"""Sets of real numbers however written: intervals, unions, inequalities, set-builder, `\mathbb{R}\setminus\{0\}`.

A set is a sorted tuple of pieces that neither touch nor overlap, so that two spellings of one set are equal piece by
piece.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.grader import readings
from services.grader.evaluation import MP, close

_SIGNS = re.compile(r"[<>]|\\(?:leq|geq|neq|cup|cap|setminus|infty)(?![A-Za-z])|\\mathbb\{R\}|\\\{[^{}]*[|:]")
_BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in ?\\mathbb\{R\})?(?:\||:|;)(.*)\\\}")
_ALL = re.compile(r"\\mathbb\{R\}|\(-\\infty,\+?\\infty\)")
_MEMBER = re.compile(r"([A-Za-z])\\in(?![A-Za-z]) ?")
_VARIABLE = re.compile(r"[A-Za-z]|\\(?:alpha|beta|theta|lambda|mu)")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}

Constant = Callable[[str], Any | None]  # the value of a text, None when it is no real constant


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval, a ray, a line or a point (then both ends are closed and equal)."""

    low: Any  # mpf, may be infinite
    high: Any
    is_low_closed: bool = False
    is_high_closed: bool = False


@dataclass(frozen=True, slots=True)
class RealSet:
    """Pieces in order, and the variable where one is named."""

    variable: str | None
    pieces: tuple[Piece, ...]


def is_candidate(text: str) -> bool:
    """Whether the text has a sign by which it may be a set of reals rather than a tuple or a number."""
    return _SIGNS.search(text) is not None


def read(text: str, constant: Constant) -> RealSet | None:
    """The set that a normalised text describes; None when it is none, or its ends are no constants."""
    variable = None
    member = _MEMBER.match(text)
    if member:
        variable, text = member.group(1), text[member.end() :]
    builder = _BUILDER.fullmatch(text)
    if builder:
        variable, text = builder.group(1), builder.group(2)
    names = {variable} if variable else set()
    pieces = _read(text, constant, names)
    if pieces is None or len(names) > 1:
        return None
    return RealSet(next(iter(names), None), tuple(_merged(pieces)))


def same(gold: RealSet, answer: RealSet) -> bool:
    """Whether two sets are equal; a variable that only one side names does not matter."""
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    return len(gold.pieces) == len(answer.pieces) and all(map(_same_piece, gold.pieces, answer.pieces))


def _same_piece(left: Piece, right: Piece) -> bool:
    return (
        (left.is_low_closed, left.is_high_closed) == (right.is_low_closed, right.is_high_closed)
        and _same_end(left.low, right.low)
        and _same_end(left.high, right.high)
    )


def _same_end(left: Any, right: Any) -> bool:
    if MP.isinf(left) or MP.isinf(right):
        return bool(left == right)
    return close(left, right)


def _read(text: str, constant: Constant, names: set[str]) -> list[Piece] | None:
    text = text.strip()
    base, found, removed = text.partition(r"\setminus")
    if found:
        left, right = _read(base, constant, names), _read(removed, constant, names)
        return None if left is None or right is None else _difference(left, right)
    unions = re.split(r"\\cup ?", text)
    if len(unions) > 1:
        parts = [_read(part, constant, names) for part in unions]
        return None if None in parts else [piece for part in parts if part for piece in part]
    if _ALL.fullmatch(text):
        return [Piece(-MP.inf, MP.inf)]
    if text == r"\emptyset":
        return []
    return (
        _bracketed(text, constant)
        if text[:1] in "([\\" and not re.search("[<>]", text)
        else _conditions(text, constant, names)
    )


def _bracketed(text: str, constant: Constant) -> list[Piece] | None:
    found = readings.collection(text)
    if found is None or found.kind == "list":
        inner = text[1:-1]
        return _bracketed(inner, constant) if text[:1] == "(" and text[-1:] == ")" and inner[:1] in ("(", "[") else None
    ends: list[Any] = [_end(element, constant) for element in found.elements]
    if None in ends:
        return None
    if found.kind == "set":
        return [_point(end) for end in ends]
    if len(ends) != 2 or not ends[0] < ends[1]:
        return None
    return [Piece(ends[0], ends[1], found.brackets[0] == "[", found.brackets[1] == "]")]


def _conditions(text: str, constant: Constant, names: set[str]) -> list[Piece] | None:
    """Inequalities between commas: together where they overlap (1<x, x<3), else one or the other (x<1, x>3)."""
    parts, _ = readings.split_commas(text)
    total: list[Piece] | None = None
    for part in parts:
        pieces = _condition(part, constant, names)
        if pieces is None:
            return None
        if total is None:
            total = pieces
            continue
        both, either = _intersection(total, pieces), _merged(total + pieces)
        total = both if both and either != total else either
    return total


def _condition(text: str, constant: Constant, names: set[str]) -> list[Piece] | None:
    chain = readings.relation(text)
    if chain is None:
        return None
    if len(chain.signs) == 1 and not _VARIABLE.fullmatch(chain.sides[0]):
        chain = readings.Relation(chain.sides[::-1], tuple(_FLIPPED.get(sign, sign) for sign in chain.signs))
    if len(chain.signs) == 1:
        variable, end = chain.sides[0], _end(chain.sides[1], constant)
        if end is None or not _VARIABLE.fullmatch(variable):
            return None
        names.add(variable)
        return _ray(chain.signs[0], end)
    if len(chain.signs) != 2 or not readings.is_increasing(chain.signs) or not _VARIABLE.fullmatch(chain.sides[1]):
        return None
    if chain.signs[0][0] == ">":
        chain = readings.Relation(chain.sides[::-1], tuple(_FLIPPED[sign] for sign in chain.signs[::-1]))
    low, high = _end(chain.sides[0], constant), _end(chain.sides[2], constant)
    if low is None or high is None:
        return None
    names.add(chain.sides[1])
    return [Piece(low, high, chain.signs[0] == "<=", chain.signs[1] == "<=")] if low < high else None


def _point(at: Any) -> Piece:
    return Piece(at, at, is_low_closed=True, is_high_closed=True)


def _ray(sign: str, end: Any) -> list[Piece] | None:
    below, above = Piece(-MP.inf, end, is_high_closed=sign == "<="), Piece(end, MP.inf, is_low_closed=sign == ">=")
    return {
        "<": [below], "<=": [below], ">": [above], ">=": [above], "!=": [below, above], "=": [_point(end)],
    }.get(sign)  # fmt: skip


def _end(text: str, constant: Constant) -> Any | None:
    text = text.strip()
    if text in (r"\infty", r"+\infty"):
        return MP.inf
    return -MP.inf if text == r"-\infty" else constant(text)


def _merged(pieces: list[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.low, not piece.is_low_closed)):
        last = merged[-1] if merged else None
        if last is None or not _touch(last, piece):
            merged.append(piece)
        elif piece.high > last.high or (piece.high == last.high and piece.is_high_closed):
            merged[-1] = Piece(last.low, piece.high, last.is_low_closed, piece.is_high_closed)
    return merged


def _touch(left: Piece, right: Piece) -> bool:
    return bool(right.low < left.high) or (
        _same_end(right.low, left.high) and (right.is_low_closed or left.is_high_closed)
    )


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
    shared = []
    for a in left:
        for b in right:
            low, high = max(a.low, b.low), min(a.high, b.high)
            low_closed = all(piece.is_low_closed for piece in (a, b) if piece.low == low)
            high_closed = all(piece.is_high_closed for piece in (a, b) if piece.high == high)
            if low < high or (low == high and low_closed and high_closed):
                shared.append(Piece(low, high, low_closed, high_closed))
    return shared


def _difference(left: list[Piece], right: list[Piece]) -> list[Piece]:
    rest = left
    for piece in right:
        outside = [
            Piece(-MP.inf, piece.low, is_high_closed=not piece.is_low_closed),
            Piece(piece.high, MP.inf, is_low_closed=not piece.is_high_closed),
        ]
        rest = _intersection(rest, outside)
    return rest
