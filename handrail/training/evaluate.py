"""How good a policy is on held-out problems, and how sure we are."""

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
    """A share with its 95 % Wilson interval over ``n`` independent shares: problems, not samples of one problem."""

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
        """The mean share of correct completions over the problems with a verdict, of which there must be one."""
        return cls.of([share for share in map(share_correct, groups) if share is not None])


def share_correct(group: Group) -> float | None:
    """The share of correct completions among those with a verdict; None if there is none."""
    verdicts = [member.correct for member in group.trajectories if member.correct is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def mean_reward(group: Group) -> float | None:
    """The mean of the known rewards; None if there is none."""
    return sum(group.rewards) / len(group.rewards) if group.rewards else None


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Accuracy with its interval, if there is any verdict; the mean reward, if some are paid in part; the number of unverified."""
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
    """The Wilson score interval of a share among ``n`` trials; sensible at 0 and 1 too."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    engine: LocalEngine, accelerator: Accelerator, problems: Sequence[Problem], samples: int, name: str
) -> list[Group]:
    """Graded groups of ``samples`` completions of every problem, with the same random numbers at every call of one ``name``.

    Several processes share the work; what is sampled does not depend on how many they are.
    """

    async def attempt(problem: Problem) -> Group:
        completions = await Generate(engine.policy.renderer.prompt(problem), samples)
        return Group(problem, await gather(*(Verify(problem, completion) for completion in completions)))

    placed = list(enumerate(problems))[accelerator.process_index :: accelerator.num_processes]
    own = engine.run([(("eval", name, place), attempt(problem)) for place, problem in placed])
    return dealt_back(gather_object([own]))
