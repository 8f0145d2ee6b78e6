from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import torch
from pydantic import Field
from torch import Tensor

from handrail._util.rounding import round_up
from handrail.experts.conversations import prompt_text
from handrail.experts.planners import names_answer
from handrail.experts.steps import split_steps
from handrail.methods import losses
from handrail.methods.base import GrpoSettings, Method
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Verify, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory


class ActGuideSettings(GrpoSettings):
    dual_clip: float = Field(3.0, ge=0)
    """Least objective of a token with a negative advantage, as a multiple of it; 0 for none."""
    kl: float = Field(0.001, ge=0)
    """β, the coefficient of the KL divergence from the starting model; as for grpo."""
    probes: int = Field(5, ge=0)
    """P: number of hint lengths to try in the search for the shortest one that helps."""
    probe_rollouts: int = Field(2, ge=1)
    """m: number of rollouts with each of them; a hint helps if one of these is rewarded."""
    offset: int = Field(0, ge=0)
    """Number of steps to show beyond the shortest hint that helps."""
    share: float | None = Field(None, gt=0, le=1)
    """Show this share of the steps, rounded up, instead of searching."""
    gamma: float = Field(0.0, ge=0)
    """γ: instead of clipping the ratio r of the hint's rollouts, scale their advantages by r/(r + γ);
    0 clips."""
    step_end: str | None = None
    """Regular expression for the end of a step; see scope."""


class ActGuide(Method[ActGuideSettings]):
    """ActGuide-RL: if every rollout fails, sample with a hint and train on the prompt without it.

    rollout: G samples of each problem.
    guide: in groups with neither a right rollout nor a positive reward, a binary search finds the fewest
        leading steps of the reference that help when the prompt shows them; G rollouts with this hint replace
        the group.
    credit: GRPO's.
    surrogate: the clipped ratio, with dual clip; that of the hint's rollouts is π(plain prompt)/π_old(hint).

    Our choice: the hint is leading steps of a worked solution instead of an agent's actions.
    """

    name, source, status, Settings = "actguide", "arXiv 2605.12004", "published", ActGuideSettings
    needs_sampling_logp = True

    @property
    def needs_references(self) -> bool:
        return True

    async def guide(self, group: Group, ctx: Context) -> Group:
        # A right rollout with a flaw earns nothing under fapo, and must not be replaced.
        if not group.rewards or max(group.rewards) > 0 or any(member.correct for member in group.rollouts):
            return group
        hints = self.hints(group.problem, ctx)
        steps = len(hints) - 1
        if not steps:
            return group
        share = self.settings.share
        length = await self.shortest(group.problem, hints, ctx) if share is None else round_up(share, steps)
        guided = await self.sample(group.problem, hints[length], self.group_size, ctx)
        ctx.counts["actguide/guided"] += 1
        ctx.counts["actguide/steps_shown"] += length
        ctx.counts["actguide/still_wrong"] += not any(member.reward > 0 for member in guided)
        return await self.apply_rewards(replace(group, trajectories=guided), ctx)

    def hints(self, problem: Problem, ctx: Context) -> list[str | None]:
        """Hints of 0, 1, ... leading steps of a reference that do not give the answer away and leave room."""
        reference = ctx.reference(problem)
        steps = split_steps(reference.text, self.settings.step_end) if reference else []
        while steps and names_answer(steps[-1], problem):
            steps.pop()
        # In other steps, an answer that the problem itself names is a number like any other.
        if not names_answer(prompt_text(problem), problem):
            silent = list(takewhile(lambda step: not names_answer(step, problem), steps))
            ctx.counts["actguide/leaking_step"] += len(silent) < len(steps)
            steps = silent
        hints = [None, *("".join(steps[:length]).rstrip() for length in range(1, len(steps) + 1))]
        room = None if ctx.longest is None else ctx.longest - ctx.max_tokens
        while len(hints) > 1 and room is not None and len(ctx.renderer.prompt(problem, hints[-1])) > room:
            hints.pop()
        ctx.counts["actguide/no_hint"] += len(hints) == 1
        return hints

    async def shortest(self, problem: Problem, hints: list[str | None], ctx: Context) -> int:
        """Fewest steps that help, if the probes suffice to find it; the most steps are never tried."""
        low, high = 0, len(hints) - 1
        for _ in range(self.settings.probes):
            if low < high:
                middle = (low + high) // 2
                tried = await self.sample(problem, hints[middle], self.settings.probe_rollouts, ctx)
                helps = any(member.reward > 0 for member in tried)
                low, high = (low, middle) if helps else (middle + 1, high)
        ctx.counts["actguide/search_unfinished"] += low < high
        return min(low + self.settings.offset, len(hints) - 1)

    async def sample(self, problem: Problem, hint: str | None, n: int, ctx: Context) -> list[Trajectory]:
        """Graded rollouts with the hint, as trajectories of the plain prompt; ``old_logp`` saw the hint."""
        completions = await Generate(ctx.renderer.prompt(problem, hint), n)
        moved = [
            replace(each, prompt_ids=ctx.renderer.prompt(problem), hint=hint).with_columns(
                old_logp=each.column("sampling_logp"),
                hinted=torch.full((len(each),), float(hint is not None)),
            )
            for each in completions
        ]
        return list(await gather(*(Verify(problem, each) for each in moved)))

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        clipped = super().surrogate(logp, batch)
        if not self.settings.gamma:
            return clipped
        r = losses.log_ratio(logp, batch, "token").exp()
        scaled = r / r.detach() * batch.advantage * (r / (r + self.settings.gamma)).detach()
        return torch.where(batch["hinted"] > 0, scaled, clipped)
