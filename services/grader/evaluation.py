"""The value of an expression at a point: mpmath with 60 digits over a sympy tree, within bounds.

sympy's own evaluation is neither bounded nor quick on a tree that nobody simplified; this walks the tree once.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
from mpmath.ctx_mp import MPContext
from mpmath.libmp import NoConvergence
from sympy.core.function import AppliedUndef

DIGITS = 60  # of the working precision
AGREEMENT = 40  # of them must be the same
MAX_TERMS = 2_000  # of a sum or product that is added up
MAX_LOG10 = 10**12  # a larger number is not worked with

MP = MPContext()  # our own precision: the library's default context is everybody's
MP.dps = DIGITS

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.sin: MP.sin, sympy.cos: MP.cos, sympy.tan: MP.tan, sympy.cot: MP.cot,
    sympy.sec: MP.sec, sympy.csc: MP.csc, sympy.asin: MP.asin, sympy.acos: MP.acos,
    sympy.atan: MP.atan, sympy.acot: MP.acot, sympy.asec: MP.asec, sympy.acsc: MP.acsc,
    sympy.sinh: MP.sinh, sympy.cosh: MP.cosh, sympy.tanh: MP.tanh, sympy.coth: MP.coth,
    sympy.asinh: MP.asinh, sympy.acosh: MP.acosh, sympy.atanh: MP.atanh,
    sympy.sign: MP.sign, sympy.re: MP.re, sympy.im: MP.im, sympy.conjugate: MP.conj,
    sympy.arg: MP.arg,
}  # fmt: skip

Point: TypeAlias = Mapping[str, Any]


class NoValueError(Exception):
    """The expression has no value at this point (a pole, a branch outside its domain)."""


class UnsupportedError(Exception):
    """The evaluation does not know a node of the tree: a limit, an integral, an infinite sum."""


class TooLargeError(Exception):
    """A number outgrew its bounds."""


def value_at(node: Any, point: Point) -> Any:
    """Evaluate a tree with mpmath at the working precision. Raises NoValueError, UnsupportedError."""
    try:
        value = _evaluate(node, point)
    except (ZeroDivisionError, ValueError, OverflowError, NoConvergence) as error:
        raise NoValueError(str(error)) from error
    if MP.isnan(value) or MP.isinf(value):
        raise NoValueError("not finite")
    return value


def is_real(value: Any) -> bool:
    """Whether a value is real, as far as `AGREEMENT` digits tell."""
    return bool(abs(MP.im(value)) <= abs(value) * MP.mpf(10) ** -AGREEMENT)


def is_short_decimal(value: Any) -> bool:
    """Whether a real value has at most a dozen decimals, so that a decimal can say it exactly."""
    shifted = MP.re(value) * MP.mpf(10) ** 12
    return bool(abs(shifted - MP.nint(shifted)) < MP.mpf(10) ** (12 - AGREEMENT))


def close(left: Any, right: Any) -> bool:
    """Whether two values are the same number, as far as `AGREEMENT` digits tell."""
    return bool(abs(left - right) <= max(abs(left), abs(right)) * MP.mpf(10) ** -AGREEMENT)


def log10(value: Any) -> float:
    """Decimal magnitude of a value, to about a third of a digit; -inf for nought."""
    if value == 0:
        return float("-inf")
    return float(MP.mag(value)) * 0.30103


def _evaluate(node: Any, point: Point) -> Any:  # noqa: C901 - one case a kind of node
    if isinstance(node, sympy.Rational):
        return MP.mpf(node.p) / node.q
    if isinstance(node, sympy.Symbol):
        if node.name in point:
            return point[node.name]
        if node.name == "i":
            return MP.mpc(0, 1)
        raise UnsupportedError(f"no value for {node.name}")
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
        raise UnsupportedError(type(node).__name__)
    return _apply(node, values)


def _apply(node: Any, values: list[Any]) -> Any:  # noqa: C901 - one case a kind of function
    first = values[0]
    if any(abs(value) > MP.mpf(10) ** 1_000 for value in values) and not isinstance(node, sympy.Abs | sympy.log):
        raise TooLargeError("a function of a very large number")
    if isinstance(node, sympy.UnevaluatedExpr):
        return first
    if isinstance(node, sympy.Abs):
        return abs(first)
    if isinstance(node, sympy.log):
        return MP.log(first) / (MP.log(values[1]) if len(values) > 1 else 1)
    if isinstance(node, sympy.factorial | sympy.gamma):
        if abs(first) > 10**9:
            raise TooLargeError("a very large factorial")
        return MP.gamma(first) if isinstance(node, sympy.gamma) else MP.factorial(first)
    if isinstance(node, sympy.binomial):
        if max(map(abs, values)) > 10**9:
            raise TooLargeError("a very large binomial")
        return MP.binomial(*values)
    if isinstance(node, sympy.floor | sympy.ceiling):
        slack = MP.mpf(10) ** -AGREEMENT  # floor(log_2 8) is 3
        nearest = MP.nint(MP.re(first))
        if abs(first - nearest) < slack:
            return nearest
        return MP.floor(first) if isinstance(node, sympy.floor) else MP.ceil(first)
    if isinstance(node, sympy.Max | sympy.Min):
        if not all(map(is_real, values)):
            raise NoValueError("no order among complex numbers")
        reals = [MP.re(value) for value in values]
        return max(reals) if isinstance(node, sympy.Max) else min(reals)
    function = _FUNCTIONS.get(node.func)
    if function is None:
        raise UnsupportedError(type(node).__name__)
    return function(first)


def _root_or_power(node: sympy.Pow, point: Point) -> Any:
    base, exponent = _evaluate(node.base, point), _evaluate(node.exp, point)
    is_odd_root = isinstance(node.exp, sympy.Rational) and node.exp.q % 2 == 1 and node.exp.q > 1
    if is_odd_root and is_real(base) and MP.re(base) < 0:  # the real root, as in school
        root = -((-MP.re(base)) ** (MP.mpf(1) / node.exp.q))
        return root ** int(node.exp.p)
    return _power(base, exponent)


def _power(base: Any, exponent: Any) -> Any:
    if base == 0:
        if MP.re(exponent) <= 0:
            raise NoValueError("a power of nought")
        return MP.mpf(0)
    size = abs(exponent) * (abs(MP.log(abs(base))) + 1)
    if size > MAX_LOG10:
        raise TooLargeError("a very large power")
    nearest = MP.nint(MP.re(exponent))
    if exponent == nearest and abs(nearest) < 10**6:
        return base ** int(nearest)
    return MP.power(base, exponent)


def _series(node: Any, point: Point) -> Any:
    if len(node.limits) != 1 or len(node.limits[0]) != 3:
        raise UnsupportedError("a sum over more than one range")
    index, low, high = node.limits[0]
    if not (isinstance(low, sympy.Expr) and isinstance(high, sympy.Expr)) or low.is_infinite or high.is_infinite:
        raise UnsupportedError("an infinite sum")
    first, last = _evaluate(low, point), _evaluate(high, point)
    if first != MP.nint(first) or last != MP.nint(last):
        raise NoValueError("a sum to a fraction")
    if last - first > MAX_TERMS:
        raise TooLargeError("a long sum")
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
