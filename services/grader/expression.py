"""Expressions: bounded LaTeX to a sympy tree, and whether two trees are equal for every value of their letters.

Parsing is math-verify's LaTeX parser (latex2sympy2-extended), which builds trees without evaluating them. Equality is
decided by value: both trees at the same points, with 60 digits and relatively, since sympy's symbolic comparison is
slow, has no bound, and math-verify's rounds to six places (1e-9 = 2e-9). What this cannot value (limits, integrals,
infinite sums) goes to math-verify's `verify`.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from math_verify.utils import timeout
from mpmath.ctx_mp import MPContext
from mpmath.libmp import NoConvergence
from sympy.core.function import AppliedUndef

MAX_CHARS = 1_000  # of a text that is parsed
MAX_NESTING = 24  # the parser takes seconds for 50 brackets
MAX_TERMS = 2_000  # of a sum or product that is added up
MAX_EXACT_DIGITS = 6_000  # integers are compared to the last digit up to here
MAX_LOG10 = 10**12  # a larger number is not worked with
DIGITS = 60
AGREEMENT = 40  # of them must be the same

MP = MPContext()  # our own precision: the library's default context is everybody's
MP.dps = DIGITS

_LIMITS = (  # a pattern, and how often it may occur
    (re.compile(r"[0-9]{1000}"), 0),
    (re.compile(r"[\^_]"), 60),
    (re.compile(r"\\(?:cup|cap|setminus)"), 6),
    (re.compile("&"), 24),
    (re.compile(r"![\s)}\]]*!"), 0),  # a factorial of a factorial
    (re.compile(r"[-+\u2212]\s*[-+\u2212]"), 8),
    (re.compile(r"\|"), 16),
)
# The parser computes these rather than writing them down: n!, binomials, gamma, determinants.
_LARGE_ARGUMENT = re.compile(r"[0-9]{6,}\s*!|(?:\\binom|\\Gamma|\\choose).*[0-9]{5}|[0-9]{5}.*\\choose|(?:vmatrix|\\det).*(?:&.*){10}", re.DOTALL)

_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_UNFINISHED = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum, sympy.Product)
_INTEGER_NAMES = frozenset("nkmN")  # a formula in these alone is meant for whole numbers
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.sin: MP.sin, sympy.cos: MP.cos, sympy.tan: MP.tan, sympy.cot: MP.cot,
    sympy.sec: MP.sec, sympy.csc: MP.csc, sympy.asin: MP.asin, sympy.acos: MP.acos,
    sympy.atan: MP.atan, sympy.acot: MP.acot, sympy.asec: MP.asec, sympy.acsc: MP.acsc,
    sympy.sinh: MP.sinh, sympy.cosh: MP.cosh, sympy.tanh: MP.tanh, sympy.coth: MP.coth,
    sympy.asinh: MP.asinh, sympy.acosh: MP.acosh, sympy.atanh: MP.atanh,
    sympy.sign: MP.sign, sympy.re: MP.re, sympy.im: MP.im, sympy.conjugate: MP.conj,
    sympy.arg: MP.arg,
}  # fmt: skip

Tree: TypeAlias = sympy.Basic | sympy.MatrixBase
Point: TypeAlias = Mapping[str, Any]


class UnreadableError(ValueError):
    """The text is no mathematics that can be read, or too large to be."""


class _NoValueError(Exception):
    """The expression has no value at this point (a pole, a branch outside its domain)."""


class _UnsupportedError(Exception):
    """The evaluation does not know a node of the tree: a limit, an integral, an infinite sum."""


class _TooLargeError(Exception):
    """A number outgrew its bounds."""


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
    if not is_bounded(text):
        raise UnreadableError("too large")
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


def _as_fraction(match: re.Match[str]) -> str:
    whole, decimals = match.groups()
    return rf"\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"


def constant(tree: Tree) -> Any | None:
    """The value of a constant expression, mpf or mpc, or None when it holds letters or has no value."""
    if not isinstance(tree, sympy.Expr) or _names(tree):
        return None
    try:
        return _constant(tree)
    except (_NoValueError, _UnsupportedError, _TooLargeError):
        return None


def is_short_decimal(value: Any) -> bool:
    """Whether a real value has at most a dozen decimals, so that a decimal can say it exactly."""
    shifted = MP.re(value) * MP.mpf(10) ** 12
    return bool(abs(shifted - MP.nint(shifted)) < MP.mpf(10) ** (12 - AGREEMENT))


def close(left: Any, right: Any) -> bool:
    """Whether two values are the same number, as far as `AGREEMENT` digits tell."""
    return bool(abs(left - right) <= max(abs(left), abs(right)) * MP.mpf(10) ** -AGREEMENT)


def equal(gold: Tree, answer: Tree, *, alarm_s: int) -> bool:
    """Whether two expressions are equal: for every value of their letters, wherever both are real.

    n, k and m stand for whole numbers when no other letter occurs. Raises TimeoutException.
    """
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        try:
            return _equal_by_value(gold, answer)
        except _TooLargeError:
            return bool(gold == answer)
        except _UnsupportedError:
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
            if pair is None or not all(map(_is_real, pair)):
                continue
            if ratio is None and pair[0] != 0:
                ratio = MP.re(pair[1] / pair[0])
            if not ratio or not close(pair[0] * ratio, pair[1]):
                return None
            agreeing += 1
    except (_UnsupportedError, _TooLargeError):
        return None
    return ratio if agreeing >= 3 else None


def _equal_by_value(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    names = _names(gold) | _names(answer)
    if not names:
        try:
            return _constants_equal(gold, answer)
        except _NoValueError:
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
        elif is_complex or min(point.values()) > 0 or all(map(_is_real, pair)):
            return False  # elsewhere they may differ by a branch of a root or a logarithm
    if agreeing < 2:
        raise _UnsupportedError("hardly a point where both have a value")
    return True


def _pair(gold: sympy.Expr, answer: sympy.Expr, point: Point) -> tuple[Any, Any] | None:
    try:
        with MP.workdps(DIGITS):
            return _value(gold, point), _value(answer, point)
    except _NoValueError:
        return None


def _is_real(value: Any) -> bool:
    return bool(abs(MP.im(value)) <= abs(value) * MP.mpf(10) ** -AGREEMENT)


def _constants_equal(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    left, right = _constant(gold), _constant(answer)
    size = max(_log10(left), _log10(right))
    if AGREEMENT - 5 < size < MAX_EXACT_DIGITS:  # integers, to the last digit
        with MP.workdps(int(size) + 20):
            left, right = _value(gold, {}), _value(answer, {})
            return bool(abs(left - right) <= max(abs(left), abs(right)) * MP.mpf(10) ** -(int(size) + 5))
    return close(left, right)


def _constant(tree: sympy.Expr) -> Any:
    """The value of an expression without letters; what only rounding keeps from nought is nought."""
    with MP.workdps(DIGITS):
        value = _value(tree, {})
    if value != 0 and _log10(value) < 20 - DIGITS:
        with MP.workdps(2 * DIGITS):
            finer = _value(tree, {})
        if finer == 0 or _log10(finer) < _log10(value) - 10:
            return MP.mpf(0)
        value = finer
    parts = MP.re(value), MP.im(value)
    return MP.mpc(*(part if abs(part) > abs(value) * MP.mpf(10) ** -AGREEMENT else 0 for part in parts))


def _log10(value: Any) -> float:
    """Decimal magnitude; exponents beyond float are beyond every bound."""
    if value == 0:
        return float("-inf")
    return float(MP.mag(value)) * 0.30103


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


def _value(node: Any, point: Point) -> Any:
    """Evaluate a tree with mpmath at the working precision. Raises _NoValueError, _UnsupportedError."""
    try:
        value = _evaluate(node, point)
    except (ZeroDivisionError, ValueError, OverflowError, NoConvergence) as error:
        raise _NoValueError(str(error)) from error
    if MP.isnan(value) or MP.isinf(value):
        raise _NoValueError("not finite")
    return value


def _evaluate(node: Any, point: Point) -> Any:  # noqa: C901 - one case a kind of node
    if isinstance(node, sympy.Rational):
        return MP.mpf(node.p) / node.q
    if isinstance(node, sympy.Symbol):
        if node.name in point:
            return point[node.name]
        if node.name == "i":
            return MP.mpc(0, 1)
        raise _UnsupportedError(f"no value for {node.name}")
    if isinstance(node, sympy.Add):
        return sum((_evaluate(part, point) for part in node.args), MP.mpf(0))
    if isinstance(node, sympy.Mul):
        product = MP.mpf(1)
        for part in node.args:
            product *= _evaluate(part, point)
        return product
    if isinstance(node, sympy.exp):
        return _power(MP.mpf(MP.e), _evaluate(node.exp, point))  # a Pow with base E counts as an exp, too
    if isinstance(node, sympy.Pow):
        return _root_or_power(node, point)
    if node is sympy.pi or node is sympy.E or node is sympy.I:
        return {sympy.pi: MP.pi, sympy.E: MP.e, sympy.I: MP.mpc(0, 1)}[node] * MP.mpf(1)
    if isinstance(node, sympy.Float):
        return MP.mpf(node)
    arguments = node.args
    if isinstance(node, sympy.Sum | sympy.Product):
        return _series(node, point)
    if isinstance(node, AppliedUndef):
        return _unknown_function(str(node.func), [_evaluate(part, point) for part in arguments])
    values = [_evaluate(part, point) for part in arguments if isinstance(part, sympy.Expr)]
    if len(values) != len(arguments) or not values:
        raise _UnsupportedError(type(node).__name__)
    return _apply(node, values)


def _apply(node: Any, values: list[Any]) -> Any:  # noqa: C901 - one case a kind of function
    first = values[0]
    if any(abs(value) > MP.mpf(10) ** 1_000 for value in values) and not isinstance(node, sympy.Abs | sympy.log):
        raise _TooLargeError("a function of a very large number")
    if isinstance(node, sympy.UnevaluatedExpr):
        return first
    if isinstance(node, sympy.Abs):
        return abs(first)
    if isinstance(node, sympy.log):
        return MP.log(first) / (MP.log(values[1]) if len(values) > 1 else 1)
    if isinstance(node, sympy.factorial | sympy.gamma):
        if abs(first) > 10**9:
            raise _TooLargeError("a very large factorial")
        return MP.gamma(first) if isinstance(node, sympy.gamma) else MP.factorial(first)
    if isinstance(node, sympy.binomial):
        if max(map(abs, values)) > 10**9:
            raise _TooLargeError("a very large binomial")
        return MP.binomial(*values)
    if isinstance(node, sympy.floor | sympy.ceiling):
        slack = MP.mpf(10) ** -AGREEMENT  # floor(log_2 8) is 3
        nearest = MP.nint(MP.re(first))
        if abs(first - nearest) < slack:
            return nearest
        return MP.floor(first) if isinstance(node, sympy.floor) else MP.ceil(first)
    if isinstance(node, sympy.Max | sympy.Min):
        if not all(map(_is_real, values)):
            raise _NoValueError("no order among complex numbers")
        reals = [MP.re(value) for value in values]
        return max(reals) if isinstance(node, sympy.Max) else min(reals)
    function = _FUNCTIONS.get(node.func)
    if function is None:
        raise _UnsupportedError(type(node).__name__)
    return function(first)


def _root_or_power(node: sympy.Pow, point: Point) -> Any:
    base, exponent = _evaluate(node.base, point), _evaluate(node.exp, point)
    is_odd_root = isinstance(node.exp, sympy.Rational) and node.exp.q % 2 == 1 and node.exp.q > 1
    if is_odd_root and _is_real(base) and MP.re(base) < 0:  # the real root, as in school
        root = -((-MP.re(base)) ** (MP.mpf(1) / node.exp.q))
        return root ** int(node.exp.p)
    return _power(base, exponent)


def _power(base: Any, exponent: Any) -> Any:
    if base == 0:
        if MP.re(exponent) <= 0:
            raise _NoValueError("a power of nought")
        return MP.mpf(0)
    size = abs(exponent) * (abs(MP.log(abs(base))) + 1)
    if size > MAX_LOG10:
        raise _TooLargeError("a very large power")
    nearest = MP.nint(MP.re(exponent))
    if exponent == nearest and abs(nearest) < 10**6:
        return base ** int(nearest)
    return MP.power(base, exponent)


def _series(node: Any, point: Point) -> Any:
    if len(node.limits) != 1 or len(node.limits[0]) != 3:
        raise _UnsupportedError("a sum over more than one range")
    index, low, high = node.limits[0]
    if not (isinstance(low, sympy.Expr) and isinstance(high, sympy.Expr)) or low.is_infinite or high.is_infinite:
        raise _UnsupportedError("an infinite sum")
    first, last = _evaluate(low, point), _evaluate(high, point)
    if first != MP.nint(first) or last != MP.nint(last):
        raise _NoValueError("a sum to a fraction")
    if last - first > MAX_TERMS:
        raise _TooLargeError("a long sum")
    is_sum = isinstance(node, sympy.Sum)
    total = MP.mpf(0 if is_sum else 1)
    for step in range(int(first), int(last) + 1):
        term = _evaluate(node.function, {**point, index.name: MP.mpf(step)})
        total = total + term if is_sum else total * term
    return total


def _unknown_function(name: str, values: list[Any]) -> Any:
    """Some fixed smooth function for each name: equal arguments, equal values, and nothing else."""
    source = random.Random(name)
    angle = MP.mpf(source.randrange(1, 1_000)) / 1_009
    for value in values:
        angle += value * source.randrange(100, 1_000) / 1_013
    return MP.cos(angle) + 2


def _verify(gold: Tree, answer: Tree, alarm_s: int) -> bool:
    try:
        return bool(verify([gold], [answer], strict=True, timeout_seconds=alarm_s, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - sympy raises anything at all; what it cannot compare is not accepted
        return False
