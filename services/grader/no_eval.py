"""Keeps sympy from evaluating text as Python: what it would `eval` is read as a number here, or refused.

latex2sympy2 makes each number of an answer with `sympy.Number(text)`, which ends in `parse_expr`: `exec("from sympy
import *")` and `eval` of the digits. Digits are harmless, but the door is open to whatever else reaches it, and walking
through it costs 0.2 ms a number.
"""

import re
from typing import Any

import latex2sympy2_extended.latex2sympy2
import math_verify.parser
import sympy
import sympy.parsing
import sympy.parsing.sympy_parser

_INTEGER = re.compile(r"\s*([+-]?[0-9]+)\s*")
_DECIMAL = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?)\s*")
_HOLDERS = (
    sympy,
    sympy.parsing,
    sympy.parsing.sympy_parser,
    latex2sympy2_extended.latex2sympy2,
    math_verify.parser,
)


def read_number(text: str, *_: Any, **__: Any) -> sympy.Number:
    """In place of `sympy.parse_expr`: the integer or decimal that `text` spells. Raises SympifyError for all else."""
    if found := _INTEGER.fullmatch(text):
        return sympy.Integer(int(found.group(1)))
    if found := _DECIMAL.fullmatch(text):
        return sympy.Float(found.group(1))
    raise sympy.SympifyError(f"text is not evaluated here: {text[:80]!r}")


def seal() -> None:
    """Replace `parse_expr` in this process, wherever these libraries hold it."""
    for holder in _HOLDERS:
        holder.parse_expr = read_number
