"""Step judges: from a problem and the steps of an attempt to a score for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from handrail.types.problem import Problem

Scores = list[float | None]


class StepJudge(Protocol):
    """Whoever can say which step of a solution is wrong."""

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        """For each attempt the probability, in [0, 1], that each of its steps is right; None for a step where it cannot tell.

        None for a whole attempt that could not be judged: longer than the judge's context, or the judge did not answer.
        """
        ...


def first_error(scores: Scores, threshold: float) -> int | None:
    """The index of the first step that scores below ``threshold``; None if there is none."""
    return next(
        (index for index, score in enumerate(scores) if score is not None and score < threshold), None
    )
