"""Origin of the numbers in a solution: the problem, earlier steps, a calculation, or none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from handrail.experts.judges.math_text import MAX_DIGITS, Token, tokenize
from handrail.experts.planners import NUMBER
from handrail.types.problem import Problem

MAX_NUMBERS = 400
NOTE = re.compile(r"<<([^<>\n]*)>>")
ANSWER = re.compile(r"[\s*]*(?:####|(?i:(?:(?:so|thus|therefore|the|final|my),?\s+)*answer\s*(?:is\b|:))|A:)")
UNIT: int = 2520 * 10 ** (MAX_DIGITS + 1)
"""Numbers are counted in units of 1/UNIT, because integers are ten times as fast as fractions. All are whole
in it: they have less than MAX_DIGITS decimals, two more as a percentage, or a denominator up to 10."""
COMMON = {
    number * UNIT
    for number in (*range(1, 13), 14, 16, 20, 24, 25, 28, 30, 31, 36, 50, 52, 60, 100, 365, 1000, 3600, 5280)
}
COMMON |= {UNIT // 10, UNIT // 4, UNIT // 2, 3 * UNIT // 4}

TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {word: number * UNIT for number, word in enumerate((*ONES, "ten", "eleven", "twelve", *TEENS), 1)}
WORDS |= {word: 10 * number * UNIT for number, word in enumerate(TENS, 2)}
WORDS |= {
    f"{tens}-{one}": (10 * number + rest) * UNIT
    for number, tens in enumerate(TENS, 2)
    for rest, one in enumerate(ONES, 1)
}
WORDS |= {"third": UNIT // 3, "thirds": UNIT // 3, "fifth": UNIT // 5, "million": 10**6 * UNIT}


def find_unfounded(problem: Problem, steps: Sequence[str]) -> list[bool]:
    """For every step, True if it contains a number without an origin.

    A number has an origin if it occurs in the problem or an earlier step, is the result of an equality in its
    step, or is an everyday constant; if it is the product or quotient of two such numbers; or the sum or
    difference of two such numbers that are not constants. A number that is only stated as the answer must
    occur before. With LaTeX, numbers have too many possible origins, so no step is reported.
    """
    prompt = (
        problem.prompt
        if isinstance(problem.prompt, str)
        else "\n".join(message["content"] for message in problem.prompt)
    )
    found = [False] * len(steps)
    if any("\\" in text for text in (prompt, *steps)):
        return found
    stated = numbers(prompt)
    for index, step in enumerate(steps):
        for line in NOTE.sub(" ", step).splitlines():
            results, others = _claims(tokenize(line))
            if len(stated) + len(others) > MAX_NUMBERS:
                return found
            if ANSWER.match(line) and len(others) == 1 and not results:
                found[index] |= bool(stated) and not all(_answers(number, stated) for number in others)
            else:
                found[index] |= not all(_founded(number, stated | results) for number in others)
            stated |= numbers(line)
    return found


def numbers(text: str) -> set[int]:
    """Numbers in a text, in digits or words; for shares and percentages p, also 1 − p and 1 + p."""
    found = {
        _units(Fraction(number.replace(",", "")))
        for number in NUMBER.findall(text)
        if len(number) <= MAX_DIGITS
    }
    found |= {WORDS[word] for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()) if word in WORDS}
    found |= {
        UNIT + sign * number // whole
        for number in found
        for whole in (1, 100)
        for sign in (-1, 1)
        if number < whole * UNIT
    }
    return found - {0}


def _units(number: Fraction) -> int:
    return number.numerator * (UNIT // number.denominator)


def _claims(tokens: Sequence[Token]) -> tuple[set[int], set[int]]:
    """Split numbers into results and others.

    Results follow an equals sign that has a number or an unknown on its left, up to the next word.
    """
    results: set[int] = set()
    others: set[int] = set()
    seen = result = False
    for token in tokens:
        if token.kind == "stop":
            seen = result = False
        elif token.kind in ("equals", "about"):
            result = seen
        elif token.kind == "word":
            result = False
        elif token.kind == "number":
            (results if result else others).add(_units(token.value))
        seen |= token.kind in ("number", "unknown")
    return results - {0}, others - results - {0}


def _founded(number: int, stated: set[int]) -> bool:
    known = stated | COMMON
    if _stands_in(number, known):
        return True
    if any(_divides(number, other, known) or _divides(other, number, known) for other in known):
        return True
    return any(number - other in stated or other - number in stated for other in stated)


def _divides(number: int, other: int, known: set[int]) -> bool:
    """True if ``number`` / ``other`` is ``known``."""
    quotient, rest = divmod(number * UNIT, other)
    return not rest and quotient in known


def _answers(number: int, stated: set[int]) -> bool:
    """True if an answer was stated before, possibly in cents, in percent, or rounded to a whole number."""
    if any(_stands_in(each, stated) for each in (number, number * 100, number // 100)):
        return True
    return not number % UNIT and any(abs(number - other) < UNIT and other % UNIT for other in stated)


def _stands_in(number: int, stated: set[int]) -> bool:
    """True if a number is one of ``stated``, or one of them rounded."""
    return number in stated or any(
        abs(number - other) * 1000 <= other and (number % UNIT or other % UNIT) for other in stated
    )
