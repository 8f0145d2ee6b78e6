"""Questions for experts. A method that asks one need not know where the expert runs."""

from __future__ import annotations

from dataclasses import dataclass

from handrail.experts.correctors import Draft
from handrail.types.problem import Problem


@dataclass(frozen=True)
class JudgeQuestion:
    """Ask which steps of an attempt are right. Answer: see ``StepJudge``."""

    problem: Problem
    steps: list[str]
    step_end: str | None = None  # regular expression; None for the default step endings


@dataclass(frozen=True)
class CorrectionQuestion:
    """Ask for the continuation of the kept steps. Answer: see ``Corrector``."""

    draft: Draft
    whole: bool  # True for everything up to the end, False for one step
    attempt: int
    shown: bool  # True if the corrector sees the reference
    max_tokens: int  # maximum length of a step
    step_end: str | None = None


@dataclass(frozen=True)
class PlanQuestion:
    """Ask for a plan of a worked solution. Answer: the plan, or None if there is none that leaks no values.

    Two ablations return something else: "solution" the whole solution, "shuffled-plan" the plan of another
    training problem.
    """

    problem: Problem
    reference: str
    max_tokens: int = 256
    ablation: str = ""


Question = JudgeQuestion | CorrectionQuestion | PlanQuestion
