from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from handrail.experts.planners import Planner, leaks
from handrail.experts.registry import Experts, PlannerName
from handrail.methods.context import Tools
from handrail.methods.sft import GrpoSftSettings, Imitating, uniform
from handrail.types import Group, Problem


class SortSettings(GrpoSftSettings):
    alpha: float = Field(0.5, ge=0, le=1)
    """α in the weight w = p0^(1−α)·p1^α of a token, with p0 its probability and p1 that with the plan in the
    prompt: 0 ignores the plan (DFT's weight), 1 uses p1 alone."""
    planner: PlannerName = "auto"
    """Source of the plans: ``column``, the data's plan column; ``rule``, the operations in a reference;
    ``auto``, the first of these two that there is; ``outline``, the reference's words without its numbers;
    ``policy``, which writes a new one for every repair; ``endpoint``."""
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


class Sort(Imitating):
    """SORT-style: all-wrong groups get a repair update on the reference, weighted by what a plan helps to predict.

    rollout: G samples of each problem.
    guide: in all-wrong groups, the reference, if the verifier accepts it, becomes a demonstration.
    credit: GRPO's for the rollouts; w_t = sg p0^(1−α)·p1^α on the reference, p1 with the plan in the prompt; a missing
        or leaking plan gives w = p0.
    surrogate: GRPO's, plus w·log π on the reference, a mean over its tokens and all problems of the update, times λ.

    Trigger, the two scorings and the geometric mean are from secondary sources; the rest is our reconstruction.
    """

    name = "sort"
    source = "arXiv 2605.11505"
    status = "reconstruction"
    Settings = SortSettings

    @property
    def sort(self) -> SortSettings:
        assert isinstance(self.settings, SortSettings)
        return self.settings

    planner: Planner

    def prepare(self, experts: Experts) -> None:
        self.planner = experts.planner(self.sort.planner, self.sort.plan_tokens)

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        everywhere = self.sort.repair == "all"
        groups = self.demonstrate(groups, tools, lambda group: everywhere or group.all_wrong)
        groups = self.planned(self.accepted(groups, tools), tools)
        return self.weigh_by_plan(groups, tools) if self.sort.weights_at == "rollout" else groups

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        if self.sort.weights_at == "update":
            groups = self.weigh_by_plan(groups, tools)
        return super().credit(groups, tools)

    @staticmethod
    def accepted(groups: list[Group], tools: Tools) -> list[Group]:
        """Drop references that the verifier does not accept: a repair must not teach a wrong solution."""
        graded = iter(tools.grade_references([(group.problem, member) for group in groups for member in group.demonstrations]))
        members = [[next(graded) for _ in group.demonstrations] for group in groups]
        return [replace(group, demonstrations=[m for m in mine if m.correct]) for group, mine in zip(groups, members, strict=True)]

    def planned(self, groups: list[Group], tools: Tools) -> list[Group]:
        """The groups, those with a repair with the plan that it is weighted by: None where there is none or it gives the answer away."""
        repaired = [index for index, group in enumerate(groups) if group.demonstrations]
        plans = iter(self.plans([(groups[index].problem, groups[index].demonstrations[0].text) for index in repaired], tools))
        return [replace(g, problem=replace(g.problem, plan=next(plans))) if g.demonstrations else g for g in groups]

    def plans(self, pairs: list[tuple[Problem, str]], tools: Tools) -> list[str | None]:
        if self.sort.weights == "uniform":
            return [None] * len(pairs)
        if self.sort.weights == "solution":
            return [reference for _, reference in pairs]
        plans = self.planner.plans(pairs)
        tools.counts["sort/no_plan"] += plans.count(None)
        for index, (problem, _) in enumerate(pairs):
            if (plan := plans[index]) is not None and leaks(plan, problem):
                tools.counts["sort/leaking_plan"] += 1
                plans[index] = None
        if self.sort.weights == "shuffled-plan":
            # Alone in its step, a repair has no other's plan to take.
            return [*plans[1:], *plans[:1]] if len(plans) > 1 else [None] * len(plans)
        return plans

    def weigh_by_plan(self, groups: list[Group], tools: Tools) -> list[Group]:
        if self.sort.weights == "uniform":
            return self.weigh(groups, uniform)
        repaired = [(group.problem, member) for group in groups for member in group.demonstrations]
        completions = [member.completion for _, member in repaired]
        planned = [
            member.prompt if problem.plan is None else tools.policy.encode_prompt(problem, problem.plan) for problem, member in repaired
        ]
        scores = tools.policy.score([*(member.prompt for _, member in repaired), *planned], completions * 2)
        weights = iter([
            self.token_weights(logp0, None if problem.plan is None else logp1, tools)
            for logp0, logp1, (problem, _) in zip(scores[: len(repaired)], scores[len(repaired) :], repaired, strict=True)
        ])  # fmt: skip
        return self.weigh(groups, lambda member: next(weights))

    def token_weights(self, logp0: Tensor, logp1: Tensor | None, tools: Tools) -> list[float]:
        """w of every token from log p0 and log p1 [T]; without a plan w = p0."""
        settings = self.sort
        if logp1 is None:
            weights = logp0.exp()
        else:
            weights = torch.exp((1 - settings.alpha) * logp0 + settings.alpha * logp1)
            if settings.hard_mask:
                weights = weights * (logp1 > logp0)
        if settings.normalise_weights:
            weights = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
        out: list[float] = weights.tolist()
        if settings.weights == "random":
            tools.rng.shuffle(out)
        return out
