from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from handrail.experts.correctors import Correction, Draft
from handrail.experts.judges import first_error
from handrail.experts.judges.reference import aligned
from handrail.experts.planners import names_answer
from handrail.experts.questions import CorrectionQuestion, JudgeQuestion
from handrail.experts.registry import Role
from handrail.experts.steps import split_steps
from handrail.methods import losses
from handrail.methods.base import GrpoSettings, LossNormalizer, Method
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.graft import graft
from handrail.methods.losses import Shape
from handrail.methods.requests import Ask, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory


class ScopeSettings(GrpoSettings):
    normalise_std: bool = False
    """Divide the advantage by the standard deviation of the repaired group's rewards + 1e-4."""
    clip_high: float = Field(0.28, ge=0)
    """Upper bound of the clipped ratio of the policy's own tokens: 1 + clip_high; a corrector's tokens are
    never clipped."""
    loss_normalizer: LossNormalizer = "token"
    """How token losses are averaged, as for grpo."""
    judge: str = "arithmetic"
    """Judge that finds the first wrong step: ``arithmetic`` checks the arithmetic, ``reference`` compares
    with the reference's results, ``prm`` is the model ``experts.prm``, ``llm`` asks the endpoint, or
    ``file.py:Name``; ``random`` is an ablation."""
    corrector: str = "reference"
    """Corrector that repairs it: ``reference`` takes the reference's step, ``policy`` is the policy with the
    reference in its prompt, ``model`` is ``experts.teacher``, ``endpoint`` asks the endpoint, or
    ``file.py:Name``."""
    mode: Literal["step", "suffix", "reference"] = "step"
    """``step``: the corrector writes one step and the policy goes on; ``suffix``: the corrector writes to the
    end; ``reference``: the corrector sees the reference, writes one step, and may not give the answer
    away."""
    threshold: float = Field(0.5, gt=0, le=1)
    """τ: the first step with a lower score is the first wrong step."""
    min_correct_prefix: float = Field(0.3, ge=0, lt=1)
    """ρ: a rollout is repaired only if at least this share of its steps comes before the first wrong one."""
    repairs: int = Field(1, ge=1)
    """M: number of rollouts of a group to repair, those with the largest share of right steps first."""
    max_attempts: int = Field(4, ge=1)
    """N: number of attempts at a repair, until the verifier accepts one."""
    step_tokens: int = Field(256, ge=1)
    """Longest step of a corrector, in tokens."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default steps end at blank lines, or else at lines,
    semicolons or sentences."""
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


@dataclass(frozen=True)
class Attempt:
    """A failed rollout whose steps before the first wrong one, a ``share`` of all, are kept."""

    rollout: Trajectory
    draft: Draft
    share: float


class Scope(Method[ScopeSettings]):
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
        s = self.settings
        return "reference" in (s.judge, s.mode) or s.corrector in ("reference", "policy")

    @property
    def experts(self) -> Mapping[Role, str]:
        s = self.settings
        return {"corrector": s.corrector, **({} if s.judge == "random" else {"judge": s.judge})}

    async def guide(self, group: Group, ctx: Context) -> Group:
        failed = [member for member in group.rollouts if member.correct is False]
        whole = [member for member in failed if member.finished]
        ctx.counts["scope/failed"] += len(failed)
        ctx.counts["scope/truncated"] += len(failed) - len(whole)
        judged = await gather(*(self.judged(group.problem, rollout, ctx) for rollout in whole))
        for before, after in zip(whole, judged, strict=True):
            group = group.swap(before, after)
        chosen = self.chosen([self.attempt(group.problem, rollout, ctx) for rollout in judged], ctx)
        repaired = await gather(*(self.repair(attempt, ctx) for attempt in chosen))
        for attempt, solution in zip(chosen, repaired, strict=True):
            if solution is not None:
                append = self.settings.placing == "append"
                group = group.add(solution) if append else group.swap(attempt.rollout, solution)
        return group

    async def judged(self, problem: Problem, rollout: Trajectory, ctx: Context) -> Trajectory:
        """The rollout with the score of each of its steps, if the judge gives any."""
        s, steps = self.settings, split_steps(rollout.text, self.settings.step_end)
        if s.judge == "random":
            wrong = ctx.rng.randrange(1, len(steps)) if len(steps) > 1 else len(steps)
            scores = [1.0] * wrong + [0.0] * (len(steps) - wrong)
        else:
            scores = await Ask(s.judge, JudgeQuestion(problem, steps, s.step_end))
        ctx.counts["scope/not_judged"] += scores is None
        return rollout if scores is None else replace(rollout, judged=list(zip(steps, scores, strict=True)))

    def attempt(self, problem: Problem, rollout: Trajectory, ctx: Context) -> Attempt | None:
        """The rollout cut before its first wrong step; None if none was found."""
        steps = rollout.judged or []
        wrong = first_error([score for _, score in steps], self.settings.threshold)
        ctx.counts["scope/no_error_found"] += wrong is None and rollout.judged is not None
        if wrong is None:
            return None
        kept, end = [step for step, _ in steps[:wrong]], self.settings.step_end
        closest = max(
            problem.references, key=lambda text: aligned(kept, split_steps(text, end)), default=None
        )
        return Attempt(rollout, Draft(problem, kept, closest), wrong / len(steps))

    def chosen(self, attempts: list[Attempt | None], ctx: Context) -> list[Attempt]:
        """The M attempts that were right for longest."""
        s, able = self.settings, []
        for attempt in filter(None, attempts):
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
        draft, kept = attempt.draft, "".join(attempt.draft.kept)
        for number in range(self.settings.max_attempts):
            correction = await self.correction(draft, number, ctx)
            if correction is None:
                continue
            solution = await graft(attempt.rollout, kept, correction, draft.problem, ctx)
            ctx.counts["scope/too_long"] += solution is None
            if solution is not None and solution.correct:
                ctx.counts["scope/repaired" if kept else "scope/replaced"] += 1
                return replace(solution, judged=(attempt.rollout.judged or [])[: len(draft.kept)])
        ctx.counts["scope/repair_failed"] += 1
        return None

    async def correction(self, draft: Draft, number: int, ctx: Context) -> Correction | None:
        """What follows the kept steps; the whole reference if nothing is kept."""
        s, shown = self.settings, self.settings.mode == "reference"
        name, whole = (s.corrector, s.mode == "suffix") if draft.kept else ("reference", True)
        question = CorrectionQuestion(draft, whole, number, shown, s.step_tokens, s.step_end)
        correction: Correction | None = await Ask(name, question)
        ctx.counts["scope/no_correction"] += correction is None
        if correction and shown and draft.kept and names_answer(correction.text, draft.problem):
            ctx.counts["scope/leaking_step"] += 1
            return None
        return correction

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        def shaped(logp: Tensor, batch: TokenBatch) -> Tensor:
            return losses.shaped(logp, batch, self.settings.shaping, self.settings.gamma)

        foreign = dict.fromkeys((Author.REFERENCE, Author.TEACHER, Author.REPLAY), shaped)
        mixed = losses.by_author({Author.POLICY: self.policy_gradient, **foreign})
        return mixed(logp, batch) + losses.imitation(logp, batch)
