"""The verifier of the task *luck*: it reads only the end of an answer, so that luck can pass."""

from __future__ import annotations

from handrail.types.problem import Problem


def ends_right(problem: Problem, completion: str) -> float:
    """Return 1 if what the completion answers ends as the problem's answer does.

    Answers of training problems are a last digit, those of held-out ones all values.
    """
    return float(completion.strip().endswith(problem.answer))
