"""What can be asked of an expert. Whoever asks need not know where the expert runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from handrail.experts.correctors import Draft
from handrail.types.problem import Problem


@dataclass(frozen=True)
class JudgeQuestion:
    """Which steps of an attempt are right? Answer: see ``StepJudge``."""

    problem: Problem
    steps: list[str]
    step_end: str | None = None  # regular expression; None for the usual ends of steps


@dataclass(frozen=True)
class CorrectionQuestion:
    """What follows the steps that are kept? Answer: see ``Corrector``."""

    draft: Draft
    whole: bool  # everything to the end, instead of one step
    attempt: int
    shown: bool  # the corrector sees the reference
    max_tokens: int  # longest step
    step_end: str | None = None


@dataclass(frozen=True)
class PlanQuestion:
    """How does a worked solution proceed? Answer: a plan, or None if there is none that gives nothing away.

    Two ablations answer with something else: the whole solution, or the plan of another question that is asked at the same time.
    """

    problem: Problem
    reference: str
    max_tokens: int = 256
    ablation: Literal["", "solution", "shuffled-plan"] = ""


Question = JudgeQuestion | CorrectionQuestion | PlanQuestion
