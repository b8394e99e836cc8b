r"""Units: what stands behind a value, and whether two of them can be the same quantity.

A physical unit has a dimension and a size, so that `50 cm` is `0.5 m`. Anything else (apples, students) is a noun: two
nouns must share a word. A missing unit is forgiven. Text is normalised (`normalise`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from services.grader.readings import Number, mixed_quantities, number

Dimension = tuple[tuple[str, int], ...]  # base quantity and its power, sorted; () is a plain number

_TEXT = r"\\text\{([^{}]*)\}"
_SCRIPT = r"(?:\^(?:\{?\s*(-?[0-9])\s*\}?))?"
_TEXT_TAIL = re.compile(rf"(?:{_TEXT}|\^\{{?-?[0-9]\}}?|[/ ]|\\cdot ?|\*|\(|\))+$")
_FRACTION_TAIL = re.compile(rf"\\frac\{{{_TEXT}\}}\{{{_TEXT}{_SCRIPT}\}}$")
_PLAIN_TAIL = re.compile(
    r"(?<=[0-9})\]%!])(?P<gap> ?)(?P<unit>[A-Za-zµμΩ][A-Za-zµμΩ.]*(?:(?:\^\{?-?[0-9]\}?)?(?: ?[/*·] ?|\\cdot ?| |-)"
    r"(?:\(?[A-Za-zµμΩ][A-Za-zµμΩ.]*\)?))*(?:\^\{?-?[0-9]\}?)?)$"
)
_BRACKETED_TAIL = re.compile(r"(?<=[0-9}])\s?\(([A-Za-z]{2,20}(?:[ .-]{1,2}[A-Za-z]{1,20}){0,5})\)$")
_DEGREES = re.compile(r"\^\\circ ?(?:\\text\{ ?)?([CF]?)\}?$")
_UNIT_PART = re.compile(
    r"/|(?P<prefix>square|cubic)"
    r"|(?P<name>[A-Za-zµμΩ%]+)\.?(?: ?(?P<suffix>squared|cubed)| ?\^?\{?(?P<power>-?[0-9])\}?)?"
)
_CURRENCY = {
    "$": "usd", "£": "gbp", "€": "eur", "¥": "jpy", "₹": "inr", "¢": "cent", "USD": "usd", "EUR": "eur", "GBP": "gbp",
    "Rs": "inr",
}  # fmt: skip
_SCALES = {"C": "celsius", "F": "fahrenheit"}
_LEADING_CURRENCY = re.compile(r"(?:\\text\{)?(?P<sign>[-(]?)(?P<name>[$£€¥₹]|(?:USD|EUR|GBP|Rs)(?=[. }]*[0-9]))[. }]*")
_LEADING_WORDS = re.compile(r"(?:\\text\{)?(?P<words>[A-Za-z]{2,}(?: [A-Za-z]+){0,5})(?:\}| )(?=[-$0-9]|\\frac|\\sqrt)")

# One line a unit: quantities with their powers = size in SI units (or the usual one): spellings.
_UNITS = """
length = 1: m meter metre
length = 1/100: cm centimeter centimetre
length = 1/1000: mm millimeter millimetre
length = 1000: km kilometer kilometre
length = 1/10: dm decimeter decimetre
length = 1/1000000: um µm μm micrometer micron
length = 1/1000000000: nm nanometer
length = 127/5000: in inch inches
length = 381/1250: ft foot feet
length = 1143/1250: yd yard
length = 201168/125: mi mile
length = 9460730472580800: ly lightyear
length = 149597870700: au AU
length = 30856775814913673: pc parsec
length = 1/10000000000: angstrom Å
mass = 1: kg kilogram kilo
mass = 1/1000: g gram gramme
mass = 1/1000000: mg milligram
mass = 1000: t tonne
mass = 45359237/100000000: lb lbs pound
mass = 45359237/1600000000: oz ounce
mass = 90718474/100000: ton
time = 1: s sec second
time = 1/1000: ms millisecond
time = 1/1000000: us µs μs microsecond
time = 1/1000000000: ns nanosecond
time = 60: min minute
time = 3600: h hr hour
time = 86400: d day
time = 604800: week wk
time = 2629746: month
time = 31556952: yr year
time = 315569520: decade
time = 3155695200: century centuries
money = 1: usd USD dollar buck
money = 1/100: cent
money = 1/10: dime
money = 1/20: nickel
money = 1/4: quarter
money = 1/100: penny pennies
gbp = 1: gbp GBP
eur = 1: eur EUR euro
eur = 1/100: eurocent
jpy = 1: jpy JPY yen
inr = 1: inr Rs rupee
angle = 1: rad radian
angle = degree: degree deg
angle = arcminute: arcmin arcminute
temperature = 1: K kelvin Kelvin
celsius = 1: celsius Celsius
fahrenheit = 1: fahrenheit Fahrenheit
current = 1: A amp ampere
current = 1/1000: mA milliampere
amount = 1: mol mole
amount = 1/1000: mmol
information = 1: bit
information = 8: byte B
information = 8000: kB KB kilobyte
information = 8000000: MB megabyte
information = 8000000000: GB gigabyte
length3 = 1/1000: L l liter litre
length3 = 1/1000000: mL ml milliliter millilitre
length3 = 1/1000000: cc
length3 = 473176473/125000000000: gal gallon
length3 = 473176473/500000000000: qt quart
length3 = 473176473/1000000000000: pt pint
length3 = 473176473/2000000000000: cup
length2 = 10000: ha hectare
length2 = 316160658/78125: acre
length time-1 = 1397/3125: mph
length time-1 = 5/18: kph kmh kmph
mass length time-2 = 1: N newton Newton
mass length time-2 = 1000: kN kilonewton
mass length time-2 = 1/100000: dyne
mass length2 time-2 = 1: J joule Joule
mass length2 time-2 = 1000: kJ kilojoule
mass length2 time-2 = 1000000: MJ megajoule
mass length2 time-2 = 1/10000000: erg
mass length2 time-2 = 1602176634/10000000000000000000000000000: eV
mass length2 time-2 = 1602176634/10000000000000000000000000: keV
mass length2 time-2 = 1602176634/10000000000000000000000: MeV
mass length2 time-2 = 523/125: cal calorie
mass length2 time-2 = 4184: kcal
mass length2 time-2 = 3600000: kWh
mass length2 time-3 = 1: W watt Watt
mass length2 time-3 = 1000: kW kilowatt
mass length2 time-3 = 1000000: MW megawatt
mass length2 time-3 = 1/1000: mW milliwatt
mass length-1 time-2 = 1: Pa pascal
mass length-1 time-2 = 1000: kPa
mass length-1 time-2 = 1000000: MPa
mass length-1 time-2 = 101325: atm
mass length-1 time-2 = 100000: bar
time-1 = 1: Hz hertz
time-1 = 1000: kHz
time-1 = 1000000: MHz
time-1 = 1000000000: GHz
time-1 = 1/60: rpm
current time = 1: C coulomb
mass length2 time-3 current-1 = 1: V volt Volt
mass length2 time-3 current-1 = 1/1000: mV
mass length2 time-3 current-1 = 1000: kV
mass length2 time-3 current-2 = 1: ohm Ω
mass time-2 current-1 = 1: T tesla
mass-1 length-2 time4 current2 = 1: F farad
amount length-3 = 1000: M molar
"""
_DEGREE = Fraction(31415926535897932384626433832795, 180 * 10**31)  # of a radian, to 31 places
_IRRATIONAL = {"degree": _DEGREE, "arcminute": _DEGREE / 60}


def _table() -> dict[str, tuple[Dimension, Fraction]]:
    table = {}
    for line in _UNITS.strip().splitlines():
        quantities, _, rest = line.partition(" = ")
        size, _, spellings = rest.partition(": ")
        powers = re.findall(r"([a-z]+)(-?[0-9]*)", quantities)
        dimension = tuple(sorted((name, int(power or 1)) for name, power in powers))
        for spelling in spellings.split():
            table[spelling] = (dimension, _IRRATIONAL.get(size) or Fraction(size))
    return table


_TABLE = _table()
# One letter may be a variable: a unit only in \text{}, after a space, or where the other side has one.
SINGLE_LETTERS = frozenset(name for name in _TABLE if len(name) == 1)
_GENERIC = frozenset(
    [
        "unit",
        "units",
        "of",
        "the",
        "a",
        "an",
        "in",
        "per",
        "each",
        "more",
        "total",
        "and",
        "altogether",
        "is",
        "are",
        "be",
        "to",
        "for",
        "on",
        "at",
    ]
)
_OPPOSITES = """
increase/decrease north/south east/west profit/loss gain/loss up/down left/right clockwise/counterclockwise
clockwise/anticlockwise above/below am/pm before/after more/less more/fewer bc/ad positive/negative
inside/outside win/loss faster/slower older/younger deficit/surplus debit/credit taller/shorter
heavier/lighter longer/shorter forward/backward upward/downward ago/later ago/hence hotter/colder
warmer/colder warmer/cooler fast/slow
early/late earlier/later ahead/behind n/s e/w ne/sw nw/se ne/nw northeast/southwest
northwest/southeast northeast/northwest northeast/southeast larger/smaller greater/smaller greater/less
higher/lower rise/fall increased/decreased owed/owned maximum/minimum max/min boys/girls markup/discount
compression/tension attractive/repulsive even/odd rational/irrational prime/composite convergent/divergent
converges/diverges real/imaginary convex/concave
"""
_OPPOSITE = frozenset(frozenset(pair.split("/")) for pair in _OPPOSITES.split())
_NO_QUALIFIERS = frozenset(
    [
        "at",
        "least",
        "most",
        "than",
        "over",
        "under",
        "below",
        "above",
        "exceed",
        "not",
        "or",
        "between",
        "before",
        "after",
        "no",
        "only",
    ]
)
_JOINTS = frozenset({"per", "sq", "square", "cubic", "squared", "cubed"})
_IRREGULAR = {"people": "person", "children": "child", "men": "man", "women": "woman", "feet": "foot", "mice": "mouse"}
_HEDGES = frozenset(
    {"or", "not", "maybe", "possibly", "perhaps", "probably", "either", "unless", "except", "never", "nor"}
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as written: its words, and dimension and size in SI units where all of it is physical."""

    words: frozenset[str]
    dimension: Dimension | None  # None: a noun
    size: Fraction


def split(text: str, *, expected: bool = False) -> tuple[str, Unit | None]:
    r"""Split a normalised text into value and unit; no unit is None.

    expected: the other side has a unit, so that a single letter behind a number is one as well.
    """
    currency = _LEADING_CURRENCY.match(text)
    if currency:
        value, words = _tail(currency["sign"] + text[currency.end() :], expected=True)
        money, rest = _read(_CURRENCY[currency["name"]]), _read(words)
        if rest is None or (money is not None and rest.dimension == money.dimension):
            return value, money
        return value, _read(f"{_CURRENCY[currency['name']]} {words}")
    leading = _LEADING_WORDS.match(text)
    if leading and _NO_QUALIFIERS.isdisjoint(leading["words"].casefold().split()):
        value, unit = split(text[leading.end() :], expected=expected)
        words = f"{leading['words']} {' '.join(unit.words) if unit else ''}"
        return value, _read(words)
    value, words = _tail(text, expected=expected)
    unit = _read(words)
    if unit is None or not value:
        return text, None
    if unit.words & {"percent", "%"}:
        rest_of_words = unit.words - {"percent", "%"}
        return value + "%", Unit(rest_of_words, None, Fraction(1)) if rest_of_words else None
    return value, unit


def hedges(text: str) -> bool:
    """Whether words in the text take back or spread what it says: "5 or possibly 7", "not 7"."""
    return not _HEDGES.isdisjoint(re.findall(r"[a-z]+", re.sub(r"\\(?!text)[A-Za-z]+", " ", text).casefold()))


def factor(gold: Unit | None, answer: Unit | None) -> Fraction | None:
    """What the answer's value is multiplied by to be in the gold's unit; None when they are not the same quantity.

    Two nouns are the same when neither has a word of its own that the other could contradict.
    """
    if gold is None or answer is None:
        return Fraction(1)
    if gold.dimension is not None and answer.dimension is not None:
        return answer.size / gold.size if gold.dimension == answer.dimension else None
    if any(frozenset((a, b)) in _OPPOSITE for a in gold.words for b in answer.words if a != b):
        return None
    gold_words, answer_words = gold.words - _GENERIC, answer.words - _GENERIC
    return Fraction(1) if gold_words <= answer_words or answer_words <= gold_words else None


def is_angle(unit: Unit | None) -> bool:
    """Whether the unit is one of angle, whose sizes are not rational."""
    return unit is not None and unit.dimension == (("angle", 1),)


def scaled(value: str, factor: Fraction, unit: Unit | None) -> str:
    """LaTeX of a value times a factor of `factor`; between degrees and radians exactly, by pi."""
    if is_angle(unit) and factor == _DEGREE:
        return rf"({value})\cdot\frac{{\pi}}{{180}}"
    if is_angle(unit) and factor == 1 / _DEGREE:
        return rf"({value})\cdot\frac{{180}}{{\pi}}"
    return rf"({value})\cdot\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def scaled_number(value: Number | None, factor: Fraction, unit: Unit | None) -> Number | None:
    """A written number times a factor of `factor`; None where that is irrational, as between degrees and radians."""
    if value is None or is_angle(unit):
        return None
    return Number(value.value * factor, value.decimals, value.is_percent)


def total(text: str) -> str:
    """`2 hours 30 minutes` as one quantity in its last unit; other text stays as it is."""
    parts = mixed_quantities(text)
    if parts is None:
        return text
    read = [split(part, expected=True) for part in parts]
    last = read[-1][1]
    added = Fraction(0)
    for value, unit in read:
        written, ratio = number(value), factor(last, unit)
        if written is None or ratio is None or unit is None or unit.dimension is None:
            return text
        added += written.value * ratio
    return f"{added} {' '.join(last.words)}" if last else text


def _tail(text: str, *, expected: bool) -> tuple[str, str]:
    """Value and the text of the unit behind it, "" when there is none."""
    if number(text):
        return text, ""  # the "million" of `3 million` is no unit
    found = _sign_tail(text) or _text_tail(text) or _plain_tail(text, expected=expected)
    return (found[0].strip(), found[1]) if found else (text, "")


def _sign_tail(text: str) -> tuple[str, str] | None:
    """A currency or a degree sign."""
    for sign, name in _CURRENCY.items():
        if len(sign) == 1 and text.endswith(sign):
            return text.removesuffix(sign), name
    match = _DEGREES.search(text)
    return (text[: match.start()], _SCALES.get(match.group(1), "degree")) if match else None


def _text_tail(text: str) -> tuple[str, str] | None:
    r"""`\text{m}/\text{s}^2`, `\frac{\text{m}}{\text{s}}`, or words in brackets."""
    match = _FRACTION_TAIL.search(text)
    if match:
        return text[: match.start()], f"{match.group(1)}/{match.group(2)}{match.group(3) or ''}"
    match = _TEXT_TAIL.search(text)
    if match and r"\text{" in match.group():
        start = match.start() + match.group().index(r"\text{")
        value = text[:start].rstrip(" ")
        words = re.sub(_TEXT, r" \1 ", text[start:]).replace(r"\cdot", " ")
        return (value[:-1], f"/{words}") if value.endswith("/") else (value, words)
    match = _BRACKETED_TAIL.search(text)
    return (text[: match.start()], match.group(1)) if match else None


def _plain_tail(text: str, *, expected: bool) -> tuple[str, str] | None:
    """Bare words: known units, or nouns after a space."""
    match = _PLAIN_TAIL.search(text)
    if match is None:
        return None
    words = match.group("unit").replace(r"\cdot", " ")
    names = re.findall(r"[A-Za-zµμΩ]+", words)
    if len(names) == 1 and len(names[0]) == 1 and not (expected and names[0] in SINGLE_LETTERS):
        return None
    is_known = all(_lookup(name) or name in _JOINTS for name in names)
    is_spaced = bool(match.group("gap")) or expected
    is_noun = is_spaced and len(names[0]) >= 3 and all(len(name) >= 2 for name in names if name != "a")
    return (text[: match.start()], words) if is_known or is_noun else None


def _read(words: str) -> Unit | None:
    words = re.sub(r"\bsq(?:uare|\.)? ?(?=[A-Za-z])", "square ", words.strip())
    words = re.sub(r"\bcu(?:bic|\.)? ?(?=[A-Za-z])", "cubic ", words)
    words = re.sub(r"\bdegrees? (?=[FCfc])", "", words).replace("^\\circ", "")
    words = re.sub(r"\bper\b", "/", words.replace("-", " ") if "^" not in words else words)
    plain = frozenset(_singular(word.casefold()) for word in re.findall(r"[A-Za-zµμΩ%]+", words)) - _JOINTS
    if not plain:
        return None
    powers: dict[str, int] = {}
    size, multiplier, sign = Fraction(1), 1, 1
    for match in _UNIT_PART.finditer(words):
        if match.group() == "/":
            sign = -1
        elif match["prefix"]:
            multiplier = 2 if match["prefix"] == "square" else 3
        else:
            entry = _lookup(match["name"])
            if entry is None:
                return Unit(plain, None, Fraction(1))
            dimension, one = entry
            power = {"squared": 2, "cubed": 3}.get(match["suffix"] or "") or int(match["power"] or 1)
            power *= multiplier * sign
            multiplier = 1
            for name, exponent in dimension:
                powers[name] = powers.get(name, 0) + exponent * power
            size *= one**power
    return Unit(plain, tuple(sorted((name, power) for name, power in powers.items() if power)), size)


def _lookup(name: str) -> tuple[Dimension, Fraction] | None:
    if name in _TABLE or len(name) < 3:
        return _TABLE.get(name)
    lowered = name.casefold()
    return (
        _TABLE.get(lowered)
        or (_TABLE.get(lowered[:-1]) if lowered.endswith("s") else None)
        or _TABLE.get(_singular(lowered))
    )


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
