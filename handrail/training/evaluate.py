"""How good a policy is on held-out problems, and how sure we are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from handrail._util.processes import dealt_back
from handrail._util.seeds import derive
from handrail.methods.context import Tools
from handrail.types import Group, Problem


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


def mean_reward(group: Group) -> float:
    return sum(member.reward for member in group.trajectories) / len(group.trajectories)


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """Accuracy with its interval, if there is any verdict; the mean reward, if some are paid in part; the number of unverified."""
    members = [member for group in groups for member in group.trajectories]
    verified = [member for member in members if member.correct is not None]
    out: dict[str, float] = vars(Accuracy.over_problems(groups)) if verified else {"n": 0}
    if any(member.reward != member.correct for member in verified):
        out["reward"] = sum(map(mean_reward, groups)) / len(groups)
    if len(verified) < len(members):
        out["unverified"] = len(members) - len(verified)
    return out


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share among ``n`` trials; sensible at 0 and 1 too."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(tools: Tools, accelerator: Accelerator, problems: Sequence[Problem], samples: int, name: str) -> list[Group]:
    """Graded groups of ``samples`` completions of every problem, with the same random numbers at every call of one ``name``.

    Several processes share the work; what is drawn does not depend on how many they are.
    """
    set_seed(derive("eval", name, 0) % 2**32)
    drawn = tools.policy.sample_together([tools.policy.encode_prompt(problem) for problem in problems], samples)
    groups = [Group(problem, row) for problem, row in zip(problems, drawn, strict=True)]
    return dealt_back(gather_object([tools.verify(groups[accelerator.process_index :: accelerator.num_processes])]))
