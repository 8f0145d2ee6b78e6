from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from handrail._util.rounding import round_up
from handrail.methods import losses
from handrail.methods.base import GrpoSettings, Method
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.hints import leading_steps, shortest_that_helps, with_hint
from handrail.types.trajectory import Group


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
    needs_references = True

    async def guide(self, group: Group, ctx: Context) -> Group:
        # A right rollout with a flaw earns nothing under fapo, and must not be replaced.
        if not group.rewards or max(group.rewards) > 0 or any(member.correct for member in group.rollouts):
            return group
        s, problem = self.settings, group.problem
        hints = leading_steps(problem, s.step_end, ctx)
        if not (steps := len(hints) - 1):
            return group
        if s.share is None:
            found = await shortest_that_helps(problem, hints, s.probes, s.probe_rollouts, ctx)
            length = min(found + s.offset, steps)
        else:
            length = round_up(s.share, steps)
        guided = await with_hint(problem, hints[length], self.group_size, ctx)
        ctx.counts["actguide/guided"] += 1
        ctx.counts["actguide/steps_shown"] += length
        ctx.counts["actguide/still_wrong"] += not any(member.reward > 0 for member in guided)
        return await self.apply_rewards(replace(group, trajectories=guided), ctx)

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        clipped = super().surrogate(logp, batch)
        if not self.settings.gamma:
            return clipped
        r = losses.log_ratio(logp, batch, "token").exp()
        scaled = r / r.detach() * batch.advantage * (r / (r + self.settings.gamma)).detach()
        return torch.where(batch["hinted"] > 0, scaled, clipped)
