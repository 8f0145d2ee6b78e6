"""Comparison of an attempt with a reference: steps are matched by their last number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from handrail.experts.judges import Scores
from handrail.experts.planners import NUMBER
from handrail.experts.steps import split_steps
from handrail.types.problem import Problem

LONGEST = 100


def result(step: str) -> Fraction | None:
    """Last number of a step in any notation; a minus sign counts unless it can be a subtraction."""
    found = list(NUMBER.finditer(step))
    if not found or len(found[-1].group()) > LONGEST:
        return None
    before = step[: found[-1].start()].rstrip(" $")
    value = Fraction(found[-1].group().replace(",", ""))
    return -value if before.endswith(("-", "−")) and not re.search(r"[\w).]\s*[-−]\Z", before) else value


def aligned(kept: Sequence[str], reference: Sequence[str]) -> int:
    """Index of the reference step that follows the kept steps, which are matched in order by their
    results."""
    results = [result(step) for step in reference]
    position = 0
    for found in map(result, kept):
        if found is not None and found in results[position:]:
            position = results.index(found, position) + 1
    return position


class ReferenceJudge:
    """Judge a step as right if its last number is the result of a later reference step, else as wrong.

    Other ways to the answer are judged wrong, which costs little because the verifier decides about each
    repair.
    """

    def __init__(self, step_end: str | None = None) -> None:
        self.step_end = step_end

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        """Score by the reference that gives the most right steps before the first wrong one; None without a
        reference."""
        return [
            max(
                (
                    self._scores(split_steps(reference, self.step_end), steps)
                    for reference in problem.references
                ),
                key=_right,
                default=None,
            )
            for problem, steps in attempts
        ]

    @staticmethod
    def _scores(reference: list[str], steps: list[str]) -> Scores:
        results = [result(step) for step in reference]
        scores: Scores = []
        position = 0
        for found in map(result, steps):
            right = found in results[position:]
            scores.append(None if found is None else float(right))
            position = results.index(found, position) + 1 if right and found is not None else position
        return scores


def _right(scores: Scores) -> int:
    return scores.index(0.0) if 0.0 in scores else len(scores)
