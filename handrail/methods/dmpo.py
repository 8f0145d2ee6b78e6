from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.linearize import linearized
from handrail.types.trajectory import Group, Trajectory


class DmpoSettings(GrpoSettings):
    temperature: float = Field(1 / 15, gt=0)
    """α: the group's target distribution is softmax(R/α)."""
    matching_coef: float = Field(2.0, ge=0)
    """λ, the coefficient of the distance between the target distribution and the policy's own."""
    mask_uniform: bool = True
    """Skip groups with equal rewards instead of making their trajectories equally likely."""


class Dmpo(Method[DmpoSettings]):
    """DMPO: match the policy's distribution over a group to the target distribution defined by its rewards.

    rollout: G samples of each problem.
    guide: nothing.
    credit: GRPO's, and ∂/∂log π of −λ·mean (p − q)² as the column ``linear_weight``; p = softmax(R/α) and
        q = softmax(mean log π of each trajectory), both within the group.
    surrogate: GRPO's, plus w·log π, a mean over problems.

    The formulas come from two sets of notes on the paper; no code was published.
    """

    refuses: ClassVar[Mapping[str, str]] = {"dmpo": "the method has this objective already"}

    name = "dmpo"
    source = "arXiv 2605.19461"
    status = "secondary"
    Settings = DmpoSettings

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited, s = await super().credit(group, ctx), self.settings
        if credited is None:
            return None
        return await match_rewards(credited, ctx, s.temperature, s.matching_coef, s.mask_uniform)


async def match_rewards(
    group: Group, ctx: Context, temperature: float, coef: float, mask_uniform: bool
) -> Group:
    """Add the gradient of −coef·mean (p − q)² over the trajectories of the baseline with a known reward."""
    comparable = [
        member for member in group.baseline if member.reward == member.reward and member.trained_tokens
    ]
    if not comparable or (group.dead and mask_uniform):
        return group
    ctx.counts["dmpo/matched"] += 1

    def objective(members: Sequence[Trajectory], logps: Sequence[Tensor]) -> Tensor:
        return -coef * mismatch(members, logps, temperature)

    return await linearized(group, comparable, objective)


def mismatch(members: Sequence[Trajectory], logps: Sequence[Tensor], temperature: float) -> Tensor:
    """Compute mean (p − q)² of trajectories with log-probabilities ``logps`` [T] each."""
    pairs = zip(members, logps, strict=True)
    likelihood = torch.stack([logp[member.trained].mean() for member, logp in pairs])
    rewards = torch.tensor([member.reward for member in members])
    return ((torch.softmax(rewards / temperature, 0) - torch.softmax(likelihood, 0)) ** 2).mean()
