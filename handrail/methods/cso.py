from __future__ import annotations

from dataclasses import replace

from pydantic import Field, field_validator

from handrail.experts.correctors import Draft
from handrail.methods.context import Context
from handrail.methods.graft import complete, splice
from handrail.methods.preferences import best_alternative, pair, preferring
from handrail.methods.repairing import Repairing, RepairSettings
from handrail.methods.requests import gather
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
    guide: for each step of a failed rollout that scores low, the corrector writes alternatives; if the best
        one scores high and the policy reaches a right answer from it, it and the own step become a pair.
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
        found = await gather(*(self.paired(group.problem, *each, ctx) for each in self.low_steps(group)))
        ctx.counts["cso/pairs"] += sum(map(bool, found))
        return group.add(*(member for pair in found for member in pair))

    async def paired(self, problem: Problem, rollout: Trajectory, at: int, ctx: Context) -> list[Trajectory]:
        """The verified alternative to a step and that step, both with what came before; empty if none is."""
        s, steps = self.settings, [step for step, _ in rollout.judged or []]
        kept, own = "".join(steps[:at]), steps[at]
        draft = Draft(problem, steps[:at], next(iter(problem.references), None))
        corrections = (self.correction(draft, number, ctx, s.corrector) for number in range(s.candidates))
        best, score = await best_alternative(draft, own, await gather(*corrections), s.judge, s.step_end)
        if best is None or score <= s.good:
            return []
        chosen = splice(rollout, kept, best, ctx)
        ctx.counts["cso/tried"] += 1
        if not any(each.correct for each in await complete(chosen, problem, ctx)):
            return []
        rejected = splice(rollout, kept + own, replace(best, text="", complete=False), ctx)
        return await pair(chosen, rejected, ctx)

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited = await super().credit(group, ctx)
        return credited and await preferring(credited, self.settings.beta, self.settings.preference_coef)
