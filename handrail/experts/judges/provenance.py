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
COMMON = {
    Fraction(number)
    for number in (*range(1, 13), 14, 16, 20, 24, 25, 28, 30, 31, 36, 50, 52, 60, 100, 365, 1000, 3600, 5280)
}
COMMON |= {Fraction(1, 10), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)}

TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {word: Fraction(number) for number, word in enumerate((*ONES, "ten", "eleven", "twelve", *TEENS), 1)}
WORDS |= {word: Fraction(10 * number) for number, word in enumerate(TENS, 2)}
WORDS |= {
    f"{tens}-{one}": Fraction(10 * number + rest)
    for number, tens in enumerate(TENS, 2)
    for rest, one in enumerate(ONES, 1)
}
WORDS |= {
    "third": Fraction(1, 3),
    "thirds": Fraction(1, 3),
    "fifth": Fraction(1, 5),
    "million": Fraction(10**6),
}


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


def numbers(text: str) -> set[Fraction]:
    """Numbers in a text, in digits or words; for shares and percentages p, also 1 − p and 1 + p."""
    found = {
        Fraction(number.replace(",", "")) for number in NUMBER.findall(text) if len(number) <= MAX_DIGITS
    }
    found |= {WORDS[word] for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()) if word in WORDS}
    found |= {
        1 + sign * number / whole
        for number in found
        for whole in (1, 100)
        for sign in (-1, 1)
        if number < whole
    }
    return found - {Fraction(0)}


def _claims(tokens: Sequence[Token]) -> tuple[set[Fraction], set[Fraction]]:
    """Split numbers into results and others.

    Results follow an equals sign that has a number or an unknown on its left, up to the next word.
    """
    results: set[Fraction] = set()
    others: set[Fraction] = set()
    seen = result = False
    for token in tokens:
        if token.kind == "stop":
            seen = result = False
        elif token.kind in ("equals", "about"):
            result = seen
        elif token.kind == "word":
            result = False
        elif token.kind == "number":
            (results if result else others).add(token.value)
        seen |= token.kind in ("number", "unknown")
    return results - {Fraction(0)}, others - results - {Fraction(0)}


def _founded(number: Fraction, stated: set[Fraction]) -> bool:
    known = stated | COMMON
    if _stands_in(number, known) or any(
        number / other in known or other / number in known for other in known
    ):
        return True
    return any(number - other in stated or other - number in stated for other in stated)


def _answers(number: Fraction, stated: set[Fraction]) -> bool:
    """True if an answer was stated before, possibly in cents, in percent, or rounded to a whole number."""
    if any(_stands_in(number * scale, stated) for scale in (Fraction(1), Fraction(100), Fraction(1, 100))):
        return True
    return number.denominator == 1 and any(
        abs(number - other) < 1 and other.denominator > 1 for other in stated
    )


def _stands_in(number: Fraction, stated: set[Fraction]) -> bool:
    """True if a number is one of ``stated``, or one of them rounded."""
    return number in stated or any(
        abs(number - other) * 1000 <= other and number.denominator + other.denominator > 2 for other in stated
    )
