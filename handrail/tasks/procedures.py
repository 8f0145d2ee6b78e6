"""Procedures: a little language for worked solutions, in which the built-in benchmarks and the warm start are written.

A procedure is lines of operations on the numbers of a prompt: ``multiply second first then add it third``. ``first`` to
``fourth`` are the prompt's numbers, ``it`` is the last result and ``that`` the one before. Carried out it gives the steps of a
reference, ``3 * 5 = 15 , 15 + 1 = 16``; its own text, which names operations and no value, is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

MODULUS = 100
PLACES = ("first", "second", "third", "fourth")
# What is not taken from the prompt: minutes to an hour, the hour that gives them, the half.
CONSTANTS = {"carry": ("+", 60), "lend": ("-", 1), "halve": ("/", 2)}
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "count": "*"}
VERBS = (*SIGNS, *CONSTANTS)

Answer = Literal["each", "last", "both"]


class Impossible(ValueError):
    """An operation left the whole numbers below 100."""


@dataclass(frozen=True)
class Operation:
    """A verb and where its operands are found: places of the prompt, ``it`` or ``that``.

    ``count`` takes one: the number at that place times what the thing named there stands for.
    """

    verb: str
    operands: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join([self.verb, *self.operands])


@dataclass(frozen=True)
class Procedure:
    """Lines of operations; ``answer`` says what is asked for: each line's result, the last result, or the last two (``both``)."""

    lines: tuple[tuple[Operation, ...], ...]
    answer: Answer

    @property
    def plan(self) -> str:
        return "\n".join([*(" then ".join(operation.text for operation in line) for line in self.lines), f"answer {self.answer}"])


@dataclass
class Worked:
    """A procedure carried out: ``steps`` are its lines as equalities, ``chosen`` says of every number in a reference, those of
    the answer included, whether the procedure chose it; others follow from what stands before them."""

    steps: list[str] = field(default_factory=list)
    answer: str = ""
    chosen: list[bool] = field(default_factory=list)


def procedure(text: str) -> Procedure:
    """Reads a procedure as its plan writes it."""
    *lines, last = text.splitlines()
    return Procedure(tuple(tuple(map(_operation, line.split(" then "))) for line in lines), last.removeprefix("answer "))  # type: ignore[arg-type]


def _operation(text: str) -> Operation:
    verb, *operands = text.split()
    return Operation(verb, tuple(operands))


def carry_out(work: Procedure, numbers: Sequence[int], things: Sequence[int] = ()) -> Worked:
    """The steps, answer and choices of ``work`` on a prompt's numbers; ``things`` is what the thing behind each stands for.

    Raises Impossible where a result is no whole number, or a product is not below 100; sums and differences are modulo 100.
    """
    done = Worked()
    results: list[int] = []
    ends: list[int] = []
    for line in work.lines:
        equalities = []
        for operation in line:
            left, *more = [_value(place, numbers, results) for place in operation.operands]
            picked = [place in PLACES for place in operation.operands]
            if operation.verb in CONSTANTS:
                sign, right = CONSTANTS[operation.verb]
            else:
                sign = SIGNS[operation.verb]
                right = things[PLACES.index(operation.operands[0])] if operation.verb == "count" else more[0]
            results.append(calculate(left, sign, right))
            equalities.append(f"{left} {sign} {right} = {results[-1]}")
            done.chosen += [picked[0], picked[-1] or operation.verb in (*CONSTANTS, "count"), False]
        done.steps.append(" , ".join(equalities))
        ends.append(results[-1])
    asked = {"each": ends, "last": results[-1:], "both": results[-2:]}[work.answer]
    done.answer = " ".join(map(str, asked))
    done.chosen += [False] * len(asked)
    return done


def _value(place: str, numbers: Sequence[int], results: list[int]) -> int:
    if place in PLACES:
        return numbers[PLACES.index(place)]
    return results[-1] if place == "it" else results[-2]


def calculate(left: int, sign: str, right: int) -> int:
    """Raises Impossible; see ``carry_out``."""
    if sign == "/":
        if left % right:
            raise Impossible
        return left // right
    if sign == "*":
        if left * right >= MODULUS:
            raise Impossible
        return left * right
    return (left + right if sign == "+" else left - right) % MODULUS
