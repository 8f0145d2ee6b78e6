"""Base class of methods that put answers of a later checkpoint into hard groups."""

from __future__ import annotations

from math import isnan
from statistics import fmean
from typing import Literal, TypeVar

import torch
from pydantic import Field

from handrail.data.answers import Answer
from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.requests import Verify
from handrail.types.trajectory import Author, Group, Trajectory


class ReplaySettings(GrpoSettings):
    threshold: float = Field(0.6, ge=0, le=1)
    """τ: a cached answer joins a group in which at most this share of the rollouts is right."""
    slot: Literal["last", "wrong"] = "last"
    """Rollout to replace: the last one, right or wrong, or the last wrong one."""
    ratio_from: Literal["cache", "policy"] = "cache"
    """Denominator of the answer's importance ratio: its probability in the cache, or the policy's own, which
    makes the ratio 1."""


S = TypeVar("S", bound=ReplaySettings)


class Replaying(Method[S]):
    """A method whose ``answers`` (problem id -> answers) replace a rollout of hard groups. Its counts begin
    with its name."""

    answers: dict[str, list[Answer]]

    async def guide(self, group: Group, ctx: Context) -> Group:
        known = [member for member in group.rollouts if member.correct is not None]
        if not known or fmean(bool(member.correct) for member in known) > self.settings.threshold:
            return group
        ctx.counts[f"{self.name}/hard"] += 1
        answers = self.answers.get(group.problem.id, [])
        ctx.counts[f"{self.name}/no_answer"] += not answers
        last = self.settings.slot == "last"
        slots = group.rollouts if last else [member for member in known if not member.correct]
        # In a random order; one that the verifier no longer accepts gives way to the next.
        for cached in ctx.rng.sample(answers, len(answers)) if slots else []:
            answer = await Verify(group.problem, self.replayed(cached, group, ctx))
            ctx.counts[f"{self.name}/{'replayed' if answer.correct else 'rejected'}"] += 1
            if answer.correct:
                (rewarded,) = await self.reward_additions(group, [answer], ctx)
                ctx.counts[f"{self.name}/unknown_logp"] += any(map(isnan, cached.logp))
                return group.swap(slots[-1], rewarded)
        return group

    def replayed(self, answer: Answer, group: Group, ctx: Context) -> Trajectory:
        """The answer as an ungraded trajectory."""
        prompt, text = ctx.renderer.prompt(group.problem), ctx.renderer.text(answer.tokens)
        replay = Trajectory.by(Author.REPLAY, prompt, answer.tokens, text)
        logp = torch.tensor(answer.logp)
        known = logp if self.settings.ratio_from == "cache" else torch.full_like(logp, torch.nan)
        return replay.with_columns(sampling_logp=known, old_logp=known)
