from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from handrail.experts.questions import PlanQuestion
from handrail.experts.registry import Role
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.imitating import GrpoSftSettings, Imitating, imitated
from handrail.methods.losses import plan_weights
from handrail.methods.requests import Ask, Score
from handrail.types.trajectory import Group


class SortSettings(GrpoSftSettings):
    alpha: float = Field(0.5, ge=0, le=1)
    """α in the weight w = p0^(1−α)·p1^α of a token, with p0 its probability and p1 that with the plan in the
    prompt: 0 ignores the plan (DFT's weight), 1 uses p1 alone."""
    planner: str = "auto"
    """Source of the plans: ``column``, the data's plan column; ``rule``, the operations in a reference;
    ``auto``, the first of these two that there is; ``outline``, the reference's words without its numbers;
    ``policy``, which writes a new one for every repair; ``endpoint``; or ``file.py:Name``."""
    plan_tokens: int = Field(256, ge=1)
    """Longest plan of the policy, in tokens."""
    normalise_weights: bool = False
    """Divide the weights of a reference's tokens by their mean, so that only their ratios matter."""
    hard_mask: bool = False
    """Train only those tokens that the plan makes likelier: p1 > p0."""
    weights_at: Literal["update", "rollout"] = "update"
    """When to score the reference: right before each update, or once, when the groups are sampled."""
    weights: Literal["plan", "uniform", "shuffled-plan", "solution", "random"] = "plan"
    """How tokens are weighted: ``plan`` is SORT; the ablations are equal weights, the plan of another
    problem, the whole solution as plan, and SORT's weights in random order."""
    repair: Literal["all-wrong", "all"] = "all-wrong"
    """Groups that get the repair update; ``all`` is an ablation."""


class Sort(Imitating[SortSettings]):
    """SORT-style: all-wrong groups learn from the reference, weighted by what a plan helps to predict.

    rollout: G samples of each problem.
    guide: in all-wrong groups, the reference, if the verifier accepts it, is imitated.
    credit: GRPO's for the rollouts; log p1 of the reference, with a plan that gives nothing away.
    surrogate: GRPO's, plus λ·w·log π on the reference, a mean over its tokens and all problems of the update;
        w = sg p0^(1−α)·p1^α with the p0 that the loss computes anyway, and w = p0 without a plan.

    Trigger, scorings and geometric mean are from secondary sources; the rest is our reconstruction.
    """

    name, source, status, Settings = "sort", "arXiv 2605.11505", "reconstruction", SortSettings

    @property
    def experts(self) -> Mapping[Role, str]:
        return {"planner": self.settings.planner}

    async def guide(self, group: Group, ctx: Context) -> Group:
        s = self.settings
        reference = (
            await self.verified_reference(group, ctx) if group.all_wrong or s.repair == "all" else None
        )
        if reference is None or not reference.correct:  # a repair must not teach a wrong solution
            return group
        ablation = s.weights if s.weights in ("solution", "shuffled-plan") else ""
        question = PlanQuestion(group.problem, reference.text, s.plan_tokens, ablation)
        plan = None if s.weights == "uniform" else await Ask(s.planner, question)
        repair = replace(imitated(reference), plan=plan)
        if s.weights_at == "update":
            return group.add(repair)
        base_logp = await Score(repair.prompt_ids, repair.token_ids)
        return await self.score_plans(group.add(repair.with_columns(base_logp=base_logp)), ctx)

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        scored = await self.score_plans(group, ctx) if self.settings.weights_at == "update" else group
        return await super().credit(scored, ctx)

    async def score_plans(self, group: Group, ctx: Context) -> Group:
        """Add log p1 of every repair, NaN without a plan, and an order in which to shuffle its weights."""
        for repair in group.imitated:
            logp = torch.full((len(repair),), math.nan)
            if repair.plan is not None:
                logp = await Score(ctx.renderer.prompt(group.problem, repair.plan), repair.token_ids)
            order = torch.tensor(ctx.rng.sample(range(len(repair)), len(repair)), dtype=torch.float32)
            group = group.swap(repair, repair.with_columns(plan_logp=logp, weight_order=order))
        return group

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        s, base = self.settings, logp.detach()
        if s.weights_at == "rollout":
            base = torch.where(batch["base_logp"].isnan(), base, batch["base_logp"])
        weights = plan_weights(
            base, batch["plan_logp"], batch.mask, s.alpha, s.hard_mask, s.normalise_weights
        )
        if s.weights == "random":
            weights = weights.gather(1, batch["weight_order"].long())
        imitation = batch.imitation_weight * (1.0 if s.weights == "uniform" else weights) * logp
        return self.policy_gradient(logp, batch) + imitation
