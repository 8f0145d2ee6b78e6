"""Correctors write the right step at the point where a failed attempt went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from handrail.experts.judges.reference import aligned
from handrail.experts.steps import split_steps
from handrail.models.policy import Policy, generate_within_context
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


@dataclass(frozen=True)
class Draft:
    """A failed attempt up to its first wrong step.

    ``kept``: the steps before it, with their endings. ``reference``: a worked solution, if there is one.
    """

    problem: Problem
    kept: list[str]
    reference: str | None = None

    @property
    def ending(self) -> str:
        """Step ending of this attempt, without trailing blanks, which belong to the next word's token."""
        return self.kept[-1][len(bare(self.kept[-1])) :].rstrip(" \t") if self.kept else ""


@dataclass(frozen=True)
class Correction:
    """Continuation of the kept steps; ``complete``: True if it finishes the solution."""

    text: str
    complete: bool
    author: Author = Author.TEACHER


class Corrector(Protocol):
    """An expert that continues from correct steps."""

    def correct(
        self, drafts: Sequence[Draft], whole: bool, attempt: int, seeds: Sequence[int]
    ) -> Sequence[Correction | None]:
        """Continue each draft by one step, or up to the end if ``whole``; None if the corrector has no
        answer.

        ``attempt``: number of the attempt at these drafts, from 0; answer each differently if possible.
        ``seeds``: one for each draft, for correctors that sample.
        """
        ...


class ReferenceCorrector:
    """Copy the reference's next step: the one after the last step whose result the kept steps reach."""

    def __init__(self, step_end: str | None = None) -> None:
        self.step_end = step_end

    def correct(
        self, drafts: Sequence[Draft], whole: bool, attempt: int = 0, seeds: Sequence[int] = ()
    ) -> list[Correction | None]:
        return [self._next(draft, whole) for draft in drafts]

    def _next(self, draft: Draft, whole: bool) -> Correction | None:
        if draft.reference is None:
            return None
        steps = split_steps(draft.reference, self.step_end)
        rest = steps[aligned(draft.kept, steps) :]
        if not rest:
            return None
        if whole or len(rest) == 1:
            return Correction("".join(rest), complete=True, author=Author.REFERENCE)
        return Correction(bare(rest[0]) + draft.ending, complete=False, author=Author.REFERENCE)


class PolicyCorrector:
    """Let a policy continue from the kept steps; if ``shown``, with the reference in its prompt, as a plan
    would be.

    It has no answer, and counts that, if its context has no room for one.
    """

    def __init__(
        self,
        policy: Policy,
        shown: bool,
        max_tokens: int,
        step_end: str | None = None,
        counts: Counter[str] | None = None,
    ) -> None:
        self.policy, self.shown, self.max_tokens, self.step_end = policy, shown, max_tokens, step_end
        self.counts = Counter() if counts is None else counts

    def correct(
        self, drafts: Sequence[Draft], whole: bool, attempt: int, seeds: Sequence[int]
    ) -> list[Correction | None]:
        able = [place for place, draft in enumerate(drafts) if draft.reference is not None or not self.shown]
        renderer = self.policy.renderer
        prompts = [
            renderer.prompt(drafts[place].problem, drafts[place].reference if self.shown else None)
            + renderer.completion("".join(drafts[place].kept).rstrip(" \t"), end=False)
            for place in able
        ]
        limit = None if whole else self.max_tokens
        completions = generate_within_context(self.policy, prompts, [seeds[place] for place in able], limit)
        self.counts["corrector/no_room"] += completions.count(None)
        out: list[Correction | None] = [None] * len(drafts)
        for place, completion in zip(able, completions, strict=True):
            if completion is not None:
                out[place] = self._correction(completion, drafts[place], whole)
        return out

    def _correction(self, drawn: Trajectory, draft: Draft, whole: bool) -> Correction | None:
        steps = split_steps(drawn.text, self.step_end)
        if not steps or (len(steps) == 1 or whole) and not drawn.finished:
            return None
        if whole or len(steps) == 1:
            return Correction(drawn.text, complete=True)
        return Correction(bare(steps[0]) + draft.ending, complete=False)


def bare(step: str) -> str:
    """Strip a step's ending."""
    end = len(step)
    # A regular expression would take quadratic time on inner whitespace.
    while end and (step[end - 1].isspace() or step[end - 1] == ";"):
        end -= 1
    return step[:end]
