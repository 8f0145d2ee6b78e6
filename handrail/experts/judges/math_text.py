"""Tokenizer for arithmetic in plain text or LaTeX.

Safe for hostile text: every pattern takes linear time, and the length of numbers is limited.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 30

SIGNS = str.maketrans(
    {
        **dict.fromkeys("×·∙•⋅∗", "*"),
        **dict.fromkeys("∕⁄", "/"),
        **dict.fromkeys("−–‒", "-"),
        "²": "^2",
        "³": "^3",
    }
)
PLAIN = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\\\", "\n"),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\[dtc]?frac(?![A-Za-z])", r"\\frac "),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\{,\}|\\,(?=[0-9]{3})|,\\!", ","),
        (r"\.(?=[0-9]*\\(?:overline|bar|dot))", " "),
        (
            r"\\(?:left|right|[bB]igg?[lr]?|boxed|fbox|displaystyle|quad|qquad)(?![A-Za-z])"
            r"|\\[,;:! ()]|\\[\[\]]|[~&`\"“”]",
            " ",
        ),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "÷"),
        (r"\\([%$#])", r"\1"),
        (r"\\(?:approx|simeq|cong)(?![A-Za-z])", "≈"),
        (r"\\(?:leq?|geq?|neq?|implies|iff|to|[Rr]ightarrow|Leftrightarrow|equiv)(?![A-Za-z])", "⇒"),
        (r"\^\s*(?:\{\s*)?\\circ\s*\}?|°", " degrees "),
        (r"(?<=[0-9)])\*\*(?=[0-9(-])", "^"),  # 5**2; other double asterisks mark bold text
        (r"\*\*|__", ""),
        (r"(?m)^[ \t]*(?:\(?[0-9]{1,2}[.)]|[*#]+)(?=[ \t])", " "),  # markers of lists and headings
        (r"\bRs\.?|\b(?:US|AU|CA)(?=\$)", ""),
        (r"(?<=[0-9])-(?=[^\W\d_]{2})", " "),  # a 5-day trip
    )
]
TOKEN = re.compile(
    r"""(?P<times>(?<![^\W\d])[xX](?=\s*[$€£¥₹]?\s*[0-9(.])|(?<=\s)[xX](?=\s+-[0-9]))
    |(?P<unknown>[0-9]+(?::[0-9]+)+|[^\W\d_]+[0-9_]\w*|[0-9]+_\w*|\\(?!frac|sqrt)(?:[A-Za-z]+|.)
        |(?<=[0-9)])!|(?<=[0-9])(?:\.{3}|…)|[|@_\[\]⌊⌋⌈⌉])
    |(?P<vulgar>[¼-¾⅐-⅞])
    |(?P<odd>[0-9]{1,3}(?:,[0-9]{3})*,[0-9]{4,})
    |(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
    |(?P<frac>\\frac)|(?P<sqrt>\\?sqrt(?![A-Za-z])|√)
    |(?P<word>[^\W\d_]+(?:['’/-][^\W\d_]+)*)
    |(?P<stop>-+>|[=<>!]{2,}|[<>≠≤≥→⇒⇔↔]|\.{2,}|…|[.,;:!?\n—])
    |(?P<equals>=)|(?P<about>[≈≃≅])
    |(?P<operator>[-+*/÷^])|(?P<percent>%)
    |(?P<open>[({])|(?P<close>[)}])
    |(?P<money>[$€£¥₹¢])|(?P<space>\s)|(?P<other>.)""",
    re.VERBOSE,
)
WORD_OPERATORS = {"times": "*", "plus": "+", "minus": "-", "multiplied": "*", "divided": "/"}
CALCULATIONS = {
    "squared", "cubed", "factorial", "mod", "modulo", "choose", "remainder", "log", "ln", "sin", "cos",
    "tan", "gcd", "lcm", "max", "floor", "ceil", "abs",
}  # fmt: skip
MEASURES = {
    unit: Fraction(size)
    for kind in (
        {
            "second": 1,
            "sec": 1,
            "minute": 60,
            "min": 60,
            "hour": 3600,
            "hr": 3600,
            "h": 3600,
            "day": 86400,
            "week": 604800,
        },
        {"month": 1, "year": 12, "yr": 12, "decade": 120, "century": 1200, "centurie": 1200},
        {
            "cent": 1,
            "¢": 1,
            "penny": 1,
            "pennie": 1,
            "nickel": 5,
            "dime": 10,
            "dollar": 100,
            "buck": 100,
            "$": 100,
            "€": 100,
            "£": 100,
        },
        {
            "mm": 1,
            "cm": 10,
            "m": 1000,
            "km": 10**6,
            "millimeter": 1,
            "centimeter": 10,
            "meter": 1000,
            "kilometer": 10**6,
        },
        {"inch": 1, "inche": 1, "foot": 12, "feet": 12, "ft": 12, "yard": 36, "mile": 63360},
        {
            "mg": 1,
            "g": 1000,
            "gram": 1000,
            "kg": 10**6,
            "kilogram": 10**6,
            "kilo": 10**6,
            "ton": 10**9,
            "tonne": 10**9,
        },
        {"ounce": 1, "oz": 1, "pound": 16, "lb": 16},
        {"ml": 1, "milliliter": 1, "l": 1000, "liter": 1000, "litre": 1000},
        {"tablespoon": 1, "cup": 16, "pint": 32, "quart": 64, "gallon": 256},
        {"dozen": 12, "hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9},
    )
    for unit, size in kind.items()
}


@dataclass(frozen=True)
class Token:
    """A token.

    ``tight``: True if no space precedes it. ``digit``: the place value of a number's last digit.
    """

    kind: str
    text: str
    tight: bool = False
    value: Fraction = Fraction(0)
    digit: Fraction = Fraction(0)
    money: str = ""


NOTHING = Token("stop", "")


def tokenize(text: str) -> list[Token]:
    """Split a text into tokens, without whitespace; a currency sign is attached to its number."""
    text = text.translate(SIGNS)
    for pattern, plain in PLAIN:
        text = pattern.sub(plain, text)
    tokens: list[Token] = []
    tight, money = False, ""
    for match in TOKEN.finditer(text):
        kind, found = match.lastgroup or "other", match[0]
        if kind == "money":
            money = found
        elif kind == "space":
            tight = False
        else:
            tokens.append(_token(kind, found, tight, money))
            tight, money = True, ""
    return _in_context(tokens)


def measure(unit: str) -> Fraction | None:
    """Size of a unit, singular or plural, in a base unit of its kind; None if unknown."""
    return MEASURES.get(unit) or MEASURES.get(unit.removesuffix("s"))


def _token(kind: str, text: str, tight: bool, money: str) -> Token:
    if kind == "number":
        plain = text.replace(",", "")
        if len(plain) <= MAX_DIGITS and not re.match("0[0-9]", plain):
            return Token(
                "number", text, tight, Fraction(plain), Fraction(1, 10 ** len(plain.partition(".")[2])), money
            )
    if kind == "vulgar":
        return Token("number", text, tight, Fraction(unicodedata.numeric(text)).limit_denominator(10))
    if kind == "times":
        return Token("operator", "*", tight)
    return Token("unknown" if kind in ("number", "odd", "other") else kind, text.lower(), tight)


def _in_context(tokens: Sequence[Token]) -> list[Token]:
    """Turn words such as "plus" into operators and possible variables into unknowns; join "=" on a new
    line."""
    found: list[Token] = []
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else NOTHING
        before = found[-1] if found else NOTHING
        if token.kind == "word":
            token = _word(token, before, following)
        if (token.text == "\n" and following.kind == "equals") or (
            token.text == "by" and before.kind == "operator"
        ):
            continue
        found.append(token)
    return found


def _word(token: Token, before: Token, following: Token) -> Token:
    text = token.text
    operands = before.kind in ("number", "word", "close") and (
        following.kind in ("number", "open") or following.text == "by"
    )
    if text in WORD_OPERATORS and operands:
        return Token("operator", WORD_OPERATORS[text])
    if text == "percent":
        return Token("percent", "%")
    if text in ("equals", "equal"):
        return Token("equals", "=")
    written_on = before.kind == "number" and token.tight  # 2xy, 5th, 12km/h
    if text in CALCULATIONS or (written_on and measure(text.partition("/")[0]) is None and text != "mph"):
        return Token("unknown", text)
    article = text in ("a", "i") and following.kind == "word"
    if (
        len(text) == 1
        and text.isascii()
        and not article
        and not (before.kind == "number" and text in MEASURES)
    ):
        return Token("unknown", text)
    return token
