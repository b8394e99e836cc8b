"""Keeps sympy from evaluating text as Python: what it would `eval` is read as a number here, or refused.

latex2sympy2 makes each number of an answer with `sympy.Number(text)`, which ends in `parse_expr`: `exec("from sympy
import *")` and `eval` of the digits. Digits are harmless, but the door is open to whatever else reaches it, and walking
through it costs 0.2 ms a number.
"""

import re
import sys
from typing import Any, cast

import latex2sympy2_extended.latex2sympy2
import sympy
import sympy.parsing
import sympy.parsing.sympy_parser

from services.grader.confinement import is_text_of_a_library

_INTEGER = re.compile(r"\s*([+-]?[0-9]+)\s*")
_DECIMAL = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?)\s*")
_parse_expr = sympy.parsing.sympy_parser.parse_expr
_HOLDERS = (sympy, sympy.parsing, sympy.parsing.sympy_parser, latex2sympy2_extended.latex2sympy2)


def read_number(text: str, *arguments: Any, **options: Any) -> sympy.Basic:
    """In place of `sympy.parse_expr`: the integer or decimal that `text` spells. Raises SympifyError for all else.

    Modules of sympy that are imported on first use may have their own texts parsed (the names of units).
    """
    if found := _INTEGER.fullmatch(text):
        return sympy.Integer(int(found.group(1)))
    if found := _DECIMAL.fullmatch(text):
        return sympy.Float(found.group(1))
    if is_text_of_a_library(sys._getframe()):
        return cast(sympy.Basic, _parse_expr(text, *arguments, **options))
    raise sympy.SympifyError(f"text is not evaluated here: {text[:80]!r}")


def seal() -> None:
    """Replace `parse_expr` in this process, wherever these libraries hold it.

    math-verify's own parser keeps it: nothing here calls that parser, and benchmarks compare with it as it is.
    """
    for holder in _HOLDERS:
        holder.parse_expr = read_number
