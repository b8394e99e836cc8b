"""What a person wants to see of a verdict: both sides as mathematics (MathML), and in the spelling that is compared.

Pure, and run in a worker process like `equivalence`: latex2mathml is not made for hostile text. MathML comes out
rebuilt from its tree, with only the elements and attributes named here, so a page may insert it as it is.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, tostring

from services.grader.answer import unwrap
from services.grader.normalise import clean, normalise

MAX_CHARS = 500
MAX_NESTING = 40  # of braces and of the tree that comes of them
MAX_GOLDS = 8  # explained; the others are left out

MATHML = "http://www.w3.org/1998/Math/MathML"
_ELEMENTS = frozenset({
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mstyle", "mfrac", "msqrt", "mroot", "msup", "msub",
    "msubsup", "mover", "munder", "munderover", "mtable", "mtr", "mlabeledtr", "mtd", "mpadded", "mphantom",
    "menclose", "mfenced", "mmultiscripts", "mprescripts", "none",
})  # fmt: skip
_ATTRIBUTES = frozenset({
    "display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "form", "separator", "accent",
    "accentunder", "movablelimits", "symmetric", "largeop", "columnalign", "rowalign", "columnlines", "rowlines",
    "linethickness", "notation", "minsize", "maxsize", "lspace", "rspace", "open", "close",
})  # fmt: skip
_VALUE = re.compile(r"[A-Za-z0-9.%+ -]{0,60}")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Both sides as compared and as drawn; None where a text is too long, too deep or no LaTeX."""

    normalised_answer: str | None
    normalised_golds: list[str | None]
    answer_mathml: str | None
    gold_mathml: list[str | None]

    @classmethod
    def nothing(cls, num_golds: int) -> "Explanation":
        """Nothing can be shown."""
        return cls(None, [None] * num_golds, None, [None] * num_golds)


def explain(answer: str, golds: Sequence[str]) -> Explanation:
    """Explain the comparison of `answer` with the first golds."""
    golds = golds[:MAX_GOLDS]
    return Explanation(
        normalised_answer=_normalised(answer),
        normalised_golds=[_normalised(gold) for gold in golds],
        answer_mathml=to_mathml(answer),
        gold_mathml=[to_mathml(gold) for gold in golds],
    )


def to_mathml(text: str) -> str | None:
    r"""One line of LaTeX (bare, in `$..$` or in `\boxed{}`) as `<math>`; None when it cannot be drawn."""
    if not _is_bounded(text):
        return None
    latex = clean(unwrap(text)).strip()
    if not latex:
        return None
    from latex2mathml.converter import convert_to_element

    try:
        math = _rebuilt(convert_to_element(latex), MAX_NESTING)
    except Exception:  # noqa: BLE001 - its parser fails in many ways, and all of them mean: not to be drawn
        return None
    math.set("xmlns", MATHML)
    return tostring(math, encoding="unicode")


def _normalised(text: str) -> str | None:
    return normalise(text) if text and _is_bounded(text) else None


def _is_bounded(text: str) -> bool:
    if len(text) > MAX_CHARS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= MAX_NESTING and text.count(r"\left") <= MAX_NESTING and text.count(r"\begin") <= MAX_NESTING


def _rebuilt(element: Element, depth: int) -> Element:
    """A copy that holds mathematics and nothing else. Raises ValueError for an element that is none."""
    if element.tag not in _ELEMENTS or depth == 0:
        raise ValueError(element.tag)
    attributes = {
        name: value for name, value in element.attrib.items() if name in _ATTRIBUTES and _VALUE.fullmatch(value)
    }
    copy = Element(element.tag, attributes)
    copy.text = html.unescape(element.text or "")  # it writes symbols as references; `tostring` escapes what is left
    copy.extend(_rebuilt(child, depth - 1) for child in element)
    return copy
