"""Expressions: bounded LaTeX to a sympy tree, and whether two trees are equal for every value of their letters.

Parsing is math-verify's LaTeX parser (latex2sympy2-extended), which builds trees without evaluating them. Equality is
decided by value: both trees at the same points, with 60 digits and relatively, since sympy's symbolic comparison is
slow, has no bound, and math-verify's rounds to six places (1e-9 = 2e-9). What this cannot value (limits, integrals,
infinite sums) goes to math-verify's `verify`.
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from math_verify.utils import timeout

from services.grader import no_eval
from services.grader.evaluation import (
    AGREEMENT,
    DIGITS,
    MP,
    NoValueError,
    Point,
    TooLargeError,
    UnsupportedError,
    close,
    is_real,
    log10,
    value_at,
)
from services.grader.normalise import TEXT, collapse

no_eval.seal()  # latex2sympy2 would have sympy evaluate every number of an answer as Python

MAX_CHARS = 400  # of a text that is parsed; the longest gold answer of the public benchmarks has 180
MAX_NESTING = 24  # the parser takes seconds for 50 brackets
MAX_EXACT_DIGITS = 6_000  # integers are compared to the last digit up to here

_LIMITS = (  # a pattern, and how often it may occur
    (re.compile(r"[0-9]{1000}"), 0),
    (re.compile(r"[\^_]"), 60),
    (re.compile(r"\\(?:cup|cap|setminus)"), 6),
    (re.compile("&"), 24),
    (re.compile(r"![\s)}\]]*!"), 0),  # a factorial of a factorial
    (re.compile(r"[-+\u2212]\s*[-+\u2212]"), 8),
    (re.compile(r"\|"), 16),
    (re.compile(r"(?:\^\{[^{}^]*){6}"), 0),  # a tower
    (re.compile(":"), 0),
)
# The parser computes these rather than writing them down: n!, binomials, gamma, determinants.
_LARGE_ARGUMENT = re.compile(
    r"[0-9]{6,}\s*!|(?:\\binom|\\Gamma|\\choose).*[0-9]{5}|[0-9]{5}.*\\choose|(?:vmatrix|\\det).*(?:&.*){10}", re.DOTALL
)

_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_UNFINISHED = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum, sympy.Product)
_INTEGER_NAMES = frozenset("nkmN")  # a formula in these alone is meant for whole numbers

# Names that the parser takes for constants, or cannot read: E_0, m_e, I, \\gamma, L_\\odot.
_TAKEN_NAME = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]_(?:\{\\[a-z]+\}|\\(?:odot|oplus|star|infty)(?![A-Za-z]))"
    r"|(?<![\\A-Za-z])(?:[eEI]_(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,8}\})|[A-Za-z]_(?:[eEiI]|\{[eEiI]\}))"
    r"|(?<![\\A-Za-z])I(?![A-Za-z])|\\gamma(?![A-Za-z(])"
)
_DERIVATIVE = re.compile(r"\\frac\{d ?([A-Za-z])\}\{d ?([A-Za-z])\}")
_PRIMED = re.compile(r"(?<![\\A-Za-z])([A-Za-z])(?:\^\{?\\prime\}?|('+))")

Tree: TypeAlias = sympy.Basic | sympy.MatrixBase


class UnreadableError(ValueError):
    """The text is no mathematics that can be read, or too large to be."""


def is_bounded(text: str) -> bool:
    """Whether a text is small enough, in every way that costs, to be parsed."""
    if len(text) > MAX_CHARS or any(len(pattern.findall(text)) > most for pattern, most in _LIMITS):
        return False
    if _LARGE_ARGUMENT.search(text):
        return False
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest <= MAX_NESTING


def parse(text: str, *, alarm_s: int) -> Tree:
    """Read LaTeX as a sympy tree; decimals become fractions, so that 0.1 is a tenth.

    Raises UnreadableError, and math-verify's TimeoutException after `alarm_s` seconds.
    """
    text = _for_parser(text)
    if not is_bounded(text):
        raise UnreadableError(f"too large to be read: {text[:80]!r}")
    tree: Tree = _parse(text, alarm_s)
    return tree


@lru_cache(maxsize=2_048)  # one gold answer meets many answers
def _parse(text: str, alarm_s: int) -> Tree:
    text = re.sub(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])", _as_fraction, text)
    try:
        tree = timeout(alarm_s)(latex2sympy)(text, normalization_config=None, conversion_config=_CONVERSION)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(f"no mathematics: {text[:80]!r}") from error
    if isinstance(tree, sympy.MatrixBase | sympy.Basic):
        return tree
    raise UnreadableError(f"no mathematics: {text[:80]!r}")


def _for_parser(text: str) -> str:
    """What the LaTeX parser does not know, or takes for something else, in words that it reads as a plain symbol."""
    text = collapse(text, "()").replace(r"^\circ", "").replace("%", r"\cdot\frac{1}{100}")
    text = re.sub(r"(?<![0-9A-Za-z}.)^_])([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}", _mixed, text)
    text = re.sub(r"(?<=[0-9])\.(?![0-9])", "", text)
    text = re.sub(r"(?<![0-9A-Za-z_^\\{}.])([0-9]+)\(", r"\1\\cdot(", text)
    text = _DERIVATIVE.sub(lambda match: _symbol("d" + match[1] + "over" + match[2]), text)
    text = re.sub(r"(\\(?:sum|prod)_\{[^{}]*\})\^([A-Za-z0-9])", r"\1^{\2}", text)
    text = re.sub(TEXT, lambda match: _symbol(match[1]), text)
    text = _TAKEN_NAME.sub(lambda match: _symbol(match.group()), text)
    return _PRIMED.sub(lambda match: _symbol(match[1] + "prime" * len(match[2] or "'")), text)


def _symbol(name: str) -> str:
    """LaTeX that the parser reads as one symbol of this name."""
    return rf"\mathcal{{{''.join(re.findall('[A-Za-z0-9]', name))}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else match.group()


def _as_fraction(match: re.Match[str]) -> str:
    whole, decimals = match.groups()
    return rf"\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"


def real_constant(tree: Tree) -> Any | None:
    """The real value of a constant expression, an mpf; None when it holds letters, is complex or has no value."""
    if not isinstance(tree, sympy.Expr) or _names(tree):
        return None
    try:
        found = _constant(tree)
    except (NoValueError, UnsupportedError, TooLargeError):
        return None
    return MP.re(found) if MP.im(found) == 0 else None


def equal(gold: Tree, answer: Tree, *, alarm_s: int) -> bool:
    """Whether two expressions are equal: for every value of their letters, wherever both are real.

    n, k and m stand for whole numbers when no other letter occurs. Raises TimeoutException.
    """
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        try:
            return _equal_byvalue(gold, answer)
        except TooLargeError:
            return bool(gold == answer)
        except UnsupportedError:
            pass
    # An answer that leaves a limit or an integral to be worked out is none, unless the gold answer does.
    if answer.has(*_UNFINISHED) and not gold.has(*_UNFINISHED):
        return False
    return bool(gold == answer) or _verify(gold, answer, alarm_s)


def difference(left: Tree, right: Tree) -> sympy.Expr | None:
    """The tree of left - right, unevaluated; None when one of them is no expression."""
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return None
    return sympy.Add(left, sympy.Mul(sympy.Integer(-1), right, evaluate=False), evaluate=False)


def proportion(gold: sympy.Expr, answer: sympy.Expr) -> Any | None:
    """The constant c, not 0, with answer = c * gold wherever both are real; None when there is none.

    With it, `gold = 0` and `answer = 0` say the same.
    """
    names = _names(gold) | _names(answer)
    if not names:
        return None
    ratio, agreeing = None, 0
    try:
        for point in _points(names):
            pair = _pair(gold, answer, point)
            if pair is None or not all(map(is_real, pair)):
                continue
            if ratio is None and pair[0] != 0:
                ratio = MP.re(pair[1] / pair[0])
            if not ratio or not close(pair[0] * ratio, pair[1]):
                return None
            agreeing += 1
    except (UnsupportedError, TooLargeError):
        return None
    return ratio if agreeing >= 3 else None


def _equal_byvalue(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    names = _names(gold) | _names(answer)
    if not names:
        try:
            return _constants_equal(gold, answer)
        except NoValueError:
            return bool(gold == answer)
    if _agree(gold, answer, _points(names)):
        return True
    return names <= _INTEGER_NAMES and _agree(gold, answer, _whole_points(names))


def _agree(gold: sympy.Expr, answer: sympy.Expr, points: Iterator[dict[str, Any]]) -> bool:
    is_complex = gold.has(sympy.Symbol("i"), sympy.I) or answer.has(sympy.Symbol("i"), sympy.I)
    agreeing = 0
    for point in points:
        pair = _pair(gold, answer, point)
        if pair is None:
            continue
        if close(*pair):
            agreeing += 1
        elif is_complex or min(point.values()) > 0 or all(map(is_real, pair)):
            return False  # elsewhere they may differ by a branch of a root or a logarithm
    if agreeing < 2:
        raise UnsupportedError("hardly a point where both have a value")
    return True


def _pair(gold: sympy.Expr, answer: sympy.Expr, point: Point) -> tuple[Any, Any] | None:
    try:
        with MP.workdps(DIGITS):
            return value_at(gold, point), value_at(answer, point)
    except NoValueError:
        return None


def _constants_equal(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    left, right = _constant(gold), _constant(answer)
    size = max(log10(left), log10(right))
    if AGREEMENT - 5 < size < MAX_EXACT_DIGITS:  # integers, to the last digit
        with MP.workdps(int(size) + 20):
            left, right = value_at(gold, {}), value_at(answer, {})
            return bool(abs(left - right) <= max(abs(left), abs(right)) * MP.mpf(10) ** -(int(size) + 5))
    return close(left, right)


def _constant(tree: sympy.Expr) -> Any:
    """The value of an expression without letters; what only rounding keeps from nought is nought."""
    with MP.workdps(DIGITS):
        found = value_at(tree, {})
    if found != 0 and log10(found) < 20 - DIGITS:
        with MP.workdps(2 * DIGITS):
            finer = value_at(tree, {})
        if finer == 0 or log10(finer) < log10(found) - 10:
            return MP.mpf(0)
        found = finer
    least = abs(found) * MP.mpf(10) ** -AGREEMENT
    return MP.mpc(*(part if abs(part) > least else 0 for part in (MP.re(found), MP.im(found))))


def _names(tree: sympy.Basic) -> frozenset[str]:
    return frozenset(symbol.name for symbol in tree.free_symbols if symbol.name != "i")


def _points(names: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Points to compare at: small and large, all positive first, then of mixed sign; the same at every call."""
    source = random.Random(20_250_304)
    for scale, signs in ((1, (1,)), (4, (1,)), (20, (1,)), (1, (1,)), (3, (-1, 1)), (1, (-1, 1)), (10, (-1,))):
        yield {
            name: MP.mpf(source.choice(signs) * source.randrange(1_000, 99_999) * scale) / 100_003
            for name in sorted(names)
        }


def _whole_points(names: frozenset[str]) -> Iterator[dict[str, Any]]:
    for start in (1, 2, 3, 4, 5, 6, 9, 14):
        yield {name: MP.mpf(start + 2 * index) for index, name in enumerate(sorted(names))}


def _verify(gold: Tree, answer: Tree, alarm_s: int) -> bool:
    try:
        return bool(verify([gold], [answer], strict=True, timeout_seconds=alarm_s, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - sympy raises anything at all; what it cannot compare is not accepted
        return False
