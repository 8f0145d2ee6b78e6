"""Keep unsafe and worthless answers from reasoning-gym's scorers.

Some scorers evaluate an answer as Python, which could call functions, import modules, or compute the result
itself; some give the full score for text that is no answer. We found these cases by giving every family's
scorer what a policy might try (tests/reliability/hostile.py).
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


def scorer_input(family: str, answer: str, entry: Mapping[str, Any]) -> str | None:
    """Return the text to give to the scorer of ``family``, or None if ``answer`` is refused and earns 0.

    ``entry`` is the family's entry, with the correct answer.
    """
    gold, metadata = entry["answer"], entry["metadata"]
    if answer == gold:  # first, because gold may hold what is refused below, such as an unsolved integral
        return answer
    match family:
        case "intermediate_integration" | "polynomial_multiplication" | "simple_integration":
            admitted = not has_call(answer) and not NO_NUMBER.search(answer)
        case "binary_matrix" | "n_queens" | "spiral_matrix" | "string_insertion":
            admitted = not has_call(answer) and _is_literal_or_no_expression(answer)
        case "countdown":
            admitted = bool(OPERATIONS.fullmatch(answer))
        case "puzzle24":  # the scorer accepts any four numbers, and 24.5 as 24
            same = sorted(re.findall(r"\d+", answer)) == sorted(map(str, metadata["numbers"]))
            admitted = same and bool(OPERATIONS.fullmatch(answer)) and _is_24(answer)
        case "complex_arithmetic":  # the scorer gives NaN the full score
            admitted = bool(COMPLEX_NUMBER.fullmatch(answer))
        case "coin_flip":  # the scorer gives part of its score for correct first digits
            admitted = bool(PROBABILITY.fullmatch(answer.strip())) and _near(answer.strip(), gold)
        case "game_of_life_halting":  # the scorer takes any word for True
            admitted = answer.strip().casefold() == gold.casefold()
        case "gsm_symbolic":  # the scorer reads the first number and drops its sign
            numbers = DECIMAL.findall(re.sub(r"(?<=\d),(?=\d{3})", "", answer))
            return gold if numbers and float(numbers[-1]) == float(gold) else None
        case _:
            admitted = True
    return answer if admitted else None


def has_call(answer: str) -> bool:
    """True if ``answer``, as Python, might call anything but the functions of school mathematics."""
    # A comment may separate a function's name from its parenthesis.
    return "#" in answer or any(match["other"] for match in CALL.finditer(answer))


def _is_literal_or_no_expression(answer: str) -> bool:
    """True if evaluating ``answer`` cannot read a name, such as one of the scorer's own variables."""
    try:
        ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the scorer cannot evaluate it either
        return True
    with suppress(ValueError, TypeError, RecursionError, MemoryError):
        ast.literal_eval(answer.strip())
        return True
    return False


def _is_24(expression: str) -> bool:
    from sympy import parse_expr

    with suppress(Exception):  # the parser may raise anything for ")(" or 1/0
        return bool(parse_expr(expression) == 24)
    return False


def _near(answer: str, gold: str) -> bool:
    """True if ``answer`` is within 0.0001 of ``gold`` and within 1 % of it.

    Without the second condition, 0 would be correct for every small probability.
    """
    with suppress(ZeroDivisionError, ValueError):  # Fraction() refuses a quotient in scientific notation
        right = Fraction(gold.replace(",", ""))
        return abs(Fraction(answer) - right) <= min(Fraction(1, 10_000), right / 100)
    return False
