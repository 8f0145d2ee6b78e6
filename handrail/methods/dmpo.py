from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.linearise import linearised
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
    credit: GRPO's, and ∂/∂log π of −λ·mean (p − q)² as imitation weights; p = softmax(R/α) and
        q = softmax(mean log π of each trajectory), both within the group.
    surrogate: GRPO's, plus w·log π, a mean over problems.

    The formulas come from two sets of notes on the paper; no code was published.
    """

    name = "dmpo"
    source = "arXiv 2605.19461"
    status = "secondary"
    Settings = DmpoSettings

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited = await super().credit(group, ctx)
        if credited is None or (group.dead and self.settings.mask_uniform):
            return credited
        comparable = self.comparable(credited)
        return await linearised(credited, comparable, self.matching) if comparable else credited

    def matching(self, members: Sequence[Trajectory], logps: Sequence[Tensor]) -> Tensor:
        """Compute −λ·mean (p − q)² of trajectories with log-probabilities ``logps`` [T] each."""
        pairs = zip(members, logps, strict=True)
        likelihood = torch.stack([logp[member.trained].mean() for member, logp in pairs])
        rewards = torch.tensor([member.reward for member in members])
        target = torch.softmax(rewards / self.settings.temperature, 0)
        return -self.settings.matching_coef * ((target - torch.softmax(likelihood, 0)) ** 2).mean()

    @staticmethod
    def comparable(group: Group) -> list[Trajectory]:
        """Trajectories of the baseline with a known reward and at least one trained token."""
        return [
            member for member in group.baseline if member.reward == member.reward and member.trained_tokens
        ]
