"""Where an attempt stands against a reference: steps are matched by the number they end in."""

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
    """The last number of a step, however it is written; a minus counts where nothing stands before it to be subtracted from."""
    found = list(NUMBER.finditer(step))
    if not found or len(found[-1].group()) > LONGEST:
        return None
    before = step[: found[-1].start()].rstrip(" $")
    value = Fraction(found[-1].group().replace(",", ""))
    return -value if before.endswith(("-", "−")) and not re.search(r"[\w).]\s*[-−]\Z", before) else value


def aligned(kept: Sequence[str], reference: Sequence[str]) -> int:
    """The index of the reference's step that comes after the kept ones: each is matched by its result, in order."""
    results = [result(step) for step in reference]
    position = 0
    for found in map(result, kept):
        if found is not None and found in results[position:]:
            position = results.index(found, position) + 1
    return position


class ReferenceJudge:
    """A step is right if the number it ends in comes next in a reference, later steps included, and wrong if not.

    It takes any other way to the answer for wrong, which costs little where the verifier decides on the repair.
    """

    def __init__(self, step_end: str | None = None) -> None:
        self.step_end = step_end

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        """The scores by that reference under which most steps are right before the first wrong one; None without a reference."""
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
