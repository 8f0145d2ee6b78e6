from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.normalizers import Normalizers
from handrail.methods.requests import TopTokens, gather
from handrail.methods.terms.tgpo import faded
from handrail.types.trajectory import Author, Group, Trajectory


class TgpoSettings(GrpoSettings):
    std_epsilon: float = Field(1e-6, ge=0)
    """Small number added to the standard deviation of a group's rewards."""
    entropy_bonus: float = Field(0.001, ge=0)
    """Coefficient of the token entropy in the objective; if nonzero, no trajectory can be dropped."""
    coef: float = Field(0.002, ge=0)
    """λ in step 1."""
    decay: float = Field(1e-5, ge=0)
    """λ falls by this in every step; by default it is 0 from step 201 on."""


class Tgpo(Method[TgpoSettings]):
    """TGPO's regularized variant: the policy also learns what its teacher would say at each of its tokens.

    rollout: G samples of each problem.
    guide: beside each rollout, right or wrong, one that reads the same tokens and predicts the teacher's
        likeliest one at each.
    credit: GRPO's for the rollouts (a group of one has mean 0 and standard deviation 1); weight λ on the
        policy's own tokens of the others, λ = max(coef − (step − 1)·decay, 0).
    surrogate: GRPO's, plus λ·log π of the teacher's tokens, a mean over all of the update.

    The other variant is the term ``tgpo``.
    """

    name, source, status, Settings = "tgpo", "arXiv 2605.13230", "published", TgpoSettings
    smallest_group = 1

    @property
    def models(self) -> frozenset[str]:
        return super().models | {"teacher"}

    async def guide(self, group: Group, ctx: Context) -> Group:
        coef = faded(self.settings.coef, self.settings.decay, ctx.step)
        if not coef:
            return group

        async def taught(member: Trajectory) -> Trajectory | None:
            top = await TopTokens(member.prompt_ids, member.token_ids, "teacher")
            if top is None:
                return None
            own = member.author == Author.POLICY
            ctx.counts["tgpo/tokens"] += int(own.sum())
            ctx.counts["tgpo/agreeing"] += int((own & (top == member.token_ids)).sum())
            author = torch.where(own, int(Author.TEACHER), member.author)
            weights = {"imitation_weight": own * coef}
            return replace(member, author=author, columns=weights, targets=top, in_baseline=False)

        found = await gather(*map(taught, group.rollouts))
        return group.add(*(each for each in found if each is not None))

    def advantages(self, group: Group) -> Group:
        if len(group.baseline) > 1 or not group.rewards:
            return super().advantages(group)
        (alone,), epsilon = group.baseline, self.settings.std_epsilon
        return group.swap(alone, alone.with_advantage(alone.reward / (1 + epsilon)))

    def imitation_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        return 1 / normalizers.imitated_tokens
