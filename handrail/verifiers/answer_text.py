"""Answers as text: where a completion states its own, and what of its spelling means nothing. Imports nothing heavy."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\uff0c": ",", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
)
SPACING = re.compile(r"(?<!\\)\\(?:[,;:>] ?| |q?quad(?![a-zA-Z]))|(?<=[^\s(])~")
TIGHT = re.compile(r"\\!\s*")
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])")
FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf|normal)|mbox|boldsymbol|bm|operatorname)\s*\{([^{}]*)\}"
)
DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
END = re.compile(r"(?<![.,;])[.,;]$")
# A space after a comma tells 32, 349 from 32,349.
GAPS = re.compile(r"(?<![\w,]) | (?!\w)|(?<=,) (?!\d{3}(?!\d))")

BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# Boxes on one line with no more than this between them are one answer with several members: punctuation, a few words of the same
# formula with a comma, or the end of a formula and the next one's left side.
BOX_JOINT = re.compile(
    r"(?:[ ,;.$]|\\[()\[\],;]|\\q?quad|\\text\s*\{|\}|\band\b|\bor\b)*"
    r"|(?=[^\n]*?(?:[,;]|\band\b|\bor\b))(?:[^\n$\\]|\\[^)\]\n]){,70}"
    r"|\s*(?:\$|\\[)\]])\s*(?:,?and|,?or|,)\s*(?:\$|\\[(\[])[^\n$\\]{,20}"
)
FORMULA_JOINT = re.compile(r"\s*(?:,?and|,?or|,)\s*")
HEADING = re.compile(r"[^\n]*[A-Za-z]{3}")
NUMERAL = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<number>\d*\.\d+|\d+|0,\d{3}|\d{4,},\d\d?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?)\.?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3}))?(?:/(?P<under>\d+))?"
    r"|\\frac(?:\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}|(?P<digits>\d\d)))(?P<percent> ?\\?%)?"
)


COMMA = re.compile(r"(?<=^0),|(?<=\d{4}),")


def final_answer(completion: str) -> str:
    """What stands between answer tags, else after the last ``####``, else everything; of that the last ``\\boxed{}``, if any."""
    mark = marked(completion)
    text = completion if mark is None else mark
    found = boxes(text)
    return (text if not found else found[-1][2]).strip()


def marked(completion: str) -> str | None:
    """What stands between the last answer tags, else after the last ``####``."""
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if closed and opened:
        return tagged
    before, hashes, after = completion.rpartition("####")
    # Markdown's headings begin so too: words there are no answer to a completion that has boxed its own.
    return after if hashes and not (HEADING.match(after) and boxes(before)) else None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of every ``\boxed{}`` that is closed and stands in no other."""
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
    r"""The last of ``spans`` with all that stand before it in one list: ``\boxed{1}, \boxed{2} and \boxed{3}`` is ``1, 2, 3``."""
    members = [spans[-1]]
    for span in reversed(spans[:-1]):
        if not joint.fullmatch(text, span[1], members[0][0]):
            break
        members.insert(0, span)
    return ", ".join(dict.fromkeys(content for _, _, content in members))


def looks(text: str) -> str:
    r"""``text`` without what changes its looks only: dollar signs, fonts, ``\left`` and ``\right``, spaces but those between words."""
    text = SPACING.sub(" ", TIGHT.sub("", text.translate(SIGNS)))
    text = FRACTIONS.sub(r"\\frac", SIZES.sub("", text))
    text = DELIMITERS.sub("", text)
    for _ in range(3):
        text = FONTS.sub(r" \1 ", text)
    return END.sub("", GAPS.sub("", " ".join(text.replace("{,}", ",").replace(r"\%", "%").split())))


def plain(text: str) -> str:
    """What two spellings of an answer share that differ in looks only; of words, also the case."""
    text = looks(text)
    return text if "\\" in text else text.casefold()


class Numeral(NamedTuple):
    value: Fraction
    percent: bool
    rounded: bool


def numeral(text: str) -> Numeral | None:
    """The number that ``text`` writes as digits: -1,000.5, 1e-5, 3/4, 75%. None also for 84/2, which is yet to be divided."""
    match = NUMERAL.fullmatch(text)
    if not match:
        return None
    digits = match["digits"]
    top, bottom = (
        (digits[0], digits[1])
        if digits
        else (match["top"] or match["number"], match["bottom"] or match["under"])
    )
    with suppress(ValueError, ZeroDivisionError):  # more digits than Python converts, or a division by 0
        number = Fraction(COMMA.sub(".", top).replace(",", "").replace(" ", "")) / int(bottom or 1)
        if not bottom or number.denominator > 1:
            value = number * Fraction(10) ** int(match["exponent"] or 0) * (-1 if match["sign"] == "-" else 1)
            return Numeral(value, bool(match["percent"]), "." in top or match["exponent"] is not None)
    return None


def same_numeral(mine: Numeral, right: Numeral) -> bool:
    """Whether both are one number, where one has a point to six digits, as math-verify has it. 50% is also 50 and 0.5."""
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
"""Numbers this close, one relative to the other, are equal: six digits, as math-verify rounds, but of small numbers too."""
