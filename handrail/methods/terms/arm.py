from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from handrail._util.rounding import round_up
from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Score, gather
from handrail.types.trajectory import Author, Group, Trajectory


class Arm(Term):
    """ARM (ProGRPO): reduce the advantage of completions that the policy is already confident in.

    A + α·(conf(prompt) − conf(completion)) on the policy's own tokens; conf = exp of the mean log-probability
    of the least likely share of tokens, without gradient. Groups that are all correct or all wrong stay
    unchanged. A prompt of one token has confidence 1. Completions that were sampled with a hint are scored on
    the prompt without it. The prompt's tokens are all of them, those of a chat template too (our choice). The
    paper's base is grpo with clip_high = 0.28, loss_normalizer = "token".
    """

    source: ClassVar[str] = "arXiv 2602.05281"
    status: ClassVar[Status] = "secondary"
    needs_sampling_logp: ClassVar[bool] = True

    alpha: float = Field(0.1, ge=0)
    """Strength α of the shift (not published)."""
    share: float = Field(0.2, gt=0, le=1)
    """Confidence is measured on this share of the tokens, the least likely ones."""

    async def credit(self, group: Group, ctx: Context) -> Group:
        if not group.mixed:
            return group
        prompt = group.rollouts[0].prompt_ids
        asked = 1.0
        if len(prompt) > 1:
            asked = confidence(await Score(prompt[:1], torch.tensor(prompt[1:])), self.share)

        async def shifted(member: Trajectory) -> Trajectory:
            own = member.author == Author.POLICY
            if not member.is_rollout or math.isnan(member.reward) or not own.any():
                return member
            known = member.column("sampling_logp")
            if member.hint is not None:  # sampled with a hint that the prompt does not have
                known = await Score(member.prompt_ids, member.token_ids)
            if known[own].isnan().any():
                ctx.counts["arm/unknown_logp"] += 1
                return member
            ctx.counts["arm/shifted"] += 1
            said = confidence(known[own], self.share)
            return member.with_columns(
                advantage=member.column("advantage") + own * self.alpha * (asked - said)
            )

        return replace(group, trajectories=await gather(*map(shifted, group.trajectories)))


def confidence(logp: Tensor, share: float) -> float:
    """exp of the mean over the lowest ``share`` of log-probabilities [T], at least one of them."""
    return float(logp.sort().values[: max(1, round_up(share, len(logp)))].mean().exp())
