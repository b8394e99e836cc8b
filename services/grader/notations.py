"""Notations with rules of their own: dates, times of day, numbers in a base, residues.

Each is read from normalised text and compared by what it says, never as algebra (2024-01-02 is no difference).
"""

import re

from services.grader.normalise import TEXT
from services.grader.readings import MONTHS, number

_MONTH = "|".join(f"{name[:3]}(?:{name[3:]}|\\.|{'t.?' if name == 'september' else ''})?" for name in MONTHS)
_YEAR = r"(?:[,;]? ?(?P<year>[0-9]{4}))?"
_DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
_DATES = (
    re.compile(r"(?P<year>[0-9]{4})[-/.](?P<month>[0-9]{1,2})[-/.](?P<day>[0-9]{1,2})"),
    re.compile(rf"(?P<name>{_MONTH}) ?{_DAY}{_YEAR}", re.IGNORECASE),
    re.compile(rf"(?:the )?{_DAY} ?(?:of )?(?P<name>{_MONTH}){_YEAR}", re.IGNORECASE),
)
_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))?)?"
    r" ?(?P<half>[ap]\.? ?m\.?)?(?: ?o'?clock)?",
    re.IGNORECASE,
)
_CLOCK_WORDS = {"noon": (12, 0, 0), "midnight": (0, 0, 0)}
_BASE = re.compile(
    r"(?:\(([0-9A-Fa-f]{1,200})\)|\\text\{([0-9A-Fa-f]{1,200})\}|([0-9A-Fa-f]{1,200}))_\{?(?:\(?([0-9]{1,2})\)?|\\text\{([a-z]+)\})\}?"
)
_MODULO = r"(?:\(?\\?pmod|\\(?:text|operatorname)\{ ?mod ?\}|\(?\\?b?mod(?:ulo)?|\(\\text\{mod\})"
_RESIDUE = re.compile(
    r"(?:[A-Za-z]\s?\\equiv\s?)?(?P<residues>-?[0-9]{1,30}(?:,-?[0-9]{1,30}){0,20}) ?"
    + _MODULO
    + r"\s?\(?\{?(?P<modulus>[0-9]{1,30})\}?\)?\)?"
)


def date(text: str) -> tuple[int | None, int, int] | None:
    """(year or None, month, day)."""
    bare = " ".join(re.sub(TEXT, r" \1 ", text).split())
    for pattern in _DATES:
        match = pattern.fullmatch(bare)
        if match is None:
            continue
        part = match.groupdict()
        named = [name[:3] for name in MONTHS]
        month = named.index(part["name"][:3].lower()) + 1 if part.get("name") else int(part["month"])
        if 1 <= month <= 12 and 1 <= int(part["day"]) <= 31:
            return (int(part["year"]) if part["year"] else None, month, int(part["day"]))
    return None


def clock(text: str) -> tuple[int, int, int, str] | None:
    """(hour, minute, second, half) of a time of day; half is "am", "pm" or "", and with one the hour is of 24."""
    bare = " ".join(re.sub(TEXT, r" \1 ", text).split())
    if bare.casefold() in _CLOCK_WORDS:
        return (*_CLOCK_WORDS[bare.casefold()], "pm" if bare.casefold() == "noon" else "am")
    match = _TIME.fullmatch(bare)
    if match is None or not (match["minute"] or match["half"]):
        return None
    half = (match["half"] or "").lower().replace(".", "").replace(" ", "")
    hour = int(match["hour"])
    if hour > 24 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "pm" else 0)
    elif hour > 12 or match["hour"].startswith("0"):
        half = "pm" if hour >= 12 else "am"
    return hour, int(match["minute"] or 0), int(match["second"] or 0), half


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number such as `101_2`."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    named = {
        "two": 2,
        "three": 3,
        "four": 4,
        "five": 5,
        "six": 6,
        "seven": 7,
        "eight": 8,
        "nine": 9,
        "ten": 10,
        "twelve": 12,
        "sixteen": 16,
    }
    base = int(match[4]) if match[4] else named.get(match[5], 0)
    digits = (match[1] or match[2] or match[3]).upper()
    return (digits, base) if 2 <= base <= 36 else None


def residue(text: str) -> tuple[frozenset[int], int] | None:
    """Residues and modulus of `3 \\pmod 7` or `1,3 \\pmod 4`, with or without `x \\equiv`."""
    match = _RESIDUE.fullmatch(text)
    if match is None or int(match["modulus"]) == 0:
        return None
    modulus = int(match["modulus"])
    return frozenset(int(part) % modulus for part in match["residues"].split(",")), modulus


def same_moment(gold: str, answer: str) -> bool | None:
    """Whether two dates or two times of day are one; what only one side says (a year, am or pm) is no contradiction.

    None when the gold is neither a date nor a time.
    """
    gold_date, answer_date = date(gold), date(answer)
    if gold_date and answer_date:
        years = {year for year in (gold_date[0], answer_date[0]) if year is not None}
        return gold_date[1:] == answer_date[1:] and len(years) < 2
    if gold_date:
        return False
    gold_time, answer_time = clock(gold), clock(answer)
    if gold_time and answer_time and (":" in gold or ":" in answer or (gold_time[3] and answer_time[3])):
        if gold_time[3] and answer_time[3]:
            return gold_time == answer_time
        return (gold_time[0] % 12, *gold_time[1:3]) == (answer_time[0] % 12, *answer_time[1:3])
    if gold_time and gold_time[3] and not re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", gold):
        return False
    return None


def same(gold: str, answer: str) -> bool | None:
    """Whether two numbers in a base, or two residues, are the same; None when neither side is one."""
    for compare in (_same_based, _same_residue):
        found = compare(gold, answer)
        if found is not None:
            return found
    return None


def _same_based(gold: str, answer: str) -> bool | None:
    gold_base, answer_base = based(gold), based(answer)
    if gold_base and answer_base:
        left, right = (_in_base(*found) for found in (gold_base, answer_base))
        return left is not None and left == right
    if gold_base and re.fullmatch("[0-9A-Fa-f]+", answer):
        return gold_base[0] == answer.upper()
    if answer_base and re.fullmatch("[0-9A-Fa-f]+", gold):
        return answer_base[0] == gold.upper()
    return None


def _same_residue(gold: str, answer: str) -> bool | None:
    gold_residue, answer_residue = residue(gold), residue(answer)
    if gold_residue and answer_residue:
        return gold_residue == answer_residue
    for written, other in ((gold, answer), (answer, gold)):
        match, plain = _RESIDUE.fullmatch(written), number(other)
        if match and plain:  # a missing modulus is forgiven
            return match["residues"] == str(plain.value)
    return None


def _in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:
        return None
