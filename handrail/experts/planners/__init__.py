"""Planners turn a worked solution into a plan that describes the procedure without revealing values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from handrail._util.errors import UserError
from handrail.experts.conversations import plan_conversation, prompt_text, strip_reasoning
from handrail.models.policy import Policy, generate_within_context
from handrail.types.problem import Problem

DataPlannerName = Literal["auto", "column", "rule", "outline"]

NUMBER = re.compile(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")
# "A 5-day trip" and "7 days/week" contain no operator.
TOKEN = re.compile(
    rf"(?P<number>{NUMBER.pattern})|(?P<operator>\\times|\\cdot|\\div|[+*×·÷−]"
    r"|(?<![A-Za-z])[-/](?![A-Za-z])|(?<=[\d\s])x(?=[\d\s]))"
)
VERBS = {
    "+": "add",
    **dict.fromkeys(("-", "−"), "subtract"),
    **dict.fromkeys(("/", "÷", "\\div"), "divide"),
    **dict.fromkeys(("*", "×", "·", "x", "\\times", "\\cdot"), "multiply"),
}
TWOFOLD = {"multiply": "double", "divide": "halve"}
STEP_END = re.compile(r"\n|;|(?<=[^\d\s])\.\s|(?<=\d)\.\s+(?=[A-Z])")
CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")
LIST_MARK = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


def operations(expression: str) -> list[str]:
    """List the operations of the arithmetic at the end of ``expression``: ``so 35 × 3 + 1`` → multiply,
    add."""
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
    """List a worked solution's operations, one line per step that calculates; None if no step does."""
    lines = []
    for step in STEP_END.split(CALCULATOR_NOTE.sub("", solution)):
        sides = step.split("=")[:-1]
        verbs = [verb for side in sides for verb in operations(side)]
        if verbs:
            lines.append(" then ".join(verbs))
    return "\n".join(lines) or None


def outline(solution: str) -> str | None:
    """Replace every number in a worked solution by ``...``; None if it has no numbers."""
    blanked, numbers_left_out = NUMBER.subn("...", CALCULATOR_NOTE.sub("", solution))
    return blanked if numbers_left_out else None


class Planner(Protocol):
    """An expert that describes how a worked solution proceeds.

    Plans may leak the answer: check them with ``leaks``.
    """

    def plans(self, pairs: Sequence[tuple[Problem, str]], seeds: Sequence[int]) -> Sequence[str | None]:
        """Make a plan for each (problem, reference), or None.

        ``seeds``: one for each, for planners that sample.
        """
        ...


class DataPlanner:
    """Take plans from the data, or derive them from the reference by a rule."""

    def __init__(self, name: DataPlannerName) -> None:
        self.name = name

    def plans(self, pairs: Sequence[tuple[Problem, str]], seeds: Sequence[int] = ()) -> list[str | None]:
        return [make_plan(problem, reference, self.name) for problem, reference in pairs]


class PolicyPlanner:
    """Let the current policy write the plans; they are not stored.

    It has no plan, and counts that, if its context has no room for one.
    """

    def __init__(self, policy: Policy, max_tokens: int, counts: Counter[str] | None = None) -> None:
        self.policy, self.max_tokens = policy, max_tokens
        self.counts = Counter() if counts is None else counts

    def check(self, setting: str) -> None:
        """Raise UserError, naming ``setting``, if the policy cannot read the question for a plan."""
        question = plan_conversation(Problem("example", "1 + 1 = ?", "2"), "1 + 1 = 2")[0]["content"]
        try:
            self.policy.renderer.prompt(Problem("the question that asks for a plan", question, ""))
        except UserError as error:
            raise UserError(
                f"{setting}: the policy cannot write plans: {error}; choose another planner"
            ) from error

    def plans(self, pairs: Sequence[tuple[Problem, str]], seeds: Sequence[int]) -> list[str | None]:
        asked = [
            replace(problem, prompt=plan_conversation(problem, reference)[0]["content"])
            for problem, reference in pairs
        ]
        prompts = [self.policy.renderer.prompt(problem) for problem in asked]
        written = generate_within_context(self.policy, prompts, seeds, self.max_tokens)
        self.counts["planner/no_room"] += written.count(None)
        texts = ["" if plan is None or not plan.finished else strip_reasoning(plan.text) for plan in written]
        return [text or None for text in texts]


def make_plan(problem: Problem, reference: str, planner: DataPlannerName) -> str | None:
    """Make a plan without a model.

    ``column``: the problem's own plan. ``rule``: the reference's ``skeleton``. ``auto``: the own plan if
    there is one, else the rule's. ``outline``: the reference's ``outline``.
    """
    if planner == "outline":
        return outline(reference)
    plan = problem.plan if planner != "rule" else None
    if planner != "column":
        plan = plan or skeleton(reference)
    return plan if plan and plan.strip() else None


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


def names_answer(text: str, problem: Problem) -> bool:
    """True if a text contains the problem's answer, literally or as a number."""
    case = re.IGNORECASE if len(problem.answer) > 2 else re.NOFLAG
    written = re.search(rf"(?<!\w){re.escape(problem.answer.strip())}(?!\w)", text, case)
    return bool(written) or bool(numbers(problem.answer)) and numbers(problem.answer) <= numbers(text)


def leaks(plan: str, problem: Problem) -> bool:
    """True if a plan reveals the answer, or a value that occurs only in the references."""
    plan = LIST_MARK.sub("", plan)
    worked_out = set().union(*map(numbers, problem.references)) - numbers(prompt_text(problem))
    return names_answer(plan, problem) or bool(numbers(plan) & (worked_out | numbers(problem.answer)))
