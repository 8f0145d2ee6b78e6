from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.types.trajectory import Group, Trajectory


class Overlong(Term):
    """DAPO's soft penalty for overlong completions: the reward falls over the last tokens before the limit.

    With n tokens of at most L = ``rollout.max_tokens``, and a buffer of B, the reward becomes
    R + penalty · max(−1, min(0, (L − B − n)/B)) (arXiv 2503.14476, eq. 13); a completion that is cut off
    loses the whole penalty. References lose nothing; repairs and replayed answers lose what a rollout of
    their length does, finished or not (our choices).
    """

    source: ClassVar[str] = "arXiv 2503.14476"
    status: ClassVar[Status] = "published"

    buffer: int | None = Field(None, ge=1)
    """Number of tokens before the limit over which the reward falls; by default a fifth of
    ``rollout.max_tokens``, as in the paper (4,096 of 20,480)."""
    penalty: float = Field(1.0, ge=0)
    """What a completion of ``rollout.max_tokens``, or a longer one, loses."""

    async def reward(self, group: Group, ctx: Context) -> Group:
        buffer = self.buffer or max(1, ctx.max_tokens // 5)

        def penalized(member: Trajectory) -> Trajectory:
            over = max(-1.0, min(0.0, (ctx.max_tokens - buffer - len(member)) / buffer))
            if not over or member.is_reference:
                return member
            ctx.counts["overlong/penalized"] += 1
            return replace(member, reward=member.reward + self.penalty * over)

        return group.map(penalized)
