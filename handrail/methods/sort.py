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
from handrail.methods.requests import Ask, Score
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory


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
    """When to score the reference: right before each optimizer update, or once, when the groups are
    sampled."""
    weights: Literal["plan", "uniform", "shuffled-plan", "solution", "random"] = "plan"
    """How tokens are weighted: ``plan`` is SORT; the ablations are equal weights, the plan of another
    problem, the whole solution as plan, and SORT's weights in random order."""
    repair: Literal["all-wrong", "all"] = "all-wrong"
    """Groups that get the repair update; ``all`` is an ablation."""


class Sort(Imitating[SortSettings]):
    """SORT-style: all-wrong groups get a repair update on the reference, weighted by what a plan helps to predict.

    rollout: G samples of each problem.
    guide: in all-wrong groups, the reference, if the verifier accepts it, is imitated.
    credit: GRPO's for the rollouts; log p1 of the reference, with the plan in the prompt, if there is one that gives nothing away.
    surrogate: GRPO's, plus w·log π on the reference, w = sg p0^(1−α)·p1^α with the p0 that the loss computes anyway, or w = p0
        without a plan; a mean over its tokens and all problems of the update, times λ.

    Trigger, the two scorings and the geometric mean are from secondary sources; the rest is our reconstruction.
    """

    name = "sort"
    source = "arXiv 2605.11505"
    status = "reconstruction"
    Settings = SortSettings

    @property
    def experts(self) -> Mapping[Role, str]:
        return {"planner": self.settings.planner}

    async def guide(self, group: Group, ctx: Context) -> Group:
        s = self.settings
        if s.repair != "all" and not group.all_wrong:
            return group
        reference = await self.verified_reference(group, ctx)
        if reference is None or not reference.correct:  # a repair must not teach a wrong solution
            return group
        repair = imitated(reference)
        if s.weights != "uniform":
            ablation = s.weights if s.weights in ("solution", "shuffled-plan") else ""
            question = PlanQuestion(group.problem, reference.text, s.plan_tokens, ablation)
            repair = replace(repair, plan=await Ask(s.planner, question))
        if s.weights_at == "rollout":
            repair = repair.with_columns(base_logp=await Score(repair.prompt_ids, repair.token_ids))
            repair = await self.with_plan_logp(group.problem, repair, ctx)
        return group.add(repair)

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        if self.settings.weights_at == "update":
            members = [await self.with_plan_logp(group.problem, member, ctx) for member in group.trajectories]
            group = replace(group, trajectories=members)
        return await super().credit(group, ctx)

    async def with_plan_logp(self, problem: Problem, repair: Trajectory, ctx: Context) -> Trajectory:
        """The trajectory with log p1 [T] if it is a repair: NaN without a plan. Random weights get their order, too."""
        if repair.in_baseline:
            return repair
        logp = torch.full((len(repair),), math.nan)
        if repair.plan is not None:
            logp = await Score(ctx.renderer.prompt(problem, repair.plan), repair.token_ids)
        order = list(range(len(repair)))
        if self.settings.weights == "random":
            ctx.rng.shuffle(order)
        return repair.with_columns(plan_logp=logp, weight_order=torch.tensor(order, dtype=torch.float32))

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        own = self.policy_gradient(logp, batch)
        if "plan_logp" not in batch.columns:
            return own
        return own + batch.imitation_weight * self.weights(logp.detach(), batch) * logp

    def weights(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        """w [B, T] of every token from its log-probability log p0 and from log p1."""
        s = self.settings
        if s.weights == "uniform":
            return torch.ones_like(logp)
        base = batch["base_logp"] if s.weights_at == "rollout" else logp
        planned = torch.where(batch["plan_logp"].isnan(), base, batch["plan_logp"])
        weights = torch.exp((1 - s.alpha) * base + s.alpha * planned) * batch.mask
        if s.hard_mask:
            weights = weights * ((planned > base) | batch["plan_logp"].isnan())
        if s.normalise_weights:
            mean = weights.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)
            weights = weights / mean.clamp(min=torch.finfo(weights.dtype).tiny)
        return weights.gather(1, batch["weight_order"].long()) if s.weights == "random" else weights
