"""Where the numbers of a solution come from: the problem, earlier steps, a calculation, or nowhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from handrail.experts.judges.math_text import MAX_DIGITS, Token, tokenise
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


def unfounded(problem: Problem, steps: Sequence[str]) -> list[bool]:
    """For every step whether it has a number from nowhere.

    Such a number stands neither in the problem nor in an earlier step, no equality of its step results in it, it is no everyday
    constant, and no two of these give it by one multiplication or division, nor two that are no constants by one addition or
    subtraction. What is only stated as the answer must stand before it. Mathematics in LaTeX has numbers from too many places;
    there nothing is unfounded.
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
            results, others = _claims(tokenise(line))
            if len(stated) + len(others) > MAX_NUMBERS:
                return found
            if ANSWER.match(line) and len(others) == 1 and not results:
                found[index] |= bool(stated) and not all(_answers(number, stated) for number in others)
            else:
                found[index] |= not all(_founded(number, stated | results) for number in others)
            stated |= numbers(line)
    return found


def numbers(text: str) -> set[Fraction]:
    """The numbers of a text, in digits or words, and with those that are shares or per cent what they leave or add up to."""
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
    """The numbers right of an equals sign which has a number or an unknown on its left, up to the next word; and all others."""
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
    """Whether an answer is a number stated before, perhaps as cents, as per cent or as a whole number."""
    if any(_stands_in(number * scale, stated) for scale in (Fraction(1), Fraction(100), Fraction(1, 100))):
        return True
    return number.denominator == 1 and any(
        abs(number - other) < 1 and other.denominator > 1 for other in stated
    )


def _stands_in(number: Fraction, stated: set[Fraction]) -> bool:
    """Whether a number is one of those stated, or one of them rounded."""
    return number in stated or any(
        abs(number - other) * 1000 <= other and number.denominator + other.denominator > 2 for other in stated
    )
