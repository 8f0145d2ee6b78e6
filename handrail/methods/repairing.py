"""Base class of methods that repair failed rollouts: judge their steps and correct the first wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import Field

from handrail.experts.config import Role
from handrail.experts.correctors import Correction, Draft, bare
from handrail.experts.judges import first_error
from handrail.experts.judges.reference import aligned
from handrail.experts.planners import names_answer
from handrail.experts.questions import CorrectionQuestion, JudgeQuestion
from handrail.experts.steps import split_steps
from handrail.methods.base import GrpoSettings, Method
from handrail.methods.context import Context
from handrail.methods.requests import Ask, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory


class RepairSettings(GrpoSettings):
    judge: str = "arithmetic"
    """Judge that finds the first wrong step: ``arithmetic`` checks the arithmetic, ``reference`` compares
    with the reference's results, ``prm`` is the model ``experts.prm``, ``llm`` asks the endpoint, or
    ``file.py:Name``; ``random`` is an ablation, which cso does not have."""
    corrector: str = "reference"
    """Corrector that repairs it: ``reference`` takes the reference's step, ``policy`` is the policy with the
    reference in its prompt, ``model`` is ``experts.teacher``, ``endpoint`` asks the endpoint, or
    ``file.py:Name``."""
    threshold: float = Field(0.5, gt=0, le=1)
    """τ: the first step with a lower score is the first wrong step."""
    step_tokens: int = Field(256, ge=1)
    """Longest step of a corrector, in tokens; a longer one is dropped. The reference's own steps have any
    length."""
    step_end: str | None = None
    """Regular expression for the end of a step; by default steps end at blank lines, or else at lines,
    semicolons or sentences."""


@dataclass(frozen=True)
class Attempt:
    """A failed rollout whose steps before the first wrong one, a ``share`` of all, are kept."""

    rollout: Trajectory
    draft: Draft
    share: float


S = TypeVar("S", bound=RepairSettings)


class Repairing(Method[S]):
    """A method that corrects failed rollouts from their first wrong step. Its counts begin with its name."""

    @property
    def needs_references(self) -> bool:
        s = self.settings
        return super().needs_references or s.judge == "reference" or s.corrector in ("reference", "policy")

    @property
    def experts(self) -> Mapping[Role, str]:
        """As for every method; the judge ``random`` is an ablation without an expert."""
        return {role: name for role, name in super().experts.items() if (role, name) != ("judge", "random")}

    async def attempts(self, group: Group, ctx: Context) -> tuple[Group, list[Attempt]]:
        """Judge the failed rollouts; return the group with their scores, and those with a wrong step."""
        failed = [member for member in group.rollouts if member.correct is False]
        whole = [member for member in failed if member.finished]
        ctx.counts[f"{self.name}/failed"] += len(failed)
        ctx.counts[f"{self.name}/truncated"] += len(failed) - len(whole)
        judged = await gather(*(self.judged(group.problem, rollout, ctx) for rollout in whole))
        cut = [self.cut(group.problem, rollout, ctx) for rollout in judged]
        return group.swap_all(whole, judged), [attempt for attempt in cut if attempt is not None]

    async def judged(self, problem: Problem, rollout: Trajectory, ctx: Context) -> Trajectory:
        """The rollout with the score of each of its steps, if the judge gives any."""
        s, steps = self.settings, split_steps(rollout.text, self.settings.step_end)
        if s.judge == "random":
            wrong = ctx.rng.randrange(1, len(steps)) if len(steps) > 1 else len(steps)
            scores = [1.0] * wrong + [0.0] * (len(steps) - wrong)
        else:
            scores = await Ask(s.judge, JudgeQuestion(problem, steps, s.step_end))
        ctx.counts[f"{self.name}/not_judged"] += scores is None
        return rollout if scores is None else replace(rollout, judged=list(zip(steps, scores, strict=True)))

    def cut(self, problem: Problem, rollout: Trajectory, ctx: Context) -> Attempt | None:
        """The rollout cut before its first wrong step; None if none was found."""
        steps, end = rollout.judged or [], self.settings.step_end
        wrong = first_error([score for _, score in steps], self.settings.threshold)
        ctx.counts[f"{self.name}/no_error_found"] += wrong is None and rollout.judged is not None
        if wrong is None:
            return None
        kept = [step for step, _ in steps[:wrong]]
        closest = max(
            problem.references, key=lambda text: aligned(kept, split_steps(text, end)), default=None
        )
        return Attempt(rollout, Draft(problem, kept, closest), wrong / len(steps))

    def low_steps(self, group: Group) -> list[tuple[Trajectory, int]]:
        """Failed trajectories and places of their steps that score below the threshold."""
        return [
            (member, place)
            for member in group.trajectories
            if member.correct is False  # a term, such as fapo, may have had right ones judged
            for place, (_, score) in enumerate(member.judged or [])
            if score is not None and score < self.settings.threshold
        ]

    async def correction(
        self,
        draft: Draft,
        number: int,
        ctx: Context,
        corrector: str,
        whole: bool = False,
        shown: bool = False,
    ) -> Correction | None:
        """The ``number``-th attempt at what follows the kept steps: one step, or the rest if ``whole``.

        ``shown``: True if the corrector sees the reference; a step that then names the answer is dropped. So
        is one of more than ``step_tokens`` tokens, unless it is the reference's own.
        """
        s = self.settings
        question = CorrectionQuestion(draft, whole, number, shown, s.step_tokens, s.step_end)
        correction: Correction | None = await Ask(corrector, question)
        ctx.counts[f"{self.name}/no_correction"] += correction is None
        if correction is None or whole:
            return correction
        if shown and names_answer(correction.text, draft.problem):
            ctx.counts[f"{self.name}/leaking_step"] += 1
            return None
        length = len(ctx.renderer.completion(bare(correction.text), end=False, plain=True))
        too_long = length > s.step_tokens and correction.author is not Author.REFERENCE
        ctx.counts[f"{self.name}/step_too_long"] += too_long
        return None if too_long else correction
