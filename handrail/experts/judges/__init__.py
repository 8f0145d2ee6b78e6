"""Step judges score every step of an attempt at a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from handrail.types.problem import Problem

Scores = list[float | None]


class StepJudge(Protocol):
    """An expert that can tell which step of a solution is wrong."""

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        """For each step of each attempt, return the probability in [0, 1] that it is right; None if the judge
        cannot tell.

        The scores of a whole attempt are None if it exceeds the judge's context or the judge does not answer.
        """
        ...


def first_error(scores: Scores, threshold: float) -> int | None:
    """Index of the first step that scores below ``threshold``; None if there is none."""
    return next(
        (index for index, score in enumerate(scores) if score is not None and score < threshold), None
    )
