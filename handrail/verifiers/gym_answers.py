"""What of an answer reasoning-gym's scorers are shown.

Some evaluate answers as Python, which could call, import, or compute what was asked for; some pay in full for what is no answer. Found
by asking every family's scorer for what a policy might try (tests/reliability/hostile.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

FUNCTIONS = r"(?:a?(?:sin|cos|tan|cot|sec|csc)h?|exp|log|ln|sqrt|abs|Abs)"
CALL = re.compile(rf"(?<![\w.]){FUNCTIONS}\s*\(|(?P<other>[\w.)\]}}\"'][\s\\]*\()")
NO_NUMBER = re.compile(r"\b(?:oo|zoo|nan|inf)\b", re.IGNORECASE)
OPERATIONS = re.compile(r"(?!.*(?:\*\s*\*|/\s*/))[\d\s+\-*/()]+")
COMPLEX_NUMBER = re.compile(r"[\d\s.+\-*()ij]+")
PROBABILITY = re.compile(r"\d{1,80}(?:\.\d{1,80})?(?:[eE][+-]?\d{1,3})?(?:\s*/\s*\d{1,80})?")
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")


def shown(family: str, answer: str, entry: Mapping[str, Any]) -> str | None:
    """What the scorer of ``family`` is to see of ``answer``; None if it earns nothing. ``entry`` is the family's, with the right answer."""
    gold, metadata = entry["answer"], entry["metadata"]
    if (
        answer == gold
    ):  # even where it holds what we refuse in others: an integral that the family could not take
        return answer
    match family:
        case "intermediate_integration" | "polynomial_multiplication" | "simple_integration":
            admitted = not calls(answer) and not NO_NUMBER.search(answer)
        case "binary_matrix" | "n_queens" | "spiral_matrix" | "string_insertion":
            admitted = not calls(answer) and _is_literal_or_no_expression(answer)
        case "countdown":
            admitted = bool(OPERATIONS.fullmatch(answer))
        case "puzzle24":  # the family takes any four numbers, and 24.5 for 24
            same = sorted(re.findall(r"\d+", answer)) == sorted(map(str, metadata["numbers"]))
            admitted = same and bool(OPERATIONS.fullmatch(answer)) and _is_24(answer)
        case "complex_arithmetic":  # it takes what is not a number for one at no distance
            admitted = bool(COMPLEX_NUMBER.fullmatch(answer))
        case "coin_flip":  # it pays for a first digit
            admitted = bool(PROBABILITY.fullmatch(answer.strip())) and _near(answer.strip(), gold)
        case "game_of_life_halting":  # it takes every word for True
            admitted = answer.strip().casefold() == gold.casefold()
        case "gsm_symbolic":  # it takes the first number, without its sign
            numbers = DECIMAL.findall(re.sub(r"(?<=\d),(?=\d{3})", "", answer))
            return gold if numbers and float(numbers[-1]) == float(gold) else None
        case _:
            admitted = True
    return answer if admitted else None


def calls(answer: str) -> bool:
    """Whether Python would call something in it, but for the functions of school mathematics."""
    # A comment can stand between a name and what it is called with.
    return "#" in answer or any(match["other"] for match in CALL.finditer(answer))


def _is_literal_or_no_expression(answer: str) -> bool:
    """Whether evaluating it can name nothing, such as the scorer's own variables."""
    try:
        ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as for the scorer
        return True
    with suppress(ValueError, TypeError, RecursionError, MemoryError):
        ast.literal_eval(answer.strip())
        return True
    return False


def _is_24(expression: str) -> bool:
    from sympy import parse_expr

    with suppress(Exception):  # whatever the parser makes of ")(" and 1/0
        return bool(parse_expr(expression) == 24)
    return False


def _near(answer: str, gold: str) -> bool:
    """Within 0.0001, and within a hundredth of a small probability, or 0 would be right for all of them."""
    with suppress(ZeroDivisionError, ValueError):  # no Fraction is both a quotient and in scientific notation
        right = Fraction(gold.replace(",", ""))
        return abs(Fraction(answer) - right) <= min(Fraction(1, 10_000), right / 100)
    return False
