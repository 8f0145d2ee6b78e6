from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import leaky_relu

from handrail.methods.base import GrpoSettings, Method
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.requests import Score
from handrail.types.trajectory import Group, Trajectory


class CalibrlSettings(GrpoSettings):
    normalize_std: bool = False
    """Divide the advantage by the standard deviation of the group's rewards + std_epsilon."""
    dual_clip: float = Field(3.0, ge=0)
    """Least objective of a token with a negative advantage, as a multiple of it; 0 for none."""
    calibration_coef: float = Field(0.1, ge=0)
    """λ, the coefficient of the calibration loss."""
    slope: float = Field(0.5, ge=0, le=1)
    """Slope of the leaky rectifier for tokens that are already on the right side of the reference."""
    positive_above: float = 0.1
    """A rollout with a higher reward should be likelier than the reference, any other less likely."""
    pairing: Literal["position", "sequence_mean"] = "position"
    """Compare a token with the reference's at the same place, as the released code does, or the mean
    log-probabilities of both completions; the paper compares those of whole sequences."""


class CalibRL(Method[CalibrlSettings]):
    """CalibRL: make right rollouts likelier than the reference, and wrong ones less likely.

    rollout: G samples of each problem.
    guide: the reference is scored; it is not trained and enters no statistic.
    credit: R − mean R over the rollouts.
    surrogate: GRPO's with dual clip, minus λ·|A|·leaky(−s·gap); gap = log π − log π(reference), s = 1 for
        right rollouts and −1 for wrong ones. Tokens beyond the reference's end have no such term, and the
        loss is a mean of sequence means (both ours).
    """

    name, source, status, Settings = "calibrl", "arXiv 2602.20197", "published", CalibrlSettings

    @property
    def needs_references(self) -> bool:
        return True

    async def guide(self, group: Group, ctx: Context) -> Group:
        expert = ctx.reference(group.problem)
        if expert is None or not len(expert):
            return group
        logp = await Score(expert.prompt_ids, expert.token_ids)

        def compared(member: Trajectory) -> Trajectory:
            if not member.is_rollout:
                return member
            aligned = torch.full((len(member),), math.nan)
            if self.settings.pairing == "sequence_mean":
                aligned[:] = logp.mean()
            else:
                shared = min(len(logp), len(member))
                aligned[:shared] = logp[:shared]
            ctx.counts["calibrl/compared"] += 1
            side = 1.0 if member.reward > self.settings.positive_above else -1.0
            return member.with_columns(expert_logp=aligned, side=torch.full((len(member),), side))

        return group.map(compared)

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        s, known = self.settings, ~batch["expert_logp"].isnan() & (batch.mask > 0)
        own = logp
        if s.pairing == "sequence_mean":
            own = (logp * batch.mask).sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)
        gap = own - torch.where(known, batch["expert_logp"], 0.0)
        loss = s.calibration_coef * batch.advantage.abs() * leaky_relu(-batch["side"] * gap, s.slope)
        return super().surrogate(logp, batch) - torch.where(known, loss, 0.0)
