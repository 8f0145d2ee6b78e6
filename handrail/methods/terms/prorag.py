from __future__ import annotations

import math
import re
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from handrail.experts.questions import JudgeQuestion
from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Ask, gather
from handrail.methods.terms.step_tokens import number_steps, own, with_bonuses, written
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory


class Prorag(Term):
    """ProRAG: add the z-scores of a step judge's scores to the advantages.

    A + β·z on the policy's own tokens; z = (s − mean s) / sqrt(var s + 1e-8), both over all own tokens of the
    group, so that long steps weigh more; s is the judge's score of the token's step, plus a bonus or penalty
    for its form. Equal scores give 0, and so does a single token. Groups with equal rewards learn too.

    A step that the judge cannot score gets 0 and enters no statistic, which is our choice. R is the
    verifier's; the paper's is an F1 score plus the form of the answer. Its base is grpo with ratio =
    "sequence".
    """

    source: ClassVar[str] = "arXiv 2601.21912"
    status: ClassVar[Status] = "published"

    beta: float = Field(0.3, ge=0)
    """Coefficient β of the z-scores."""
    judge: str = "arithmetic"
    """Judge that scores the steps, as for scope; the paper trains a process reward model, ``prm`` here."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default as for scope."""
    step_form: str | None = None
    """Regular expression that a step must match to be valid; by default every step is (our choice)."""
    valid_bonus: float = 1.0
    """Added to the score of a valid step."""
    invalid_bonus: float = -2.0
    """Added to the score of any other step."""

    async def guide(self, group: Group, ctx: Context) -> Group:
        members = written(group)
        scores = await gather(*(self.scores(group.problem, member, ctx) for member in members))
        scored = [each.with_columns(step_score=found) for each, found in zip(members, scores, strict=True)]
        return group.swap_all(members, scored)

    async def credit(self, group: Group, ctx: Context) -> Group:
        members = [member for member in group.baseline if "step_score" in member.columns]
        scores = [member.column("step_score") for member in members]
        known = torch.cat([torch.empty(0), *(each[~each.isnan()] for each in scores)]).double()
        if not len(known) or known.min() == known.max():
            return group
        deviation = (known.var(correction=0) + 1e-8).sqrt()
        z = [((score - known.mean()) / deviation).nan_to_num(0.0) for score in scores]
        return with_bonuses(group, members, [self.beta * each for each in z])

    async def scores(self, problem: Problem, member: Trajectory, ctx: Context) -> Tensor:
        """Score of the step of each token, float32 [T]; NaN on others' tokens and without a score."""
        steps, number = number_steps(member, ctx.renderer, self.step_end)
        found = await Ask(self.judge, JudgeQuestion(problem, steps, self.step_end))
        ctx.counts["prorag/judged"] += found is not None
        ctx.counts["prorag/not_judged"] += found is None
        values = []
        for step, score in zip(steps, found or [None] * len(steps), strict=True):
            valid = self.step_form is None or re.search(self.step_form, step) is not None
            ctx.counts["prorag/invalid_steps"] += not valid
            ctx.counts["prorag/unscored_steps"] += score is None
            values.append(
                math.nan if score is None else score + (self.valid_bonus if valid else self.invalid_bonus)
            )
        return torch.where(own(member), torch.tensor(values)[number], math.nan)
