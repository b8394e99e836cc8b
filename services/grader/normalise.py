"""Bring answers to one spelling, and read exact numbers, units and lists out of that spelling.

Pure text work: every pattern is linear, nothing is evaluated. `equivalence` decides what the pieces mean.
"""

# ruff: noqa: RUF001 - this file is where look-alike characters are told apart
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from services.grader.answer import unwrap

MAX_NUMBER_CHARS = 400  # digits of one number that is read exactly
MAX_EXPONENT = 400  # of 1e400

_UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "√": r"\sqrt ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ ",
    "±": r"\pm ", "∈": r"\in ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "ℝ": r"\mathbb{R}",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mbox|operatorname)\s*\{([^{}\\]*)\}"
_PLAIN = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?\s*"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|mathstrut|strut)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:le|leqslant)(?![A-Za-z])|<="), r"\\leq "),
    (re.compile(r"\\(?:ge|geqslant)(?![A-Za-z])|>="), r"\\geq "),
    (re.compile(r"\\ne(?![A-Za-z])|!="), r"\\neq "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:mathrm|mathit|mathbf)\s*\{([eid])\}"), r"\1"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\degrees?(?![A-Za-z])|\\degrees?(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))"), ""),  # explicit thousands
    (re.compile(r"(?<=[0-9])\\[,;:](?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\(?:qquad|quad)(?![A-Za-z])|(?<!\\)\\[,;:! ]|~"), " "),
    (re.compile(r"(?<![\\A-Za-z])(?:sqrt)\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:text|textrm|mbox)\s*\{\s*(?:,\s*)?(?:and|or)\s*\}"), ","),
    (re.compile(r"(?<=[0-9})\s])\s(?:and|or)\s(?=[\s\\0-9(a-z-])"), ","),
)  # fmt: skip
_ARGUMENT = re.compile(r"\\(?:frac|sqrt|binom)(?![A-Za-z])\s*")
_SINGLE_ARGUMENT = re.compile(r"\\(?!frac|sqrt|binom)[A-Za-z]+|[A-Za-z0-9]")
_SINGLE_SCRIPT = re.compile(r"([\^_])\{([A-Za-z0-9])\}")
_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|(?<=[0-9]) (?=[A-Za-z])")
_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:"
    rf"(?P<whole>[0-9]+)?\\frac\{{(?P<num>[+-]?(?:{_UNSIGNED}))\}}\{{(?P<den>[+-]?(?:{_UNSIGNED}))\}}"
    rf"|(?P<mixed>[0-9]+ )?(?P<top>{_UNSIGNED})/(?P<bottom>{_UNSIGNED})"
    rf"|(?P<repeat>[0-9]+\.[0-9]*)\\(?:overline|bar)\{{(?P<cycle>[0-9]+)\}}"
    rf"|(?P<plain>{_UNSIGNED})(?:(?:[eE]|(?:\\times|\\cdot|\*|x)10\^)(?P<exp>[+-]?[0-9]{{1,4}}|\{{[+-]?[0-9]{{1,4}}\}}))?"
    rf")(?P<percent>%?)"
)
_UNIT_TEXT = re.compile(_TEXT + r"(?:\s*\^\s*\{?([0-9])\}?)?\s*$")
_UNIT_WORD = re.compile(r"(?<=[0-9}])\s*([A-Za-z]{2,12}(?: [A-Za-z]{2,12})?)(?:\^([0-9]))?$")
_UNIT_IN_BRACKETS = re.compile(r"(?<=[0-9}])\(([A-Za-z]{3,20}(?: [A-Za-z]{1,20}){0,4})\)()$")
_SYNONYMS = {
    "in": "inch", "inches": "inch", "feet": "foot", "ft": "foot", "hrs": "hour", "hr": "hour", "min": "minute",
    "mins": "minute", "sec": "second", "secs": "second", "centimeter": "cm", "centimeters": "cm", "meter": "m",
    "meters": "m", "metre": "m", "metres": "m", "kilometer": "km", "kilometers": "km", "kilogram": "kg",
    "kilograms": "kg", "gram": "g", "grams": "g", "percent": "%", "lbs": "pound", "lb": "pound", "mi": "mile",
    "millimeter": "mm", "millimeters": "mm", "yd": "yard", "deg": "degree", "cubes": "cube",
}  # fmt: skip
_UNITS = frozenset(_SYNONYMS) | {
    *("cm", "mm", "km", "kg", "mg", "inch", "foot", "yard", "yards", "mile", "miles", "pound", "pounds", "liter"),
    *("hour", "hours", "minute", "minutes", "second", "seconds", "day", "days", "week", "weeks", "month", "months"),
    *("year", "years", "degree", "degrees", "dollar", "dollars", "cent", "cents", "unit", "units", "square", "mph"),
    "liters",
}
_CURRENCY = {"$": "dollar", "£": "pound sterling", "€": "euro", "¥": "yen"}


@dataclass(frozen=True, slots=True)
class Number:
    """A number written out in digits, read exactly."""

    value: Fraction
    decimals: int  # digits after the point; 0 for integers and fractions
    is_percent: bool


@dataclass(frozen=True, slots=True)
class Collection:
    """A list, tuple, interval or set, with its elements as text."""

    kind: Literal["list", "set", "ordered"]  # ordered: tuple or interval, told apart by the brackets alone
    brackets: str  # "(]" and so on; "" for a bare list
    elements: tuple[str, ...]


def normalise(text: str) -> str:
    """Return the one spelling of an answer: two texts that spell the same thing alike become equal strings."""
    text = unwrap(_unicode(text))
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = text.replace(r"\$", "$").replace(r"\%", "%").replace("\n", " ")
    text = unwrap(re.sub(r"\s+", " ", text)).rstrip(".").strip()
    text = _brace_arguments(text)
    text = _SINGLE_SCRIPT.sub(r"\1\2", text)
    return _SPACE.sub("", text).strip()


def clean(text: str) -> str:
    """Replace lone surrogates, which no encoder takes, and drop control and format characters."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def number(text: str) -> Number | None:
    """Read a normalised text as one exact number: integer, decimal, fraction, mixed, repeating, 1e3, percent."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    if part["den"] is not None:
        value = _ratio(part["num"], part["den"], whole=part["whole"])
    elif part["bottom"] is not None:
        value = _ratio(part["top"], part["bottom"], whole=part["mixed"])
    elif part["cycle"] is not None:
        places, length = len(part["repeat"].partition(".")[2]), len(part["cycle"])
        value = Fraction(part["repeat"]) + Fraction(int(part["cycle"]), 10**places * (10**length - 1))
    else:
        value = _scaled(part["plain"], part["exp"])
    if value is None:
        return None
    plain = part["plain"] or ""
    decimals = 0 if part["exp"] else len(plain.partition(".")[2])
    return Number(-value if part["sign"] == "-" else value, decimals, part["percent"] == "%")


def split_unit(text: str) -> tuple[str, str]:
    """Split a normalised text into value and canonical unit; no unit is ""."""
    for sign, currency in _CURRENCY.items():
        if text.startswith((sign, f"-{sign}")):
            return text.replace(sign, "", 1), currency
    if text.endswith(r"^\circ"):
        return text.removesuffix(r"^\circ"), "degree"
    match = _UNIT_TEXT.search(text) or _UNIT_IN_BRACKETS.search(text)
    if match is None:
        match = _UNIT_WORD.search(text)
        if match is not None and match.group(1).split()[0].lower() not in _UNITS:
            match = None
    if match is None or not text[: match.start()].strip():
        return text, ""
    words = match.group(1).lower().replace(".", "").replace("per", "/").split()
    unit = " ".join(
        _SYNONYMS.get(word) or (word[:-1] if len(word) > 3 and word.endswith("s") else word) for word in words
    )
    if unit == "%":
        return text[: match.start()].strip() + "%", ""
    return text[: match.start()].strip(), unit + (match.group(2) or "")


def words(text: str) -> str | None:
    r"""The words of an answer that is words, lower-cased; None for mathematics.

    `\text{..}` around letters makes words; bare letters need a run of four, as `ab` is a product.
    """
    bare, count = re.subn(_TEXT, r" \1 ", text)
    bare = " ".join(bare.split()).strip(" .").casefold()
    if not re.fullmatch(r"[^\W\d_][^\d_{}\\^=+*/<>()\[\]]*", bare):
        return None
    runs = re.findall(r"[^\W\d_]+", bare)
    named = {"sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "arcsin", "arccos", "arctan", "sqrt"}
    if not count and (named.intersection(runs) or max(map(len, runs)) < 4):
        return None
    return bare if len(bare) > 1 else None


def option_letter(text: str) -> str | None:
    r"""The letter of a multiple-choice answer: `B`, `(B)`, `\text{(B)}`, `B.`, `(B) 12`, `Option B`."""
    bare = re.sub(_TEXT, r"\1", text).strip()
    match = re.fullmatch(r"(?:[Oo]ption ?)?(?:\(([A-H])\)[^(),]*|([A-H])(?:[.:)][^(),]*)?)", bare)
    return (match.group(1) or match.group(2)) if match else None


def collection(text: str) -> Collection | None:
    """Read a normalised text as a list, tuple, interval or set; None when it is a single thing."""
    parts, wrapped = _split_commas(text)
    if not wrapped:
        if len(parts) < 2 or not all(parts):
            return None
        return Collection("list", "", tuple(parts))
    is_set = text.startswith("\\{")
    if is_set != text.endswith("\\}"):
        return None
    width = 2 if is_set else 1
    parts, _ = _split_commas(text[width:-width])
    if not all(parts) or (len(parts) < 2 and not is_set):
        return None
    return Collection("set" if is_set else "ordered", "{}" if is_set else text[0] + text[-1], tuple(parts))


def _split_commas(text: str) -> tuple[list[str], bool]:
    """Top-level parts between commas, and whether one bracket pair wraps the whole text."""
    parts, depth, start, closed_at_zero = [], 0, 0, 0
    opens_first = text[:1] in ("(", "[") or text.startswith("\\{")
    for match in re.finditer(r"\\[{}]|\\.|[(){}\[\],;]", text, re.DOTALL):
        token = match.group()
        if token in ("(", "[", "{", "\\{"):
            depth += 1
        elif token in (")", "]", "}", "\\}"):
            depth -= 1
            closed_at_zero += depth == 0
            if depth == 0 and match.end() < len(text):
                opens_first = False
        elif token in (",", ";") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return parts, opens_first and depth == 0 and closed_at_zero == 1 and len(parts) == 1


def _unicode(text: str) -> str:
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", clean(text))
    for symbol, latex in _UNICODE.items():
        text = text.replace(symbol, latex)
    return unicodedata.normalize("NFKC", text)


def _brace_arguments(text: str) -> str:
    r"""`\frac12`, `\frac{5}9` and `\sqrt2` get their braces."""
    closes, stack = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closes[stack.pop()] = match.start()
    braces: list[tuple[int, str]] = []
    for match in _ARGUMENT.finditer(text):
        position = match.end()
        for _ in range(1 if match.group().startswith(r"\sqrt") else 2):
            position += text[position : position + 1] == " "
            token = _SINGLE_ARGUMENT.match(text, position)
            if token is not None:
                braces += [(position, "{"), (token.end(), "}")]
                position = token.end()
            elif position in closes:
                position = closes[position] + 1
            else:
                break
    out, start = [], 0
    for position, brace in sorted(braces, key=lambda entry: entry[0]):
        out += [text[start:position], brace]
        start = position
    return "".join([*out, text[start:]])


def _ratio(top: str, bottom: str, *, whole: str | None) -> Fraction | None:
    numerator, denominator = _scaled(top, None), _scaled(bottom, None)
    if numerator is None or not denominator:
        return None
    return Fraction(int(whole) if whole else 0) + numerator / denominator


def _scaled(digits: str, exponent: str | None) -> Fraction | None:
    power = int(exponent.strip("{}")) if exponent else 0
    if abs(power) > MAX_EXPONENT:
        return None
    return Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** power
