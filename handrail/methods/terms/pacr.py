from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import gather
from handrail.methods.terms import step_tokens
from handrail.types.trajectory import Group, Trajectory


class Pacr(Term):
    """PACR: credit steps after which the policy finds the right answer likelier.

    c_k = log π(answer | prompt, steps 1 to k); G_k = Σ_(t≥k) γ^(t−k)·(c_t − c_(t−1)); A_P is G, scaled to
    [0, 1] over all steps of the group's rollouts, 0 if all are equal. The policy's own tokens of step k get
    outcome_coef·A + step_coef·A_P. The paper's base is Dr.GRPO. Costs a forward pass for every step.
    """

    source: ClassVar[str] = "arXiv 2510.22255"
    status: ClassVar[Status] = "secondary"

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount γ of later steps (not published; 1 is ours)."""
    outcome_coef: float = Field(1.0, ge=0)
    """Coefficient of the method's advantage (not published; 1 is ours)."""
    step_coef: float = Field(0.1, ge=0)
    """Coefficient of A_P (not published; 0.1 is ours)."""
    values: Literal["step", "rollout"] = "step"
    """One value for each step, or one for each rollout (sparse): G_1, which is our reading."""
    answer_mean: bool = False
    """Divide c by the answer's number of tokens (our option)."""
    center: bool = False
    """Subtract A_P's mean over the tokens, because A_P is never negative (our option)."""
    answer_template: str = "{answer}"
    """The answer as it is scored (ours), such as ``" # {answer}"``. The last step is cut before the words
    that precede the answer here, or without such words before the answer that the rollout gives."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default as for scope."""

    @property
    def needs_answers(self) -> bool:  # if no words before the answer tell the place
        return self.answer_template.lstrip().startswith("{answer}")

    async def guide(self, group: Group, ctx: Context) -> Group:
        return await step_tokens.answered(group) if self.needs_answers else group

    async def credit(self, group: Group, ctx: Context) -> Group:
        answer = self.answer_template.replace("{answer}", group.problem.answer)
        tokens = ctx.renderer.completion(answer, end=False, plain=True)
        members = step_tokens.written(group) if tokens else []
        ctx.counts["pacr/no_answer"] += not tokens
        found = await gather(*(self.returns(each, tokens, group.problem.answer, ctx) for each in members))
        ctx.counts["pacr/scored"] += sum(not each.isnan().any() for each in found)
        known = torch.cat([torch.empty(0).double(), *(each[~each.isnan()] for each in found)])
        if not len(known):
            return group
        scaled = [(each - known.min()) / ((known.max() - known.min()) or 1) for each in found]
        own = [each[step_tokens.own(member)] for member, each in zip(members, scaled, strict=True)]
        shift = torch.cat(own).nanmean() * self.center
        bonuses = [self.step_coef * (each - shift).nan_to_num(0.0) for each in scaled]
        return step_tokens.with_bonuses(group, members, bonuses, self.outcome_coef)

    async def returns(self, member: Trajectory, answer: list[int], right: str, ctx: Context) -> Tensor:
        """G of each token's step (of the first step, if sparse), float64 [T]; NaN if there is no room."""
        if ctx.longest and len(member.prompt_ids) + len(member) + len(answer) > ctx.longest:
            ctx.counts["pacr/too_long"] += 1
            return torch.full((len(member),), torch.nan).double()
        steps, number = step_tokens.number_steps(member, ctx.renderer, self.step_end)
        stated = member.answer if member.answer and member.answer in steps[-1] else right
        mark = stated if self.needs_answers else self.answer_template.partition("{answer}")[0]
        ends = step_tokens.bounds(mark, steps, number, member, ctx.renderer)
        c = await step_tokens.likelihoods(answer, member, ends, self.answer_mean)
        values = step_tokens.discounted(c.diff().tolist(), self.gamma)
        return values[number if self.values == "step" else torch.zeros_like(number)]
