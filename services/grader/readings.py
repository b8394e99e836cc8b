"""What a normalised text may be: a number, a list, an option letter, words, a date, a ratio, a relation.

Every reading is a pure function from text to a value, None where the text is no such thing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, TypeAlias

from services.grader.normalise import TEXT

MAX_NUMBER_CHARS = 400  # digits of one number that is read exactly
MAX_EXPONENT = 400  # of 1e400
LARGEST_OPTION = "J"

_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]*)(?:"
    rf"(?P<whole>[0-9]+)?\\frac\{{(?P<num>[+-]?(?:{_UNSIGNED}))\}}\{{(?P<den>[+-]?(?:{_UNSIGNED}))\}}"
    rf"|(?P<mixed>[0-9]+ )?(?P<top>{_UNSIGNED})/(?P<bottom>{_UNSIGNED})"
    rf"|(?P<repeat>[0-9]*\.[0-9]*)\\(?:overline|bar)\{{?(?P<cycle>[0-9]+)\}}?"
    rf"|(?P<plain>{_UNSIGNED})"
    r"(?:(?:[eE]|(?:\\times ?|\\cdot ?|\*|x)10\^)(?P<exp>[+-]?[0-9]{1,4}|\{[+-]?[0-9]{1,4}\}))?"
    rf"|10\^(?P<ten>[0-9]{{1,3}}|\{{[+-]?[0-9]{{1,3}}\}})"
    r")(?P<percent>%?)"
    r"(?P<million> ?(?:thousand|million|billion|trillion)| ?\\text\{(?:thousand|million|billion|trillion)\})?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), start=2)
}
_MULTIPLIERS = {"hundred": 100} | _SCALES
_FRACTION_WORDS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_SYNONYMS = {
    "dne": "undefined", "does not exist": "undefined", "not defined": "undefined", "doesn't exist": "undefined",
    "no limit": "undefined", "not exist": "undefined", "limit does not exist": "undefined",
    "no solution": "empty set", "no solutions": "empty set", "no real solution": "empty set", "emptyset": "empty set",
    "no real solutions": "empty set", "none": "empty set", "the empty set": "empty set", "null set": "empty set",
    "there is no solution": "empty set", "there are no solutions": "empty set", "no such solution": "empty set",
    "all reals": "real numbers", "all real numbers": "real numbers", "reals": "real numbers",
    "any real number": "real numbers", "the real numbers": "real numbers", "every real number": "real numbers",
    "all real": "real numbers", "the set of all real numbers": "real numbers", "all real values": "real numbers",
    "infinite": "infinity", "positive infinity": "infinity", "plus infinity": "infinity",
    "infinitely many solutions": "infinity", "infinite number of solutions": "infinity",
    "infinitely many": "infinity", "infinite solutions": "infinity",
    "minus infinity": "negative infinity", "integers": "integers", "all integers": "integers",
    "the set of integers": "integers", "set of integers": "integers", "set of all integers": "integers",
    "all positive real numbers": "positive reals", "positive real numbers": "positive reals",
    "all positive reals": "positive reals", "all positive numbers": "positive reals",
    "nonnegative real numbers": "nonnegative reals", "all nonnegative real numbers": "nonnegative reals",
    "all non-negative real numbers": "nonnegative reals", "divergent": "diverges", "diverge": "diverges",
    "convergent": "converges", "converge": "converges",
}  # fmt: skip
_CANONICAL = {
    "empty set": r"\emptyset", "real numbers": r"\mathbb{R}", "infinity": r"\infty", "negative infinity": r"-\infty",
    "integers": r"\mathbb{Z}", "positive reals": r"(0,\infty)", "nonnegative reals": r"[0,\infty)",
}  # fmt: skip
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_FUNCTION_NAMES = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "ln",
        "log",
        "exp",
        "arcsin",
        "arccos",
        "arctan",
        "sqrt",
        "sinh",
        "cosh",
        "tanh",
        "gcd",
        "lcm",
        "max",
        "min",
        "det",
        "mod",
    ]
)
_ASSIGNMENT = re.compile(
    r"(?P<name>(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?'*(?:\^\{-1\})?(?:\([A-Za-z](?:,[A-Za-z])*\))?"
    r"|\\frac\{[A-Za-z]\}\{[A-Za-z]\}|[A-Za-z]/[A-Za-z]|[a-wA-W](?:\+[a-wA-W]){1,4}"
    r"|\([A-Za-z](?:,[A-Za-z]){1,5}\)|\|?\\?[A-Z]{2,3}\|?|m?\\angle ?[A-Z]{1,3})"
    r"(?:=|\\approx ?|\\in(?![A-Za-z]) ?)(?P<value>[^=<>].*)"
)
_LABEL = re.compile(
    r"(?:\\text\{[A-Za-z ,']{2,60}(?:=|:|\bis)?\}|[A-Za-z][A-Za-z ']{2,60}) ?(?:=|:)(?=.)"
    r"|\\text\{[A-Za-z ,']{2,60}(?::|\bis)\}"
)
_PHRASE = re.compile(
    r"(?i:^(?:\\text\{)?(?:(?:so |thus |hence )?(?:the |my )?(?:final |correct )?(?:answer|option|choice)(?: is|:)"
    r"|about|approximately|roughly|around|for all|all|when|if)(?: *\}| (?=(?-i:[0-9(A-J]))))|^\\approx"
)
_RELATION_SIGN = re.compile(r"<|>|\\leq(?![A-Za-z]) ?|\\geq(?![A-Za-z]) ?|\\neq(?![A-Za-z]) ?|=")


Rows: TypeAlias = tuple[tuple[str, ...], ...]  # of a matrix, equally long


@dataclass(frozen=True, slots=True)
class Number:
    """A number written out in digits, read exactly."""

    value: Fraction
    decimals: int  # digits after the point; 0 for integers and fractions
    is_percent: bool = False


@dataclass(frozen=True, slots=True)
class Collection:
    """A list, tuple, interval or set, with its elements as text."""

    kind: Literal["list", "set", "union", "ordered"]  # ordered: tuple or interval, told apart by the brackets alone
    brackets: str  # "(]" and so on; "" for a bare list
    elements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of relations: `sides` has one more entry than `signs`, which are of <, >, <=, >=, !=, =."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


def number(text: str) -> Number | None:
    """An exact number: integer, decimal, fraction, mixed, repeating, 1e3, percent, 3 million."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    if part["den"] is not None:
        value = _ratio_of(part["num"], part["den"], whole=part["whole"])
    elif part["bottom"] is not None:
        value = _ratio_of(part["top"], part["bottom"], whole=part["mixed"])
    elif part["cycle"] is not None:
        places, length = len(part["repeat"].partition(".")[2]), len(part["cycle"])
        value = Fraction("0" + part["repeat"]) + Fraction(int(part["cycle"]), 10**places * (10**length - 1))
    elif part["ten"] is not None:
        value = _scaled("1", part["ten"])
    else:
        value = _scaled(part["plain"], part["exp"])
    if value is None:
        return None
    if part["million"]:
        value *= _SCALES[re.sub(r"[^a-z]|text", "", part["million"])]
    plain = part["plain"] or ""
    decimals = 0 if part["exp"] or part["million"] else len(plain.partition(".")[2])
    return Number(-value if part["sign"].count("-") % 2 else value, decimals, part["percent"] == "%")


def words(text: str) -> str | None:
    r"""The words of an answer that is words, lower-cased, in their canonical form; None for mathematics.

    `\text{..}` around letters makes words; bare letters need a run of four, as `ab` is a product.
    """
    bare, count = re.subn(TEXT, r" \1 ", text)
    bare = " ".join(bare.split()).strip(" .!\"'").casefold()
    if not re.fullmatch(r"[^\W\d_][^\d_{}\\^=+*/<>()\[\]]*", bare):
        return None
    runs = re.findall(r"[^\W\d_]+", bare)
    if not count and (not _FUNCTION_NAMES.isdisjoint(runs) or (max(map(len, runs)) < 4 and bare not in _SHORT_WORDS)):
        return None
    if len(bare) < 2:
        return None
    bare = re.sub(r"^(?:the|an?|it is|it's) (?=.)", "", bare)
    bare = _ABBREVIATIONS.get(bare, bare)
    return _SYNONYMS.get(bare, bare)


_SHORT_WORDS = frozenset(
    {"yes", "no", "odd", "dne", "red", "mon", "tue", "wed", "thu", "fri", "sat", "sun", "sum", "max", "min"}
    | set(_NUMBER_WORDS)
)


_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_ABBREVIATIONS = {name[:length]: name for name in (*_DAYS, *MONTHS) for length in (3, 4) if name != "may"}


def canonical(text: str) -> str:
    r"""Words that are mathematics become it: "no solution" is `\emptyset`, "all reals" `\mathbb{R}`."""
    found = words(text)
    if found in _CANONICAL:
        return _CANONICAL[found]
    if text in (r"\{\}", r"\emptyset", "{}"):
        return r"\emptyset"
    if text in (r"\mathbb{R}^+", r"\mathbb{R}^{+}", r"\mathbb{R}_{>0}", r"\mathbb{R}_+"):
        return r"(0,\infty)"
    return r"\infty" if text == r"+\infty" else text


def spelled_number(text: str) -> str:
    r"""Leading number words become digits: `\text{twenty-five apples}` is `25 apples`; other text stays as it is."""
    bare = re.sub(TEXT, r" \1 ", text)
    bare = " ".join(bare.split())
    if not re.match(r"[A-Za-z]{3,}", bare):
        return text
    tokens = re.findall(r"[A-Za-z]+|[^A-Za-z\s-]+", bare)
    sign = -1 if tokens and tokens[0].casefold() in ("minus", "negative") else 1
    start = 1 if sign < 0 else 0
    value, used = _read_number_words([token.casefold() for token in tokens[start:]])
    if not used:
        return text
    rest = " ".join(tokens[start + used :])
    if rest and not re.fullmatch(r"[A-Za-z ]+", rest):
        return text
    digits = str(sign * value) if value.denominator == 1 else f"{sign * value.numerator}/{value.denominator}"
    return f"{digits} {rest}" if rest else digits


def _read_number_words(tokens: Sequence[str]) -> tuple[Fraction, int]:
    total = current = 0
    used = 0
    for token in tokens:
        if token in _NUMBER_WORDS:
            current += _NUMBER_WORDS[token]
        elif token in _MULTIPLIERS and (used or token != "hundred"):
            if token == "hundred":
                current = max(1, current) * 100
            else:
                total, current = total + max(1, current) * _MULTIPLIERS[token], 0
        elif token.removesuffix("s") in _FRACTION_WORDS and used and used == len(tokens) - 1:
            return Fraction(total + current, _FRACTION_WORDS[token.removesuffix("s")]), used + 1
        elif not (token == "and" and used and tokens[used - 1] in _MULTIPLIERS):
            break
        used += 1
    return Fraction(total + current), used


def option_letter(text: str) -> tuple[str, str] | None:
    r"""Letter and text of a multiple-choice answer: `B`, `(B)`, `\text{(B)}`, `B.`, `(B) 12`, `Option B`."""
    bare = re.sub(TEXT, r"\1", text).strip()
    match = re.fullmatch(
        r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) ?)?"
        rf"(?:[(\[]([A-{LARGEST_OPTION}a-e])[)\]](.*)|([A-{LARGEST_OPTION}])(?:[.:)](.*))?)",
        bare,
    )
    if match is None:
        return None
    letter = (match[1] or match[3]).upper()
    text = (match[2] or match[4] or "").strip(" :.-")
    return None if re.search(rf"^[,;]|\([A-{LARGEST_OPTION}]\)", text) else (letter, text)


def option_letters(text: str) -> frozenset[str] | None:
    """Several choices, such as `(A),(C)`; None for one choice and for anything else."""
    bare = re.sub(TEXT, r"\1", text).replace(" ", "")
    if not re.fullmatch(
        rf"\(([A-{LARGEST_OPTION}])\)(?:[,;]?\([A-{LARGEST_OPTION}]\))+|[A-{LARGEST_OPTION}](?:[,;][A-{LARGEST_OPTION}])+",
        bare,
    ):
        return None
    return frozenset(re.findall("[A-Z]", bare))


def collection(text: str) -> Collection | None:
    """A list, tuple, interval or set; None when the text is a single thing."""
    for opening, closing in ((r"\langle", r"\rangle"),):
        if text.startswith(opening) and text.endswith(closing):
            return Collection("ordered", "()", tuple(split_commas(text[len(opening) : -len(closing)])[0]))
    parts, wrapped = split_commas(text)
    if not wrapped:
        if len(parts) < 2 or not all(parts):
            return None
        return Collection("list", "", tuple(parts))
    is_set = text.startswith("\\{")
    if is_set != text.endswith("\\}"):
        return None
    width = 2 if is_set else 1
    parts, _ = split_commas(text[width:-width], is_inside=True)
    if not all(parts) or (len(parts) < 2 and not is_set):
        return None
    return Collection("set" if is_set else "ordered", "{}" if is_set else text[0] + text[-1], tuple(parts))


def union(text: str) -> Collection | None:
    r"""The parts of a union or an intersection, whose order does not matter: `A\cup B`."""
    for sign in (r"\cup", r"\cap"):
        if text.count(sign) and not re.search(r"\\(?:cup|cap|setminus)", text.replace(sign, "")):
            parts = tuple(part.strip() for part in re.split(re.escape(sign) + "(?![A-Za-z])", text))
            return Collection("union", sign, parts) if all(parts) else None
    return None


def split_commas(text: str, *, is_inside: bool = False) -> tuple[list[str], bool]:
    """Top-level parts between commas and semicolons, and whether one bracket pair wraps the whole text.

    A comma in a bare `1,234` groups digits; inside brackets it separates.
    """
    if not is_inside and number(text) is not None:
        return [text], False
    parts, depth, start, closed_at_zero = [], 0, 0, 0
    opens_first = text[:1] in ("(", "[", "]") or text.startswith("\\{")
    for match in re.finditer(r"\\[{}]|\\.|[(){}\[\],;]", text, re.DOTALL):
        token = match.group()
        if token in ("(", "[", "{", "\\{") or (token == "]" and match.start() == 0):
            depth += 1
        elif token in (")", "]", "}", "\\}") or (token == "[" and match.end() == len(text)):
            depth -= 1
            closed_at_zero += depth == 0
            if depth == 0 and match.end() < len(text):
                opens_first = False
        elif token in (",", ";") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return parts, opens_first and depth == 0 and closed_at_zero == 1 and len(parts) == 1


def matrix(text: str) -> Rows | None:
    """The rows of a pmatrix, bmatrix, Bmatrix, matrix or array; None for a determinant and anything else."""
    match = re.fullmatch(
        r"[(\[]?\\begin\{([pbB]?(?:small)?matrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}[)\]]?", text, re.DOTALL
    )
    if match is None or r"\begin" in match[2]:
        return None
    rows = re.split(r"\\\\(?:\[[^\]]*\])?", match[2].replace(r"\hline", ""))
    cells = tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows if row.strip())
    return cells if cells and len({len(row) for row in cells}) == 1 else None


def assignment(text: str) -> tuple[str, str] | None:
    r"""Name and value of `x=5`, `f(x)=x^2`, `x\in[1,2]`, `(x,y)=(1,2)`; the value has no further sign of relation."""
    match = _ASSIGNMENT.fullmatch(text)
    if match is None or _RELATION_SIGN.search(match["value"]):
        return None
    return match["name"].replace("{", "").replace("}", "").strip(), match["value"].strip()


def named_values(text: str) -> dict[str, str] | None:
    """The values by name of `x=1,y=2` and `(x,y)=(1,2)`, in their order; None where a name is missing or twice."""
    whole = assignment(text)
    if whole and whole[0].startswith("("):
        names, values = whole[0][1:-1].split(","), collection(whole[1])
        if values and values.kind == "ordered" and len(values.elements) == len(names):
            return dict(zip(names, values.elements, strict=True))
        return None
    parts = collection(text)
    pairs = [assignment(element) for element in parts.elements] if parts and parts.kind != "ordered" else []
    named = dict(pair for pair in pairs if pair)
    return named if len(named) == len(pairs) > 1 else None


def drop_phrase(text: str) -> str:
    r"""`\text{The answer is }12`, `about 12`, `\approx 12` and `\text{all }x>12` without what stands before."""
    return _PHRASE.sub("", text) or text


def drop_label(text: str) -> str:
    r"""`\text{Area}=12`, `\text{The answer is }12` and `Answer: 12` are `12`."""
    match = _LABEL.match(text)
    return text[match.end() :].strip() if match and match.end() < len(text) else text


def relation(text: str) -> Relation | None:
    """A chain such as `1<x\\leq 3`, split at its top level."""
    sides, signs, start = [], [], 0
    depth = 0
    for match in re.finditer(r"[(\[{]|[)\]}]|" + _RELATION_SIGN.pattern, text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif depth == 0:
            sides.append(text[start : match.start()].strip())
            signs.append({r"\leq": "<=", r"\geq": ">=", r"\neq": "!="}.get(token.strip(), token))
            start = match.end()
    sides.append(text[start:].strip())
    return Relation(tuple(sides), tuple(signs)) if signs and all(sides) else None


def mixed_quantities(text: str) -> list[str] | None:
    """The parts of `2 hours 30 minutes` or `5 feet 11 inches`, each a number with its unit."""
    bare = " ".join(re.sub(TEXT, r" \1 ", text).replace(",", " ").split())
    parts = re.findall(r"[0-9]{1,9}(?:\.[0-9]{1,9})? ?[A-Za-z]{1,10}\.?(?= |$)", bare)
    return (
        parts
        if len(parts) >= 2 and re.fullmatch(r"(?:[0-9]+(?:\.[0-9]+)? ?[A-Za-z]{1,10}\.?(?: and)? ?)+", bare)
        else None
    )


def is_increasing(signs: Sequence[str]) -> bool:
    """Whether a chain runs one way: all of <, <= or all of >, >=."""
    return (
        len({sign[0] for sign in signs}) == 1 and signs[0][0] in "<>" and all(a[0] == b[0] for a, b in pairwise(signs))
    )


def _ratio_of(top: str, bottom: str, *, whole: str | None) -> Fraction | None:
    numerator, denominator = _scaled(top, None), _scaled(bottom, None)
    if numerator is None or not denominator:
        return None
    if whole and numerator >= denominator:
        return None  # 3\frac{4}{3} is no mixed number
    return Fraction(int(whole) if whole else 0) + numerator / denominator


def _scaled(digits: str, exponent: str | None) -> Fraction | None:
    power = int(exponent.strip("{}")) if exponent else 0
    if abs(power) > MAX_EXPONENT:
        return None
    return Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** power
