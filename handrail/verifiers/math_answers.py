"""Compare two answers in mathematics: with math-verify, and with checks for what math-verify ignores.

Besides being equal, an answer must agree in what math-verify leaves out, and must not leave more to be worked
out than the problem's own answer.
"""

from __future__ import annotations

import re
from typing import Any

from handrail.verifiers.answer_text import same_numeral
from handrail.verifiers.math_reading import Answer, ProseAnswer
from handrail.verifiers.worked_out import divisions, open_operations, steps_left

# Notation that math-verify ignores.
BASE = re.compile(r"\d_\{?(\w+)")
RELATION = re.compile(r"\\n(?:eq?|ot)(?![a-z])|!=|\\n?(?:sim|[gl](?:t|e?q?(?:slant)?))(?![a-z])|[<>~≠≤≥]")
CHOOSE = re.compile(r"\\[dt]?binom")
DEGREES = re.compile(r"\\circ|°")
PAIRS = {"(": ")", "[": "]", r"\{": r"\}"}
BRACKETS = re.compile(r"\\[{}]|[()\[\]]")


def same(mine: Answer, right: Answer) -> bool:
    """True if ``mine`` equals ``right`` as text, as a number, or by math-verify and our own checks."""
    if not mine.plain or mine.plain == right.plain:
        return bool(mine.plain)
    if mine.numeral and right.numeral:
        return same_numeral(mine.numeral, right.numeral)
    if mine.expression is None or right.expression is None:
        return False
    return _same_writing(mine, right) and _same_expressions(mine, right)


def _same_expressions(mine: Answer, right: Answer) -> bool:
    """True if math-verify finds the expressions equal and ``mine`` leaves no more to be worked out."""
    found, gold = mine.expression, right.expression
    if _is_equation(gold):
        return _same_equations(found, gold)
    if not _is_true_chain(found):
        return False
    value, wanted = _align_forms(_value(found), _value(gold), mine.text, right.text)
    if open_operations(value) > open_operations(wanted):
        return False
    if not getattr(wanted, "free_symbols", True):
        left = steps_left(value) + divisions(_last_side(mine.text))
        if left > steps_left(wanted) + divisions(_last_side(right.text)):
            return False
    if not _same_numbers(value, wanted):
        return False
    if _is_chain(found) and _is_chain(gold):  # compare the names too: x = 3 is not y = 3
        return _verify(gold, found) or value is not _value(found) and _verify(wanted, value)
    return _verify(wanted, value)


def _verify(gold: Any, found: Any) -> bool:
    from math_verify import verify

    # No timeout here: math-verify's is a Python signal handler, which cannot interrupt C code. The pool has
    # its own.
    return bool(verify(gold, found, timeout_seconds=None, allow_set_relation_comp=True))


def _chain_links(expression: Any) -> list[Any]:
    """Return the equations of a chain ``a = b = c``; an empty list for anything else."""
    from latex2sympy2_extended.logic import And
    from sympy import Equality

    links = expression._unsorted_args if isinstance(expression, And) else [expression]
    return list(links) if all(isinstance(link, Equality) for link in links) else []


def _is_chain(expression: Any) -> bool:
    return bool(_chain_links(expression))


def _value(expression: Any) -> Any:
    """Return the last side of a chain of equations, or the expression itself."""
    links = _chain_links(expression)
    return links[-1].rhs if links else expression


def _is_equation(expression: Any) -> bool:
    """True if the equation is the answer, as for a line: its left side is more than a name or a number."""
    from latex2sympy2_extended import is_expr_of_only_symbols
    from sympy.core.function import AppliedUndef

    links = _chain_links(expression)
    if not links or isinstance(links[0].lhs, AppliedUndef) or is_expr_of_only_symbols(links[0].lhs):
        return False
    return bool(expression.free_symbols)


def _is_true_chain(expression: Any) -> bool:
    """True if every equation between numbers holds to within 1 %, which allows rounding, but not 0 = 42."""
    from sympy import I

    numbers = [
        link
        for link in _chain_links(expression)
        if link.lhs != I and _number(link.lhs) is not None and _number(link.rhs) is not None
    ]
    return all(
        abs(_number(link.lhs) - _number(link.rhs)) <= 0.01 * abs(_number(link.rhs)) for link in numbers
    )


def _same_equations(found: Any, gold: Any) -> bool:
    """True if two equations are equal by math-verify.

    math-verify finds all equations without solutions equal; of those, one must be a multiple of the other.
    """
    from sympy import Equality, simplify, solve

    if not _verify(gold, found):
        return False
    if not isinstance(found, Equality) or not isinstance(gold, Equality) or solve(gold, gold.free_symbols):
        return True
    return bool(simplify((gold.lhs - gold.rhs) / (found.lhs - found.rhs)).is_number)


def _align_forms(value: Any, wanted: Any, mine: str, right: str) -> tuple[Any, Any]:
    """Convert a vector to a point, or degrees in ``mine`` to radians, if the other answer has that form."""
    from sympy import MatrixBase, Tuple, pi

    if isinstance(value, MatrixBase) != isinstance(wanted, MatrixBase):
        value, wanted = (
            Tuple(*each) if isinstance(each, MatrixBase) and 1 in each.shape else each
            for each in (value, wanted)
        )
    if (
        DEGREES.search(mine)
        and not DEGREES.search(right)
        and getattr(wanted, "has", bool)(pi)
        and _number(value) is not None
    ):
        value = value * pi / 180
    return value, wanted


def _number(expression: Any) -> Any:
    """Return a finite number as mpmath's, because a float overflows at 10^308; None if it is not a number."""
    from mpmath import mpmathify

    if not getattr(expression, "is_number", False) or not getattr(expression, "is_finite", False):
        return None
    found = expression.doit().evalf()
    return mpmathify(found) if found.is_finite else None


def _same_numbers(value: Any, wanted: Any) -> bool:
    """True if two numbers agree to six significant digits, one of them perhaps as a percentage.

    math-verify compares six decimal places, which makes all small numbers equal. What is not a number passes
    here.
    """
    mine, right = _number(value), _number(wanted)
    if mine is None or right is None:
        return True
    return any(
        abs(mine * scale - right) <= 2e-6 * min(abs(mine * scale), abs(right)) for scale in (1, 100, 0.01)
    )


def _last_side(text: str) -> str:
    return re.split(r"(?<![<>!])=|\\in(?![a-z])", text)[-1]


def _same_writing(mine: Answer, right: Answer) -> bool:
    """True if the answers agree in what math-verify ignores.

    They must have the same base, enclosing brackets and number of members, and ``mine`` must have no relation
    or binomial that ``right`` has not.
    """
    ends, others = _enclosing(_last_side(mine.text)), _enclosing(_last_side(right.text))
    if ends and others and ends != others:
        return False
    if set(BASE.findall(_last_side(mine.text))) != set(BASE.findall(_last_side(right.text))):
        return False
    left_out = RELATION if isinstance(mine, ProseAnswer) else CHOOSE
    if left_out.search(_last_side(mine.text)) and not left_out.search(right.text):
        return False
    members, wanted = (getattr(_value(each.expression), "_unsorted_args", ()) for each in (mine, right))
    return not members or len(wanted) == len(set(wanted)) or len(members) == len(wanted)


def _enclosing(text: str) -> str | None:
    """Return the pair of brackets around the whole of a list, or None."""
    found = list(BRACKETS.finditer(text))
    if len(found) < 2 or found[0].start() != 0 or found[-1].end() != len(text) or "," not in text:
        return None
    depth = 0
    for bracket in found[:-1]:
        depth += 1 if bracket.group() in PAIRS else -1
        if depth == 0:
            return None
    return found[0].group() + found[-1].group()


def spelling(found: Answer) -> str:
    """Return the same text for all spellings of a number, and for other answers that sympy prints alike."""
    from sympy import Number, Rational

    if found.numeral:
        return str(found.numeral.value)
    value = _value(found.expression)
    if value is None:
        return found.plain
    # 0.5 and 1/2 are one answer. Convert the digits, because the float 0.1 is not exactly a tenth.
    return str(Rational(str(value)) if isinstance(value, Number) and value.is_finite else value)
