"""Answers as text: find the answer of a completion and ignore formatting. Imports nothing heavy."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

from handrail._util.thinking import after_thinking
from handrail.verifiers.symbols import to_latex

# Markdown: *italic*, **bold**, _italic_ and `code`, but neither a*b*c nor x_1.
EMPHASIS = re.compile(
    r"(?<![^\s(>{])(?:\*{1,3}([^\s*][^*\n]*)\*{1,3}|_{1,3}([^\s_][^_\n]*)_{1,3}|`{1,3}([^`]+)`{1,3})"
    r"(?![^\s.,;:!?)<}])"
)
SPACING = re.compile(r"(?<!\\)\\(?:[,;:>] ?| |q?quad(?![a-zA-Z]))|(?<=[^\s(])~")
TIGHT = re.compile(r"\\!\s*")
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])")
FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
RELATIONS = re.compile(r"\\(?P<first>[gl])e(?:q?slant|q?)(?![a-zA-Z])|\\ne(?![a-zA-Z])")
FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf|normal)|mbox|boldsymbol|bm|operatorname)\s*\{([^{}]*)\}"
)
DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
END = re.compile(r"(?<![.,;])[.,;]$")
# Spaces without meaning: all but those between words, and those that tell the list 32, 349 from the number
# 32,349.
GAPS = re.compile(r"(?<![\w,]) | (?!\w)|(?<=,) (?!\d{3}(?!\d))")
# The space of "\\geq 3", which LaTeX does not need.
COMMAND_GAP = re.compile(r"(?P<command>\\[A-Za-z]+) (?=\d)")

BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# Boxes with no more than this between them are one answer with several members. The alternatives are
# punctuation; at most 70 characters of the same line and formula, with a comma, "and" or "or" among them; and
# the end of one formula with the left side of the next.
BOX_JOINT = re.compile(
    r"(?:[ ,;.$]|\\[()\[\],;]|\\q?quad|\\text\s*\{|\}|\band\b|\bor\b)*"
    r"|(?=[^\n]*?(?:[,;]|\band\b|\bor\b))(?:[^\n$\\]|\\[^)\]\n]){,70}"
    r"|\s*(?:\$|\\[)\]])\s*(?:,?and|,?or|,)\s*(?:\$|\\[(\[])[^\n$\\]{,20}"
)
FORMULA_JOINT = re.compile(r"\s*(?:,?and|,?or|,)\s*")
HEADING = re.compile(r"[^\n]*[A-Za-z]{3}")
# A heading that says only that the answer comes next.
SECTION = re.compile(
    r"[\s*_]*(?:the )?(?:final |correct )?(?:answer|result|solution|conclusion)s?[ \t:*_]*\n", re.IGNORECASE
)
NUMERAL = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<number>\d*\.\d+|\d+|0,\d{3}|\d{4,},\d\d?|\d{1,3}(?:,\d{3})+(?:\.\d+)?"
    r"|\d{1,3}(?: \d{3})+(?:\.\d+)?)\.?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3}))?(?:/(?P<under>\d+))?"
    r"|\\frac(?:\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}|(?P<digits>\d\d)))(?P<percent> ?\\?%)?"
)


COMMA = re.compile(r"(?<=^0),|(?<=\d{4}),")


def final_answer(completion: str) -> str:
    r"""Return the text between answer tags, else after the last ``####``, else the whole completion.

    If that text has a ``\boxed{}``, return only the content of the last one.
    """
    mark = marked(completion)
    text = after_thinking(completion) if mark is None else below_heading(mark)
    found = boxes(text)
    return (text if not found else found[-1][2]).strip()


def marked(completion: str) -> str | None:
    """Return the text between the last answer tags, else after the last ``####``, else None.

    What a model thinks is not searched.
    """
    completion = after_thinking(completion)
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if closed and opened:
        return tagged
    before, hashes, after = completion.rpartition("####")
    # A Markdown heading begins with #### too: words after it are not the answer if there is a box before it.
    return after if hashes and not (HEADING.match(after) and boxes(before)) else None


def below_heading(mark: str) -> str:
    """Return what follows a heading such as ``Final Answer``, or all of ``mark`` if it begins with no such
    heading."""
    heading = SECTION.match(mark)
    return mark[heading.end() :] if heading else mark


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return the start, end and content of every closed ``\boxed{}`` that is not inside another."""
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[bool, int, int]] = []
    for token in BRACES.finditer(text):
        if token.group()[-1] == "{" and token.group() != r"\{":
            opened.append((token["box"] is not None, *token.span()))
        elif token.group() == "}" and opened:
            is_box, start, inside = opened.pop()
            while is_box and found and found[-1][0] > start:
                found.pop()
            if is_box:
                found.append((start, token.end(), text[inside : token.start()]))
    return found


def last_joined(text: str, spans: list[tuple[int, int, str]], joint: re.Pattern[str] = BOX_JOINT) -> str:
    r"""Join the last of ``spans`` with those that form a list with it.

    ``\boxed{1}, \boxed{2} and \boxed{3}`` becomes ``1, 2, 3``.
    """
    members = [spans[-1]]
    for span in reversed(spans[:-1]):
        if not joint.fullmatch(text, span[1], members[0][0]):
            break
        members.insert(0, span)
    return ", ".join(dict.fromkeys(content for _, _, content in members))


def clean(text: str) -> str:
    """Remove Markdown's emphasis, and write Unicode mathematics in LaTeX."""
    return to_latex(EMPHASIS.sub(lambda match: match[match.lastindex or 0], text))


def strip_markup(text: str) -> str:
    r"""Remove dollar signs, fonts, emphasis, ``\left`` and ``\right``, and make all white space one space."""
    text = SPACING.sub(" ", TIGHT.sub("", clean(text)))
    text = FRACTIONS.sub(r"\\frac", SIZES.sub("", text))
    text = RELATIONS.sub(lambda match: rf"\{match['first']}eq" if match["first"] else r"\neq", text)
    text = DELIMITERS.sub("", text)
    for _ in range(3):
        text = FONTS.sub(r" \1 ", text)
    return " ".join(text.replace("{,}", ",").replace(r"\%", "%").split())


def strip_formatting(text: str) -> str:
    """Remove markup, and spaces except between words."""
    return END.sub("", COMMAND_GAP.sub(r"\g<command>", GAPS.sub("", strip_markup(text))))


def plain(text: str) -> str:
    """Return the form in which answers are compared as text: no formatting and, unless LaTeX, lower case."""
    text = strip_formatting(text)
    return text if "\\" in text else text.casefold()


class Numeral(NamedTuple):
    """A number written as digits; ``rounded`` is True if it has a decimal point or an exponent."""

    value: Fraction
    percent: bool
    rounded: bool


def parse_numeral(text: str) -> Numeral | None:
    """Parse a number written as digits: -1,000.5, 1e-5, 3/4, 75%.

    Returns None for anything else, and for 84/2, because the division is left to do.
    """
    match = NUMERAL.fullmatch(text)
    if not match:
        return None
    digits = match["digits"]
    top, bottom = (
        (digits[0], digits[1])
        if digits
        else (match["top"] or match["number"], match["bottom"] or match["under"])
    )
    with suppress(ValueError, ZeroDivisionError):  # too many digits for Python's int(), or a division by 0
        number = Fraction(COMMA.sub(".", top).replace(",", "").replace(" ", "")) / int(bottom or 1)
        if not bottom or number.denominator > 1:
            value = number * Fraction(10) ** int(match["exponent"] or 0) * (-1 if match["sign"] == "-" else 1)
            return Numeral(value, bool(match["percent"]), "." in top or match["exponent"] is not None)
    return None


def same_numeral(mine: Numeral, right: Numeral) -> bool:
    """True if both are the same number, to six digits if either is rounded, as in math-verify.

    A percentage equals its fraction and its plain number: 50% is 0.5 and 50.
    """
    hundredth = Fraction(1, 100)
    scaled = (
        {mine.value}
        if mine.percent == right.percent
        else {mine.value, mine.value * (hundredth if mine.percent else 100)}
    )
    if not (mine.rounded or right.rounded):
        return right.value in scaled
    return any(_close(each, right.value) for each in scaled)


def _close(one: Fraction, other: Fraction) -> bool:
    return round(one, 6) == round(other, 6) and abs(one - other) <= CLOSE * min(abs(one), abs(other))


CLOSE = Fraction(2, 1_000_000)
"""The relative difference below which numbers are equal: six significant digits. math-verify rounds to six
decimal places, which would make all small numbers equal."""
