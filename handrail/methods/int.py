from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from handrail.methods.context import Context
from handrail.methods.graft import complete, splice
from handrail.methods.imitating import GrpoSftSettings, Imitating, imitated
from handrail.methods.repairing import Attempt, Repairing, RepairSettings
from handrail.types.trajectory import Group, Trajectory


class IntSettings(RepairSettings, GrpoSftSettings):
    normalize_std: bool = False
    """Divide the advantage by the standard deviation of the group's rewards + std_epsilon."""
    corrector: str = "policy"
    """Corrector that writes the intervention with the reference in view; as for scope."""
    step_tokens: int = Field(200, ge=1)
    """Longest intervention, in tokens; a longer one is dropped, unless it is the reference's own step."""
    continuations: int = Field(32, ge=1)
    """Number of continuations of which at least one must be right, so that an intervention is kept."""


class InT(Repairing[IntSettings], Imitating[IntSettings]):
    """InT-style: imitate one corrected step in place of a rollout's first wrong one.

    rollout: G samples of each problem.
    guide: a step judge finds the first wrong step of a failed rollout, a corrector that sees the reference
        writes another one, and if at least one of 32 continuations from there is right, the right steps and
        the new one, without what followed, are imitated; at most one rollout of a problem.
    credit: R − mean R; weight 1 (times imitation_coef λ) on every token of the demonstration.
    surrogate: GRPO's, plus log π on the demonstration.

    The paper builds the demonstrations first, fine-tunes on them, and then trains with GRPO; here they are
    imitated as they are found. Mechanism from secondary sources, settings of the imitation ours.
    """

    name, source, status, Settings = "int", "arXiv 2601.14209", "secondary", IntSettings

    async def guide(self, group: Group, ctx: Context) -> Group:
        group, attempts = await self.attempts(group, ctx)
        for attempt in attempts:
            demonstration = await self.intervention(attempt, ctx)
            if demonstration is not None:
                ctx.counts["int/kept"] += 1
                return group.add(imitated(demonstration))
        return group

    async def intervention(self, attempt: Attempt, ctx: Context) -> Trajectory | None:
        """The right steps and a corrected one, without an end: the model must learn to go on from there."""
        s, draft = self.settings, attempt.draft
        correction = await self.correction(draft, 0, ctx, s.corrector, shown=True)
        if correction is None:
            return None
        ctx.counts["int/tried"] += 1
        short = splice(attempt.rollout, "".join(draft.kept), replace(correction, complete=False), ctx)
        continued = await complete(short, draft.problem, ctx, s.continuations)
        ctx.counts["int/not_solvable"] += not any(each.correct for each in continued)
        shown = replace(short, text=ctx.renderer.text(short.tokens))
        return shown if any(each.correct for each in continued) else None
