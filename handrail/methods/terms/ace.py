from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import softplus

from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Score, gather
from handrail.types.trajectory import Author, Group, Trajectory


class Ace(Term):
    """ACE: penalize confident errors more.

    A · (1 + α·softplus(c)) if A < 0; c is the mean of log π − log π_ref over the policy's own tokens, without
    gradient; π_ref is the model before training. Only rollouts change; advantages no longer sum to zero.
    """

    source: ClassVar[str] = "arXiv 2602.21420"
    status: ClassVar[Status] = "secondary"
    refuses: ClassVar[Mapping[str, str]] = {"arm": "both scale advantages by the policy's confidence"}

    alpha: float = Field(1.0, ge=0)
    """Strength α of the penalty (not published)."""

    @property
    def models(self) -> frozenset[str]:
        return frozenset({"reference"})

    async def credit(self, group: Group, ctx: Context) -> Group:
        async def penalize(member: Trajectory) -> Trajectory:
            advantage = member.column("advantage")
            if not member.is_rollout or not (advantage < 0).any():
                return member
            logp = await Score(member.prompt_ids, member.token_ids)
            reference = await Score(member.prompt_ids, member.token_ids, model="reference")
            confidence = (logp - reference)[member.author == Author.POLICY].mean()
            factor = torch.where(advantage < 0, 1 + self.alpha * softplus(confidence), 1.0)
            ctx.counts["ace/penalized"] += 1
            return member.with_columns(advantage=advantage * factor)

        members = await gather(*(penalize(member) for member in group.trajectories))
        return replace(group, trajectories=members)
