from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from handrail.experts.questions import PlanQuestion
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.imitating import GrpoSftSettings, Imitating, imitated
from handrail.methods.losses import plan_weights
from handrail.methods.requests import Ask, Score
from handrail.types.trajectory import Group


class SortSettings(GrpoSftSettings):
    alpha: float = Field(0.5, ge=0, le=1)
    """α in the weight p0^(1−α)·p1^α of a token; p1 is its probability with the plan in the prompt."""
    planner: str = "auto"
    """Source of the plans: ``column``, the data's; ``rule``, a reference's operations; ``auto``, the first of
    these that exists; ``outline``, its words without numbers; ``policy``; ``endpoint``; ``file.py:Name``."""
    plan_tokens: int = Field(256, ge=1)
    """Longest plan of the policy, in tokens."""
    normalize_weights: bool = False
    """Divide the weights of a reference's tokens by their mean, so that only their ratios matter."""
    hard_mask: bool = False
    """Train only those tokens that the plan makes likelier: p1 > p0."""
    weights_at: Literal["update", "rollout"] = "update"
    """When to score the reference: right before each update, or once, when the groups are sampled."""
    weights: Literal["plan", "uniform", "shuffled-plan", "solution", "random"] = "plan"
    """``plan`` is SORT; ablations: equal, by another problem's plan, by the whole solution, shuffled."""
    repair: Literal["all-wrong", "all"] = "all-wrong"
    """Groups that get the repair update; ``all`` is an ablation."""


class Sort(Imitating[SortSettings]):
    """SORT-style: all-wrong groups learn from the reference, weighted by what a plan helps to predict.

    rollout: G samples of each problem.
    guide: in all-wrong groups, the reference, if the verifier accepts it, is imitated.
    credit: GRPO's for the rollouts; log p1 of the reference, with a plan that gives nothing away.
    surrogate: GRPO's, plus λ·w·log π on the reference; w = sg p0^(1−α)·p1^α, or p0 if there is no plan.

    Trigger, scorings and geometric mean are from secondary sources; the rest is our reconstruction.
    """

    name, source, status, Settings = "sort", "arXiv 2605.11505", "reconstruction", SortSettings

    async def guide(self, group: Group, ctx: Context) -> Group:
        s, repaired = self.settings, group.all_wrong or self.settings.repair == "all"
        reference = await self.verified_reference(group, ctx) if repaired else None
        if reference is None or not reference.correct:  # a repair must not teach a wrong solution
            return group
        question = PlanQuestion(group.problem, reference.text, s.plan_tokens, ablation=s.weights)
        plan = None if s.weights == "uniform" else await Ask(s.planner, question)
        group = group.add(replace(imitated(reference), plan=plan))
        return group if s.weights_at == "update" else await self.scored(group, ctx)

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        scored = await self.scored(group, ctx) if self.settings.weights_at == "update" else group
        return await super().credit(scored, ctx)

    async def scored(self, group: Group, ctx: Context) -> Group:
        """Add what the weights of every reference need: log p1 given a plan, log p0 if it is fixed now."""
        for y in group.imitated:
            columns = {"weight_order": torch.tensor(ctx.rng.sample(range(len(y)), len(y))).float()}
            if self.settings.weights_at == "rollout":
                columns["base_logp"] = await Score(y.prompt_ids, y.token_ids)
            if y.plan is not None:
                columns["plan_logp"] = await Score(ctx.renderer.prompt(group.problem, y.plan), y.token_ids)
            group = group.swap(y, y.with_columns(**columns))
        return group

    def surrogate(self, logp: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        s, base = self.settings, torch.where(batch["base_logp"].isnan(), logp.detach(), batch["base_logp"])
        w = plan_weights(base, batch["plan_logp"], batch.mask, s.alpha, s.hard_mask, s.normalize_weights)
        used = {"uniform": torch.ones_like(w), "random": w.gather(1, batch["weight_order"].long())}
        return self.policy_gradient(logp, batch) + batch.imitation_weight * used.get(s.weights, w) * logp
