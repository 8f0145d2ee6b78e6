"""Accuracy of a policy on held-out problems, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from handrail._util.processes import dealt_back
from handrail.engines.local import LocalEngine
from handrail.methods.requests import Generate, Verify, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Group


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy with its 95 % Wilson interval over ``n`` independent units: problems, not samples of
    one."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, shares: Sequence[float]) -> Accuracy:
        mean = sum(shares) / len(shares)
        return cls(mean, *wilson(mean, len(shares)), len(shares))

    @classmethod
    def over_problems(cls, groups: Sequence[Group]) -> Accuracy:
        """Mean share of correct completions over the problems with a verdict; there must be at least one."""
        return cls.of([share for share in map(share_correct, groups) if share is not None])


def share_correct(group: Group) -> float | None:
    """Share of correct completions among those with a verdict; None if there is none."""
    verdicts = [member.correct for member in group.trajectories if member.correct is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def mean_reward(group: Group) -> float | None:
    """Mean of the known rewards; None if there is none."""
    return sum(group.rewards) / len(group.rewards) if group.rewards else None


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Accuracy with its interval if there is any verdict, mean reward if it differs, number of unverified."""
    members = [member for group in groups for member in group.trajectories]
    verified = [member for member in members if member.correct is not None]
    out: dict[str, float] = vars(Accuracy.over_problems(groups)) if verified else {"n": 0}
    if any(member.reward != member.correct for member in verified):
        rewards = [reward for group in groups if (reward := mean_reward(group)) is not None]
        out["reward"] = sum(rewards) / len(rewards)
    if len(verified) < len(members):
        out["unverified"] = len(members) - len(verified)
    return out


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion in ``n`` trials; valid at 0 and 1 too."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    engine: LocalEngine, accelerator: Accelerator, problems: Sequence[Problem], samples: int, name: str
) -> list[Group]:
    """Sample and grade ``samples`` completions of every problem, with the same random numbers at each call
    for ``name``.

    Processes share the work; the samples do not depend on the number of processes.
    """

    async def attempt(problem: Problem) -> Group:
        completions = await Generate(engine.policy.renderer.prompt(problem), samples)
        return Group(problem, await gather(*(Verify(problem, completion) for completion in completions)))

    placed = list(enumerate(problems))[accelerator.process_index :: accelerator.num_processes]
    own = engine.run([(("eval", name, place), attempt(problem)) for place, problem in placed])
    return dealt_back(gather_object([own]))
