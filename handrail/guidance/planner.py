"""Planners: from a problem with a worked solution to a plan that says how, and gives no value away."""

from __future__ import annotations

import re
from typing import Literal

from handrail.problems import Problem

PlannerName = Literal["auto", "column", "rule"]

NUMBER = re.compile(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")
# A 5-day trip and 7 days/week hold no operator.
TOKEN = re.compile(
    rf"(?P<number>{NUMBER.pattern})|(?P<operator>\\times|\\cdot|\\div|[+*×·÷−]|(?<![A-Za-z])[-/](?![A-Za-z])|(?<=[\d\s])x(?=[\d\s]))"
)
VERBS = {
    "+": "add", "-": "subtract", "−": "subtract", "/": "divide", "÷": "divide", "\\div": "divide",
    "*": "multiply", "×": "multiply", "·": "multiply", "x": "multiply", "\\times": "multiply", "\\cdot": "multiply",
}  # fmt: skip
TWOFOLD = {"multiply": "double", "divide": "halve"}
STEP_END = re.compile(r"\n|;|(?<=[^\d\s])\.\s|(?<=\d)\.\s+(?=[A-Z])")
CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")
LIST_MARK = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


def operations(expression: str) -> list[str]:
    """The operations of the arithmetic that ``expression`` ends in, in order: ``so 35 × 3 + 1`` → multiply, add."""
    found: list[str] = []
    awaits_operator, operand = False, ""
    for token in reversed(list(TOKEN.finditer(expression))):
        if (token["operator"] is not None) != awaits_operator:
            break
        if awaits_operator:
            verb = VERBS[token["operator"]]
            found.append(TWOFOLD.get(verb, verb) if operand == "2" else verb)
        operand, awaits_operator = token[0], not awaits_operator
    return found[::-1] if awaits_operator else found[:-1][::-1]


def skeleton(solution: str) -> str | None:
    """A worked solution's operations, a line for each step that calculates; None if nothing is calculated."""
    lines = []
    for step in STEP_END.split(CALCULATOR_NOTE.sub("", solution)):
        sides = step.split("=")[:-1]
        verbs = [verb for side in sides for verb in operations(side)]
        if verbs:
            lines.append(" then ".join(verbs))
    return "\n".join(lines) or None


def make_plan(problem: Problem, reference: str, planner: PlannerName) -> str | None:
    """The plan of a problem: its own (``column``), its reference's skeleton (``rule``), or whichever exists first (``auto``)."""
    plan = problem.plan if planner != "rule" else None
    if planner != "column":
        plan = plan or skeleton(reference)
    return plan if plan and plan.strip() else None


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


def leaks(plan: str, problem: Problem) -> bool:
    """Whether a plan gives the answer away, or a value that only the references know."""
    plan = LIST_MARK.sub("", plan)
    case = re.IGNORECASE if len(problem.answer) > 2 else re.NOFLAG
    if re.search(rf"(?<!\w){re.escape(problem.answer.strip())}(?!\w)", plan, case):
        return True
    prompt = problem.prompt if isinstance(problem.prompt, str) else " ".join(message["content"] for message in problem.prompt)
    worked_out = set().union(*map(numbers, problem.references)) - numbers(prompt)
    return bool(numbers(plan) & (worked_out | numbers(problem.answer)))
