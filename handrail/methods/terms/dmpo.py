from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.dmpo import match_rewards
from handrail.types.trajectory import Group


class DmpoMatching(Term):
    """DMPO's objective under any method: match the policy's distribution over a group to that of its rewards.

    Adds the gradient of −λ·mean (p − q)² with p = softmax(R/α), q = softmax(mean log π); as the method dmpo.
    """

    source: ClassVar[str] = "arXiv 2605.19461"
    status: ClassVar[Status] = "secondary"

    temperature: float = Field(1 / 15, gt=0)
    """α: the group's target distribution is softmax(R/α)."""
    matching_coef: float = Field(2.0, ge=0)
    """λ, the coefficient of the distance between the target distribution and the policy's own."""
    mask_uniform: bool = True
    """Skip groups with equal rewards instead of making their trajectories equally likely."""

    async def credit(self, group: Group, ctx: Context) -> Group:
        return await match_rewards(group, ctx, self.temperature, self.matching_coef, self.mask_uniform)
