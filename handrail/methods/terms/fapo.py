from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from handrail.experts.judges import first_error
from handrail.experts.questions import JudgeQuestion
from handrail.experts.steps import split_steps
from handrail.methods.base import Status, Term
from handrail.methods.context import Context
from handrail.methods.requests import Ask, gather
from handrail.types.trajectory import Group, Trajectory


class Fapo(Term):
    """FAPO: a right answer that was reached by a wrong step earns less.

    R = 1 for a right rollout, 0 for a right one in which a judge finds a wrong step, −1 for a wrong one. Only
    right ones are judged; one that the judge does not answer for counts as right. References are not judged;
    repairs and replayed answers are (our choices). The paper's base is grpo with clip_high = 0.28,
    dual_clip = 10, loss_normalizer = "token", and the term ``overlong`` with a buffer of 4,096 tokens.
    """

    source: ClassVar[str] = "arXiv 2510.22543"
    status: ClassVar[Status] = "published"
    precedes: ClassVar[frozenset[str]] = frozenset({"overlong"})

    judge: str = "arithmetic"
    """Judge that finds a wrong step, as for scope; the paper trains a generative one, ``llm`` here."""
    threshold: float = Field(0.5, gt=0, le=1)
    """A step with a lower score is wrong."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default as for scope."""

    async def reward(self, group: Group, ctx: Context) -> Group:
        async def rewarded(member: Trajectory) -> Trajectory:
            if member.correct is None:  # without a verdict, without a reward
                return member
            if not member.correct or member.is_reference:
                return replace(member, reward=1.0 if member.correct else -1.0)
            steps = split_steps(member.text, self.step_end)
            scores = await Ask(self.judge, JudgeQuestion(group.problem, steps, self.step_end))
            ctx.counts["fapo/judged"] += 1
            ctx.counts["fapo/not_judged"] += scores is None
            if scores is None:
                return replace(member, reward=1.0)
            flawed = first_error(scores, self.threshold) is not None
            ctx.counts["fapo/flawed"] += flawed
            judged = list(zip(steps, scores, strict=True))
            return replace(member, reward=0.0 if flawed else 1.0, judged=judged)

        return replace(group, trajectories=await gather(*map(rewarded, group.trajectories)))
