"""Count what a number leaves to be worked out.

6*7 and the root of a sum of two squares are still questions; 42 and the root of 52 are answers.
"""

from __future__ import annotations

import re
from collections import Counter
from math import gcd
from typing import Any

DIVISIBLE = re.compile(
    r"\\frac ?\{?(\d{1,80}|(?<=\{)-\d{1,80})\}? ?\{?(\d{1,80})\}?|(?<![\d.])(\d{1,80})/(\d{1,80})(?![\d.])"
)


def open_operations(expression: Any) -> int:
    """Count the integrals, derivatives, limits, sums and products that are not evaluated."""
    from sympy import Derivative, Integral, Limit, Product, Sum

    if not hasattr(expression, "atoms"):
        return 0
    return len(expression.atoms(Integral, Derivative, Limit, Sum, Product))


def divisions(text: str) -> int:
    """Count the fractions in ``text`` that equal an integer, such as 84/2.

    This needs the text, because math-verify divides them when it parses.
    """
    found = [[int(part) for part in match.groups() if part] for match in DIVISIBLE.finditer(text)]
    return sum(bottom != 0 and top % bottom == 0 for top, bottom in found)


def steps_left(expression: Any) -> int:
    """Count the steps left to do in a number, set, tuple or interval; 0 for numbers in a usual form."""
    from sympy import Add, FiniteSet, Interval, Mul, Number, Pow, Tuple

    match expression:
        case Number():
            return 0
        case Interval():
            return steps_left(expression.start) + steps_left(expression.end)
        case FiniteSet() | Tuple():
            return sum(map(steps_left, expression.args))
        case Add():
            return _of_sum(expression)
        case Mul():
            return _of_product(expression)
        case Pow(base=10) if expression.exp.is_Integer and not 0 <= expression.exp <= 5:
            return 0  # the usual notation of large and small numbers
        case Pow():
            undone = _is_rational(expression) and expression.exp != -1
            return steps_left(expression.base) + steps_left(expression.exp) + undone
        case _:
            inside = sum(map(steps_left, getattr(expression, "args", ())))
            return inside or int(_has_value(expression))


def _of_sum(expression: Any) -> int:
    """Count the steps that a sum leaves to do: terms that differ only by a rational factor must be added."""
    terms = _flat(expression, type(expression))
    kinds = Counter(frozenset(map(str, _split(term)[2])) for term in terms)
    return sum(map(steps_left, terms)) + sum(kinds.values()) - len(kinds)


def _of_product(expression: Any) -> int:
    """Count the steps that a product leaves to do.

    Rational factors must be multiplied, except in percentages and 3 * 10^8, and a fraction must be in lowest
    terms.
    """
    from sympy import Pow, Rational, UnevaluatedExpr

    over, under, others = _split(expression)
    percent = UnevaluatedExpr(Rational(1, 100))
    units = [
        each
        for each in others
        if each == percent or isinstance(each, Pow) and each.base == 10 and each.exp.is_Integer
    ]
    rest = [each for each in others if each not in units]
    left = (
        max(0, len(over) - 1) + max(0, len(under) - 1) + max(0, len(units) - 1) + sum(map(steps_left, rest))
    )
    return left + (len(over) == len(under) == 1 and _common(over[0], under[0]))


def _split(expression: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Split a product into its rational factors except 1 and -1, its rational divisors, and all others."""
    from sympy import Mul, Number, Pow

    over, under, others = [], [], []
    for factor in _flat(expression, Mul):
        divides = isinstance(factor, Pow) and factor.exp == -1
        for part in _flat(factor.base, Mul) if divides else [factor]:
            if isinstance(part, Number):
                numerator, denominator = (part.q, part.p) if divides and part.is_Rational else (part, 1)
                if part.is_Rational and not divides:
                    numerator, denominator = part.p, part.q
                over += [numerator] if abs(numerator) != 1 else []
                under += [denominator] if abs(denominator) != 1 else []
            else:
                others.append(Pow(part, -1, evaluate=False) if divides else part)
    return over, under, others


def _flat(expression: Any, kind: Any) -> list[Any]:
    if not isinstance(expression, kind):
        return [expression]
    return [part for each in expression.args for part in _flat(each, kind)]


def _common(one: Any, other: Any) -> bool:
    return all(each == int(each) for each in (one, other)) and gcd(int(one), int(other)) > 1


def _is_rational(expression: Any) -> bool:
    return not expression.free_symbols and bool(expression.doit().is_Rational)


def _has_value(expression: Any) -> bool:
    """True if a function of numbers, such as log_2 8 or sin(pi/6), has a simpler value."""
    return (
        bool(getattr(expression, "is_Function", False))
        and not expression.free_symbols
        and expression.doit() != expression
    )
