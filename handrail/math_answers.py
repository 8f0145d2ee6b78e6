"""What math-verify reads in a text, and what must hold besides its own verdict for an answer to earn anything."""

from __future__ import annotations

import re
from typing import Any

# An unescaped $ or a word says: prose with mathematics in it; so do line ends and the ; and # of our own tasks.
PROSE = re.compile(r"(?<!\\)\$|[#;\n]|(?<![\\{A-Za-z])[A-Za-z]{3,}")
# What math-verify leaves out of what it reads.
BASE = re.compile(r"\d\s*_\s*\{?\s*(\w+)")
DROPPED = re.compile(r"\\n(?:eq?|ot)(?![a-z])|\\n?(?:sim|[gl](?:t|eq?))(?![a-z])|[<>~≠≤≥]|\\[dt]?binom")
ADDED = re.compile(r"\\text\w*\s*\{[^}]*\d")
ENDS = re.compile(r"(?:\\boxed\{|\\left|[\s$])*(?P<first>\\\{|[(\[]).*,.*?(?P<last>\\\}|[)\]])(?:\\right|[\s$}.])*", re.DOTALL)
CLOSE = 2e-6
"""Numbers this close, one relative to the other, are equal: six digits, as math-verify rounds, but of small numbers too."""


def expressions(text: str) -> list[Any]:
    """What math-verify reads in ``text``, which it takes for LaTeX only between dollar signs."""
    from math_verify import parse

    if not PROSE.search(text):
        found: list[Any] = parse(f"${text}$", parsing_timeout=None)
        if any(not isinstance(expression, str) for expression in found):
            return found
    return list(parse(text, parsing_timeout=None))


def agree(found: list[Any], gold: list[Any]) -> bool:
    """Whether an answer that math-verify takes for ``gold`` is it: worked out, no other number, nothing left out that changes it."""
    return worked_out(found, gold) and _same_numbers(found, gold) and _same_writing(_written(found), _written(gold))


def worked_out(found: list[Any], gold: list[Any]) -> bool:
    """Whether the answer ``found`` says no less than ``gold``: where that is a number or has numbers for its members, numbers; never an
    integral, sum or limit yet to be taken. Otherwise the question itself, 6*7, would be a right answer to it."""
    from sympy import Derivative, Integer, Integral, Limit, Product, Sum

    open_ones = (Integral, Derivative, Limit, Sum, Product)
    read = [each for each in found if not isinstance(each, str)]
    if any(hasattr(each, "has") and each.has(*open_ones) for each in read):
        return any(hasattr(each, "has") and each.has(*open_ones) for each in gold)
    if not all(map(_is_written_number, _members(gold[0]))):
        return True
    fraction = isinstance(_right(gold[0]), Integer) and any("\\frac" in each for each in found if isinstance(each, str))
    return not fraction and all(_is_written_number(member) for each in read for member in _members(each))


def _members(expression: Any) -> list[Any]:
    """Of a set, a tuple or an interval; else itself."""
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(expression, Interval):
        return [expression.start, expression.end]
    return list(expression.args) if isinstance(expression, FiniteSet | Tuple) else [expression]


def _right(expression: Any) -> Any:
    from sympy import Equality

    return expression.rhs if isinstance(expression, Equality) else expression


def _is_written_number(expression: Any) -> bool:
    """A number, a percentage, a number in scientific notation, or a true equation that ends in one."""
    from sympy import Equality, Mul, Number, Pow, Rational, UnevaluatedExpr

    if isinstance(expression, Equality) and expression.lhs.is_number and expression.lhs.doit() != expression.rhs:
        return False
    expression = _right(expression)
    if isinstance(expression, Mul):
        numbers = [part for part in expression.args if isinstance(part, Number) and part != -1]
        units = [part for part in expression.args if not isinstance(part, Number)]
        percent = UnevaluatedExpr(Rational(1, 100))
        return len(numbers) == 1 and len(units) <= 1 and all(unit == percent or isinstance(unit, Pow) and unit.base == 10 for unit in units)
    return isinstance(expression, Number)


def _same_numbers(found: list[Any], gold: list[Any]) -> bool:
    """math-verify compares six digits behind the point, to which all small numbers are equal. A percentage may be meant by its number."""
    pairs = [(mine, right) for mine in _values(found) for right in _values(gold)]
    return not pairs or any(
        abs(mine * scale - right) <= CLOSE * min(abs(mine * scale), abs(right)) for mine, right in pairs for scale in (1, 100, 0.01)
    )


def _values(read: list[Any]) -> list[Any]:
    """As mpmath's numbers, for a float ends at 10^308; not a number where sympy finds none."""
    from mpmath import mpmathify, nan

    numbers = [_right(each) for each in read if not isinstance(each, str)]
    finite = [each.doit().evalf() for each in numbers if getattr(each, "is_number", False) and getattr(each, "is_finite", False)]
    return [mpmathify(each) if each.is_finite else nan for each in finite]


def _written(read: list[Any]) -> str:
    return "\n".join(each for each in read if isinstance(each, str))


def _same_writing(mine: str, right: str) -> bool:
    """Not another base, a negation or relation that the right answer has not, a word with a number in it, other brackets."""
    ends, others = ENDS.fullmatch(mine), ENDS.fullmatch(right)
    same_ends = not ends or not others or ends.groups() == others.groups()
    left_out = DROPPED.search(mine) and not DROPPED.search(right)
    return same_ends and not left_out and set(BASE.findall(mine)) <= set(BASE.findall(right))
