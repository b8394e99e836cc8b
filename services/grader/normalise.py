"""Bring answers to one spelling: Unicode to LaTeX, layout away, plain text to commands.

Pure text work: every pattern is linear, nothing is evaluated. `readings` reads the result, `equivalence` decides.
"""

# ruff: noqa: RUF001 - this file is where look-alike characters are told apart
import re
import unicodedata

from services.grader.answer import unwrap

MAX_REPEATED_CHARS = 60  # of 0.142857142857...: finding the cycle is quadratic

_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau",
    "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_SYMBOLS = {
    "−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "✕": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∞": r"\infty ", "≤": r"\leq ", "≦": r"\leq ", "⩽": r"\leq ",
    "≥": r"\geq ", "≧": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv ",
    "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ",
    "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "∉": r"\notin ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "∑": r"\sum ",
    "∏": r"\prod ", "∫": r"\int ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "∶": ":", "→": r"\to ",
    "⇒": r"\Rightarrow ", "∣": "|", "（": "(", "）": ")", "，": ", ", "、": ", ", "；": "; ", "：": ":",
    "。": ".", "％": "%", "∠": r"\angle ", "△": r"\triangle ", "ⅈ": "i", "ℯ": "e", "\u00a0": " ",
    "\u202f": r"\,", "\u2009": r"\,",
}  # fmt: skip
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸᵏᵐ"
_TO_BASELINE = str.maketrans(_SUPERSCRIPTS, "0123456789+-=()nixykm")
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋ₙₖᵢⱼₓ"
_FROM_BELOW = str.maketrans(_SUBSCRIPTS, "0123456789+-nkijx")

TEXT = r"\\text\s*\{([^{}\\]*)\}"
_NAMES = (
    "arcsin|arccos|arctan|arccot|arcsec|arccsc|sinh|cosh|tanh|coth|sin|cos|tan|cot|sec|csc|ln|log|exp"
    "|gcd|lcm|max|min|det"
)
_BARE_NAMES = rf"{_NAMES.removesuffix('|gcd|lcm|max|min|det')}|(?:gcd|lcm|max|min|det)(?=\s*\()"
_GREEK_NAMES = "alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|phi|rho|Delta"
_TEXT_FONTS = "textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathsf|mathtt|mbox|hbox|operatorname|emph"
_LAYOUT = (
    "displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|nonumber|tiny|small|large|Large|LARGE|huge|Huge"
    "|normalsize|bf|rm|it|sf|tt|bfseries|centering|allowbreak|hfill|relax|noindent"
)
_DEGREE = r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\^?\s*\\degrees?(?![A-Za-z])|\\textdegree(?![A-Za-z])"


def _rows_as_list(match: re.Match[str]) -> str:
    return ",".join(row for row in match[1].split("\\\\") if row.strip())


_PLAIN = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*(?:\.(?![0-9]))?"), ""),
    (re.compile(rf"\\(?:{_LAYOUT})(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:textcolor|colorbox|color)\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\color\s+[a-z]{3,10}(?![a-z])"), ""),
    (re.compile(r"\\(?:phantom|hphantom|vphantom|hspace|vspace|label|tag)\*?\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:leqslant|leqq|le)(?![A-Za-z])|<=|=<"), r"\\leq "),
    (re.compile(r"\\(?:geqslant|geqq|ge)(?![A-Za-z])|>="), r"\\geq "),
    (re.compile(r"\\ne(?![A-Za-z])|\\not\s*=|!="), r"\\neq "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])|\\text\s*\{\s*Ø\s*\}|Ø"), r"\\emptyset "),
    (re.compile(r"\\(?:cdots|dots|dotsc|dotsb)(?![A-Za-z])"), r"\\ldots "),
    (re.compile(r"\\(?:R|Reals|reals)(?![A-Za-z])"), r"\\mathbb{R}"),
    (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\mathbf\s*\{\s*R\s*\}"), r"\\mathbb{R}"),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(rf"\\(?:operatorname|mathrm|text)\*?\s*\{{\s*({_BARE_NAMES})\s*\}}"), r"\\\1 "),
    (re.compile(r"\\operatorname\*?\s*\{\s*(gcd|lcm|max|min|det)\s*\}"), r"\\\1 "),
    (re.compile(r"\\begin\s*\{(?:cases|aligned|align\*?|gathered)\}([^&{}]*)\\end\s*\{[a-z*]+\}"), _rows_as_list),
    (re.compile(r"(?<=[0-9A-Za-z})])\s*\\q?quad\s*(?=[A-Za-z]\s*=)"), ", "),
    (re.compile(r"\\operatorname\*?\s*\{\s*arc\s*(sin|cos|tan)\s*\}"), r"\\arc\1 "),
    (re.compile(r"\\(?:mathrm|mathit|mathbf|rm)\s*\{\s*([eid])\s*\}"), r"\1"),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathnormal|underline|mathcal)\s*\{([^{}]*)\}"), r"{\1}"),
    (re.compile(rf"\\(?:{_TEXT_FONTS})(?![A-Za-z])\*?"), r"\\text"),
    (re.compile(r"\\(?:fbox)(?=\{)"), ""),
    (re.compile(r"\\(vec|hat|bar|tilde|dot|ddot|overline)\s*([A-Za-z0-9])(?![A-Za-z])"), r"\\\1{\2}"),
    (re.compile(r"(?<=[0-9])\s*(?:\\text\s*\{\s*to\s*\}|\sto\s)\s*(?=[0-9])"), ":"),
    (re.compile(_DEGREE), r"^\\circ "),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\s*\\!|\\,|\\;|\\:|\{\\,\}|\\ |\\!)\s*(?=[0-9]{3}(?![0-9]))"), ""),  # thousands
    (re.compile(r"(?<![0-9])([0-9]{1,3})((?: [0-9]{3})+)(?![0-9/\\])"), lambda m: m[1] + m[2].replace(" ", "")),
    (re.compile(r"(?<=[0-9])'(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])"), "£"),
    (re.compile(r"\\(?:euro|texteuro)(?![A-Za-z])"), "€"),
    (re.compile(r"\\yen(?![A-Za-z])"), "¥"),
    (re.compile(r"(?<=[0-9])(?:\s|\\,|~)*\\Omega\s*$"), r"\\text{ohm}"),
    (re.compile(r"(?<=[0-9}) ])(?:\\,|\\ |~|\\;| )\s*([mgshLNJWKVACT])\s*$"), r"\\text{\1}"),  # 5 m
    (re.compile(r"\\(?:qquad|quad|enspace|thinspace)(?![A-Za-z])|(?<!\\)\\[,;:!>] ?|(?<!\\)\\ |~|\{,\}"), " "),
    (re.compile(rf"(?<![\\A-Za-z])({_BARE_NAMES})(?![A-Za-z]{{2}}|[a-df-mo-suvA-Z])"), r"\\\1 "),
    (re.compile(rf"(?<![\\A-Za-z])({_GREEK_NAMES})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt(?=[0-9 {])"), r"\\sqrt"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(^|[-+(\[,;=<>]\s*)(?:[Ii]nfinity|[Ii]nf|oo)(?![A-Za-z ])|\\text\{ *[Ii]nfinity *\}"), r"\1\\infty "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\(([^()]{1,40})\)"), r"^{(\1)}"),
    (re.compile(r"\^\s*(-?[0-9]{2,}|-[0-9A-Za-z])(?![0-9])"), r"^{\1}"),
    (re.compile(r"\\(?:lg)(?![A-Za-z])"), r"\\log_{10} "),
    (re.compile(r"\\arc(sin|cos|tan)h(?![A-Za-z])"), r"\\operatorname{ar\1h}"),
    (re.compile(r"\\ast(?![A-Za-z])"), r"\\cdot "),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\text\s*\{\s*,?\s*(?:and|or|\\&)\s*\}|\\(?:land|lor|wedge|vee)(?![A-Za-z])"), " , "),
    (re.compile(r"(?<=[0-9})\]!%A-Za-z]),?\s+(?:and|or|\\&)\s+(?=[\\0-9({\[A-Za-z+-])"), ", "),
    (re.compile(r",\s*,"), ","),
    (re.compile(r"(?<=[0-9]),(?:\s|\\ )+(?=[0-9]{3}(?![0-9]))"), ";"),  # "1, 234" is a list, "1,234" is not
)  # fmt: skip
_ARGUMENT = re.compile(r"\\(?:frac|binom|sqrt)(?![A-Za-z])\s*")
_SINGLE_ARGUMENT = re.compile(r"\\(?!frac|sqrt|binom)[A-Za-z]+|[A-Za-z0-9]")
_ROOT_OF_A_NUMBER = re.compile(r"√\s*([0-9]+)|√\s*\(([^()]*)\)")
_CHOOSE = re.compile(r"\{([^{}]{1,60})\\choose ?([^{}]{1,60})\}")
_SINGLE_SCRIPT = re.compile(r"([\^_])\{([A-Za-z0-9])\}")
_DOTTED_CYCLE = re.compile(r"(?<=[0-9]\.)([0-9]*)\\dot\{?([0-9])\}?(?:([0-9]*)\\dot\{?([0-9])\}?)?")
_BRACKETED_CYCLE = re.compile(r"(?<=[0-9]\.)([0-9]*)\(([0-9]+)\)(?=$|[^0-9])")
_REPEATED = re.compile(r"(?<![0-9.])([0-9]+\.[0-9]*?)([0-9]{1,6}?)\2{2,}[0-9]{0,5}\s*(?:\\ldots|\.\.\.)\s*$")
_SPACE = re.compile(r"(?<![A-Za-z0-9}]) | (?![A-Za-z0-9])|(?<=[0-9}]) (?=[A-Za-z](?![A-Za-z]))|(?<=\}) (?=[0-9])")


def normalise(text: str) -> str:
    """Return the one spelling of an answer: two texts that spell the same thing alike become equal strings."""
    text = unwrap(_unicode(text))
    text = text.replace(r"\$", "$").replace(r"\%", "%").replace(r"\#", "#").replace("\n", " ").replace("\t", " ")
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*([$£€¥])\s*\}", r"\1", text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\\text{\1}", text)
    text = re.sub(r"\\text\{([0-9][0-9.,:/+ -]*)\}", r"\1", text)
    text = re.sub(r"\\mu\s*\\text\{(?=[a-zA-Z])", r"\\text{u", text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=.*=)", ",", text)  # x=1 \\ y=2
    text = unwrap(re.sub(r"\s+", " ", text))
    text = re.sub(r"(?<![.])\.$|[,;:]$|\\\\$", "", text).strip()
    text = _DOTTED_CYCLE.sub(lambda m: rf"{m[1]}\overline{{{m[2]}{m[3] or ''}{m[4] or ''}}}", text)
    text = _BRACKETED_CYCLE.sub(r"\1\\overline{\2}", text)
    if len(text) <= MAX_REPEATED_CHARS and text.endswith((r"\ldots", "...")):
        text = _REPEATED.sub(r"\1\\overline{\2}", text)
    text = _brace_arguments(_CHOOSE.sub(r"\\binom{\1}{\2}", text))
    text = collapse(text, "{}")
    text = _SINGLE_SCRIPT.sub(r"\1\2", text)
    return _unbrace(_SPACE.sub("", text).strip())


def clean(text: str) -> str:
    """Replace lone surrogates, which no encoder takes, and drop control and format characters."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def collapse(text: str, pair: str) -> str:
    """Drop brackets directly around brackets, of the kind `pair`: {{x}} is {x}, in one pass."""
    opening, closing = pair[0], pair[1]
    if opening * 2 not in text:
        return text
    stack: list[int] = []
    closes: dict[int, int] = {}
    for match in re.finditer(rf"\\.|[{re.escape(pair)}]", text, re.DOTALL):
        if match.group() == opening:
            stack.append(match.start())
        elif match.group() == closing and stack:
            closes[stack.pop()] = match.start()
    doubled = {at for at, end in closes.items() if closes.get(at + 1) == end - 1}
    dropped = doubled | {closes[at] for at in doubled}
    return "".join(c for at, c in enumerate(text) if at not in dropped)


def _unicode(text: str) -> str:
    text = clean(text)
    if text.isascii():
        return text
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda m: "^{" + m.group().translate(_TO_BASELINE) + "}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda m: "_{" + m.group().translate(_FROM_BELOW) + "}", text)
    text = _ROOT_OF_A_NUMBER.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]", _vulgar_fraction, text)
    text = re.sub("[0-9]⁄[0-9]", lambda m: m.group().replace("⁄", "/"), text)
    text = "".join(_SYMBOLS.get(c) or (f"\\{_GREEK[c]} " if c in _GREEK else c) for c in text)
    text = re.sub(r"([a-z])\u0305|([0-9])\u0305", r"\\overline{\1\2}", text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(_SYMBOLS.get(c, c) for c in text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _unbrace(text: str) -> str:
    """Strip braces around the whole text."""
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1] and "}" not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _brace_arguments(text: str) -> str:
    r"""`\frac12`, `\frac{5}9`, `\sqrt2` and `\sqrt[3]2` get their braces."""
    closes, stack = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closes[stack.pop()] = match.start()
    braces: list[tuple[int, str]] = []
    for match in _ARGUMENT.finditer(text):
        position = match.end()
        is_root = match.group().startswith(r"\sqrt")
        if is_root and text[position : position + 1] == "[":
            position = text.find("]", position) + 1 or position
        for _ in range(1 if is_root else 2):
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
