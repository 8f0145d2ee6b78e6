from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from handrail.experts.correctors import Correction, Draft, bare
from handrail.experts.questions import JudgeQuestion
from handrail.methods.context import Context
from handrail.methods.graft import complete, splice
from handrail.methods.linearize import linearized
from handrail.methods.repairing import Repairing, RepairSettings
from handrail.methods.requests import Ask, Score, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory


class CsoSettings(RepairSettings):
    threshold: float = Field(0.5, gt=0, le=1)
    """A step is critical if its score is lower (0.5 in the released code, 0.45 in the paper)."""
    good: float = Field(0.6, ge=0, le=1)
    """An alternative must score higher (0.6 in the released code, 0.65 in the paper)."""
    candidates: int = Field(3, ge=1)
    """Number of alternatives to ask the corrector for (2 to 3 in the released code, 5 in the paper)."""
    beta: float = Field(0.5, gt=0)
    """β of the preference loss."""
    preference_coef: float = Field(1.0, ge=0)
    """Coefficient of the preference loss beside GRPO's."""

    @field_validator("judge")
    @classmethod
    def _scores_alternatives(cls, judge: str) -> str:
        if judge == "random":
            raise ValueError('"random" cannot score the alternatives to a step; name another judge')
        return judge


class Cso(Repairing[CsoSettings]):
    """CSO-style: prefer a verified alternative to a critical step of a rollout.

    rollout: G samples of each problem.
    guide: for every step of a failed rollout that scores low, the corrector writes alternatives; the best is
        put in if it scores high and is not the own one, the policy finishes, and if the verifier accepts the
        solution, alternative and own step become a pair.
    credit: GRPO's; and the gradient of the mean of log σ(β·(Δ⁺ − Δ⁻)) over the pairs, with Δ = Σ log π − log
        π_ref over the step's tokens; π_ref is the model before training.
    surrogate: GRPO's, plus w·log π on the steps.

    The paper trains on all pairs at once, without GRPO; here they are found and used in every step.
    """

    name, source, status, Settings = "cso", "arXiv 2602.03412", "published", CsoSettings

    @property
    def models(self) -> frozenset[str]:
        return super().models | {"reference"}

    async def guide(self, group: Group, ctx: Context) -> Group:
        group, _ = await self.attempts(group, ctx)
        critical = [
            (member, place)
            for member in group.trajectories
            if member.correct is False  # a term, such as fapo, may have had right ones judged
            for place, (_, score) in enumerate(member.judged or [])
            if score is not None and score < self.settings.threshold
        ]
        pairs = await gather(*(self.pair(group.problem, *each, ctx) for each in critical))
        ctx.counts["cso/pairs"] += sum(pair is not None for pair in pairs)
        return group.add(*(member for pair in pairs if pair is not None for member in pair))

    async def pair(
        self, problem: Problem, rollout: Trajectory, place: int, ctx: Context
    ) -> tuple[Trajectory, Trajectory] | None:
        """The verified alternative to the step at ``place`` and that step, both with what came before."""
        steps = [step for step, _ in rollout.judged or []]
        kept, own = "".join(steps[:place]), steps[place]
        reference = next(iter(problem.references), None)
        best = await self.best(Draft(problem, steps[:place], reference), own, ctx)
        if best is None:
            return None
        chosen = splice(rollout, kept, best, ctx)
        ctx.counts["cso/tried"] += 1
        if not any(each.correct for each in await complete(chosen, problem, ctx)):
            return None
        rejected = splice(rollout, kept + own, replace(best, text="", complete=False), ctx)
        shared = min(len(chosen), len(rejected))
        same = (chosen.token_ids[:shared] == rejected.token_ids[:shared]).long().cumprod(0).sum()
        return await self.marked(chosen, int(same), 1.0, ctx), await self.marked(
            rejected, int(same), -1.0, ctx
        )

    async def best(self, draft: Draft, own: str, ctx: Context) -> Correction | None:
        """The alternative that scores highest, if it is good enough and not the own step."""
        asked = range(self.settings.candidates)
        written = await gather(
            *(self.correction(draft, number, ctx, self.settings.corrector) for number in asked)
        )
        found = {bare(each.text).strip(): each for each in written if each is not None}
        found.pop(bare(own).strip(), None)
        found.pop("", None)
        questions = [
            JudgeQuestion(draft.problem, [*draft.kept, each.text], self.settings.step_end)
            for each in found.values()
        ]
        scores = await gather(*(Ask(self.settings.judge, question) for question in questions))
        rated = [(score[-1], -place) for place, score in enumerate(scores) if score and score[-1] is not None]
        score, place = max(rated, default=(0.0, 0))
        return list(found.values())[-place] if score > self.settings.good else None

    @staticmethod
    async def marked(member: Trajectory, start: int, side: float, ctx: Context) -> Trajectory:
        """A member of a pair: outside the baseline, with ``side`` on the tokens of its step."""
        ref_logp = await Score(member.prompt_ids, member.token_ids, model="reference")
        step = torch.zeros(len(member))
        step[start:] = side
        shown = ctx.renderer.text(member.tokens)
        return replace(member, in_baseline=False, text=shown).with_columns(pair=step, ref_logp=ref_logp)

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited = await super().credit(group, ctx)
        assert credited is not None
        members = [member for member in credited.imitated if "pair" in member.columns]
        return await linearized(credited, members, self.preference) if members else credited

    def preference(self, members: Sequence[Trajectory], logps: Sequence[Tensor]) -> Tensor:
        """Mean of log σ(β·(Δ⁺ − Δ⁻)) over pairs, which stand next to each other, times the coefficient."""
        gains = torch.stack(
            [
                (member.column("pair") * (logp - member.column("ref_logp"))).sum()
                for member, logp in zip(members, logps, strict=True)
            ]
        )
        margins = gains.view(-1, 2).sum(1)
        return self.settings.preference_coef * logsigmoid(self.settings.beta * margins).mean()
