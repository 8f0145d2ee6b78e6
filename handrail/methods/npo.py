from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field

from handrail._util.errors import UserError
from handrail.data.answers import Answer, read_answers
from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.requests import Verify
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory


class NpoSettings(GrpoSettings):
    cache: str
    """File of answers that ``handrail harvest`` sampled from a later checkpoint of the same model."""
    threshold: float = Field(0.6, ge=0, le=1)
    """τ: a cached answer joins a group in which at most this share of the rollouts is right."""
    slot: Literal["last", "wrong"] = "last"
    """Rollout to replace: the last one, right or wrong, or the last wrong one."""
    ratio_from: Literal["cache", "policy"] = "cache"
    """Denominator of the answer's importance ratio: its probability in the cache, or the policy's own, which
    makes the ratio 1."""


class Npo(Method[NpoSettings]):
    """NPO: in hard groups, a right answer of a later checkpoint of the same run replaces a rollout.

    rollout: G samples of each problem.
    guide: if at most a share τ of the rollouts is right, a cached answer, if the verifier still accepts it,
        replaces the last rollout.
    credit: GRPO's over the mixed group.
    surrogate: the clipped ratio; that of the answer's tokens is π/q with the later checkpoint's q.

    The formulas come from agreeing notes on the paper; no code was published.
    """

    name, source, status, Settings = "npo", "arXiv 2604.20733", "secondary", NpoSettings

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.answers = read_answers(self.settings.cache, "method.cache")

    def check(self, problems: Sequence[Problem]) -> None:
        super().check(problems)
        if not any(self.answers.get(problem.id) for problem in problems):
            raise UserError(
                f"method.cache: {self.settings.cache} has no answer to any of the training problems; harvest "
                "from the data that the run trains on"
            )

    async def guide(self, group: Group, ctx: Context) -> Group:
        known = [member for member in group.rollouts if member.correct is not None]
        if not known or fmean(bool(member.correct) for member in known) > self.settings.threshold:
            return group
        ctx.counts["npo/hard"] += 1
        answers = self.answers.get(group.problem.id, [])
        wrong = [member for member in known if not member.correct]
        slots = known if self.settings.slot == "last" else wrong
        if not answers or not slots:
            ctx.counts["npo/no_answer"] += not answers
            return group
        answer = await Verify(group.problem, self.replayed(ctx.rng.choice(answers), group, ctx))
        ctx.counts["npo/replayed" if answer.correct else "npo/rejected"] += 1
        return group.swap(slots[-1], answer) if answer.correct else group

    def replayed(self, answer: Answer, group: Group, ctx: Context) -> Trajectory:
        """The answer as an ungraded trajectory."""
        prompt, text = ctx.renderer.prompt(group.problem), ctx.renderer.text(answer.tokens)
        replay = Trajectory.by(Author.REPLAY, prompt, answer.tokens, text)
        logp = torch.tensor(answer.logp)
        known = logp if self.settings.ratio_from == "cache" else torch.full_like(logp, torch.nan)
        return replay.with_columns(sampling_logp=known, old_logp=known)
