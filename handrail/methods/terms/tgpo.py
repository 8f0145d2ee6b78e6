from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Score, TopTokens, gather
from handrail.methods.terms.step_tokens import own, written
from handrail.types.trajectory import Group, Trajectory


class TgpoAdvantage(Term):
    """TGPO's advantage variant: credit tokens at which the policy likes what its teacher would say.

    A + λ·π(y) on the policy's own tokens; y is the teacher's likeliest token after the same words, π the
    policy right before each update (in the paper, the one that sampled), without gradient; λ =
    max(coef − (step − 1)·decay, 0). The bonus is never negative, in wrong rollouts too. The
    paper's base is grpo with std_epsilon = 1e-6, entropy_bonus = 0.001.
    """

    source: ClassVar[str] = "arXiv 2605.13230"
    status: ClassVar[Status] = "published"

    coef: float = Field(0.02, ge=0)
    """λ in step 1."""
    decay: float = Field(1e-4, ge=0)
    """λ falls by this in every step; by default it is 0 from step 201 on."""

    @property
    def models(self) -> frozenset[str]:
        return frozenset({"teacher"})

    async def credit(self, group: Group, ctx: Context) -> Group:
        coef = faded(self.coef, self.decay, ctx.step)
        if not coef:
            return group

        async def with_bonus(member: Trajectory) -> Trajectory:
            top = await TopTokens(member.prompt_ids, member.token_ids, "teacher")
            if top is None:
                return member
            logp = await Score(member.prompt_ids, member.token_ids, targets=top)
            ctx.counts["tgpo/tokens"] += int(own(member).sum())
            ctx.counts["tgpo/agreeing"] += int((own(member) & (top == member.token_ids)).sum())
            return member.with_columns(advantage=member.column("advantage") + own(member) * coef * logp.exp())

        members = written(group)
        return group.swap_all(members, await gather(*map(with_bonus, members)))


def faded(coef: float, decay: float, step: int) -> float:
    """max(coef − (step − 1)·decay, 0), ``step`` counting from 1; exactly 0 if only rounding is left."""
    left = coef - (step - 1) * decay
    return left if left > 1e-12 else 0.0
