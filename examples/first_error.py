"""A verifier for training a judge: how near is the step that it names to the first wrong one?

FAPO (arXiv 2510.22543) trains its generative judge with it. A problem's prompt shows a solution in numbered
steps and asks for the number of the first wrong one, or -1, in a box; its answer is that number, and its
column ``steps`` the number of steps. The paper's reward is between -1 and 1; this one is (1 + it)/2, which
gives the same normalized advantages.

Use: ``verifier.name = "examples/first_error.py:reward"``.
"""

import re

from handrail import Problem

BOXED = re.compile(r"\\boxed\{\s*(-?\d{1,6})\s*\}")


def reward(problem: Problem, completion: str) -> float:
    right, steps = int(problem.answer), int(problem.metadata["steps"])
    named = [int(number) for number in BOXED.findall(completion)]
    if not named or (named[-1] == -1) != (right == -1):
        return 0.0
    return max(0.0, 1 - abs(named[-1] - right) / (2 * steps))
