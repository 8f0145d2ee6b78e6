from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from handrail.methods import losses
from handrail.methods.base import LossNormalizer
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.graft import complete, splice
from handrail.methods.losses import Shape
from handrail.methods.repairing import Attempt, Repairing, RepairSettings
from handrail.methods.requests import gather
from handrail.types.trajectory import Author, Group, Trajectory


class ScopeSettings(RepairSettings):
    normalize_std: bool = False
    """Divide the advantage by the standard deviation of the repaired group's rewards + std_epsilon."""
    clip_high: float = Field(0.28, ge=0)
    """Upper bound of the clipped ratio of the policy's own tokens: 1 + clip_high; a corrector's tokens are
    never clipped."""
    loss_normalizer: LossNormalizer = "token"
    """How token losses are averaged, as for grpo."""
    mode: Literal["step", "suffix", "reference"] = "step"
    """``step``: the corrector writes one step and the policy goes on; ``suffix``: the corrector writes to the
    end; ``reference``: the corrector sees the reference, writes one step, and may not give the answer
    away."""
    min_correct_prefix: float = Field(0.3, ge=0, lt=1)
    """ρ: a rollout is repaired only if at least this share of its steps comes before the first wrong one."""
    repairs: int = Field(1, ge=1)
    """M: number of rollouts of a group to repair, those with the largest share of right steps first."""
    max_attempts: int = Field(4, ge=1)
    """N: number of attempts at a repair, until the verifier accepts one."""
    no_prefix: Literal["skip", "reference"] = "skip"
    """What to do with a rollout whose very first step is wrong: leave it as it is, or replace it by the whole
    reference."""
    placing: Literal["replace", "append"] = "replace"
    """Replace the failed rollout by the repaired one, or append it, so that a group with a single failure
    keeps its signal."""
    shaping: Shape = "p/(p+c)"
    """Shaping function f of the probability p of a corrector's token; ``p`` means no shaping."""
    gamma: float = Field(0.1, gt=0)
    """Constant of f: c in p/(p+c), the exponent e in p^e; the other functions have none."""


class Scope(Repairing[ScopeSettings]):
    """SCOPE-style: failed rollouts are repaired from their first wrong step and kept if the verifier accepts.

    rollout: G samples of each problem.
    guide: a step judge finds the first wrong step of the failed rollouts; of the M with the largest share of
        right steps, at least ρ, a corrector replaces that step and the policy goes on, up to N times, until
        the verifier accepts one; it takes the failed rollout's place.
    credit: R − mean R over the repaired group, without the standard deviation.
    surrogate: f(π)·A on the corrector's tokens, f(p) = p/(p + γ); the clipped ratio on the policy's own.

    The idea is from the abstract; the mechanism is our reconstruction.
    """

    name, source, status, Settings = "scope", "arXiv 2602.24110", "reconstruction", ScopeSettings

    @property
    def needs_references(self) -> bool:
        return super().needs_references or self.settings.mode == "reference"

    async def guide(self, group: Group, ctx: Context) -> Group:
        group, attempts = await self.attempts(group, ctx)
        chosen = self.chosen(attempts, ctx)
        found = await gather(*(self.repair(attempt, ctx) for attempt in chosen))
        failed = [attempt.rollout for attempt, each in zip(chosen, found, strict=True) if each is not None]
        repaired = await self.reward_additions(group, [each for each in found if each is not None], ctx)
        if self.settings.placing == "append":
            return group.add(*repaired)
        return group.swap_all(failed, repaired)

    def chosen(self, attempts: list[Attempt], ctx: Context) -> list[Attempt]:
        """The M attempts that were right for longest."""
        s, able = self.settings, []
        for attempt in attempts:
            kind = "partly_right" if attempt.draft.kept else "no_prefix"
            short = bool(attempt.draft.kept) and attempt.share < s.min_correct_prefix
            ctx.counts[f"scope/{kind}"] += 1
            ctx.counts["scope/short_prefix"] += short
            if not short and (attempt.draft.kept or s.no_prefix == "reference"):
                able.append(attempt)
        return sorted(able, key=lambda attempt: -attempt.share)[: s.repairs]

    async def repair(self, attempt: Attempt, ctx: Context) -> Trajectory | None:
        """The first repair that the verifier accepts."""
        ctx.counts["scope/tried"] += 1
        s, draft, kept = self.settings, attempt.draft, "".join(attempt.draft.kept)
        corrector, whole = (s.corrector, s.mode == "suffix") if kept else ("reference", True)
        for number in range(s.max_attempts):
            correction = await self.correction(draft, number, ctx, corrector, whole, s.mode == "reference")
            if correction is None:
                continue
            graded = await complete(splice(attempt.rollout, kept, correction, ctx), draft.problem, ctx)
            ctx.counts["scope/too_long"] += not graded
            for solution in graded:
                if solution.correct:
                    ctx.counts["scope/repaired" if kept else "scope/replaced"] += 1
                    return replace(solution, judged=(attempt.rollout.judged or [])[: len(draft.kept)])
        ctx.counts["scope/repair_failed"] += 1
        return None

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        def shaped(logp: Tensor, batch: TokenBatch) -> Tensor:
            return losses.shaped(logp, batch, self.settings.shaping, self.settings.gamma)

        foreign = dict.fromkeys((Author.REFERENCE, Author.TEACHER, Author.REPLAY), shaped)
        mixed = losses.by_author({Author.POLICY: self.policy_gradient, **foreign})
        return mixed(logp, batch) + losses.imitation(logp, batch)
