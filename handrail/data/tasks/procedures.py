"""Procedures: a small language for worked solutions, used by the built-in benchmarks and the warm start.

A procedure is lines of operations on the numbers of a prompt: ``multiply second first then add it third``.
``first`` to ``fourth`` are the prompt's numbers, ``it`` is the last result and ``that`` the one before.
Executing a procedure gives the steps of a reference, ``3 * 5 = 15 , 15 + 1 = 16``; its own text, which names
operations and no value, is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

LIMIT = 100
PLACES = ("first", "second", "third", "fourth")
RESULTS = ("it", "that")
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "count": "*"}
# Verbs with a number of their own: ``lend`` an hour, ``halve``, and the ``rest`` of an hour in minutes. None
# stands for the operand.
CONSTANTS: dict[str, tuple[int | None, str, int | None]] = {
    "lend": (None, "-", 1),
    "halve": (None, "/", 2),
    "rest": (60, "-", None),
}
VERBS = (*SIGNS, *CONSTANTS)

Answer = Literal["each", "last", "both"]


class Impossible(ValueError):
    """The result of an operation is not a whole number from 0 to 99, and only those are words."""


@dataclass(frozen=True)
class Operation:
    """A verb and its operands: places of the prompt, ``it`` or ``that``.

    ``count`` takes one place: the number there times the number that the thing named there stands for.
    """

    verb: str
    operands: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join([self.verb, *self.operands])


@dataclass(frozen=True)
class Procedure:
    """Lines of operations.

    ``answer`` says what the problem asks for: the result of ``each`` line, the ``last`` result, or the last
    two results (``both``).
    """

    lines: tuple[tuple[Operation, ...], ...]
    answer: Answer

    @property
    def plan(self) -> str:
        return "\n".join(
            [
                *(" then ".join(operation.text for operation in line) for line in self.lines),
                f"answer {self.answer}",
            ]
        )


@dataclass
class Solution:
    """The result of executing a procedure.

    ``steps`` are its lines as equalities. ``chosen`` has an entry for every number of the reference, answer
    included: True if the procedure picks the number, False if it follows from the words before it.
    """

    steps: list[str] = field(default_factory=list)
    answer: str = ""
    chosen: list[bool] = field(default_factory=list)


def procedure(text: str) -> Procedure:
    """Parse a procedure from the text of its plan."""
    *lines, last = text.splitlines()
    steps = tuple(tuple(map(_operation, line.split(" then "))) for line in lines)
    return Procedure(steps, last.removeprefix("answer "))  # type: ignore[arg-type]


def _operation(text: str) -> Operation:
    verb, *operands = text.split()
    return Operation(verb, tuple(operands))


def carry_out(work: Procedure, numbers: Sequence[int], things: Sequence[int] = ()) -> Solution:
    """Execute ``work`` on the numbers of a prompt.

    ``things`` holds, for each number, what the thing named after it stands for. Raises Impossible if a result
    is not a whole number from 0 to 99.
    """
    done = Solution()
    results: list[int] = []
    ends: list[int] = []
    for line in work.lines:
        equalities = []
        for operation in line:
            before, sign, behind = _terms(operation)
            left, right = (_value(term, operation, numbers, things, results) for term in (before, behind))
            results.append(calculate(left, sign, right))
            equalities.append(f"{left} {sign} {right} = {results[-1]}")
            done.chosen += [before not in RESULTS, behind not in RESULTS, False]
        done.steps.append(" , ".join(equalities))
        ends.append(results[-1])
    asked = {"each": ends, "last": results[-1:], "both": results[-2:]}[work.answer]
    done.answer = " ".join(map(str, asked))
    done.chosen += [False] * len(asked)
    return done


def _terms(operation: Operation) -> tuple[int | str, str, int | str]:
    """Return the left term, the sign and the right term.

    A term is a constant, a place, a result or ``thing``.
    """
    place, *more = operation.operands
    if operation.verb in CONSTANTS:
        before, sign, behind = CONSTANTS[operation.verb]
        return (place if before is None else before, sign, place if behind is None else behind)
    return place, SIGNS[operation.verb], more[0] if more else "thing"


def _value(
    term: int | str, operation: Operation, numbers: Sequence[int], things: Sequence[int], results: list[int]
) -> int:
    if isinstance(term, int):
        return term
    if term == "thing":
        return things[PLACES.index(operation.operands[0])]
    return numbers[PLACES.index(term)] if term in PLACES else results[-1 - RESULTS.index(term)]


def calculate(left: int, sign: str, right: int) -> int:
    """Compute ``left sign right``. Raises Impossible; see ``carry_out``."""
    if sign == "/" and left % right:
        raise Impossible
    result = {
        "+": left + right,
        "-": left - right,
        "*": left * right,
        "/": left // right if sign == "/" else 0,
    }[sign]
    if result not in range(LIMIT):
        raise Impossible
    return result
