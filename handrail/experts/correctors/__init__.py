"""Correctors: who writes the right step where a failed attempt went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from handrail.experts.judges.reference import aligned
from handrail.experts.steps import split_steps
from handrail.models import Policy
from handrail.types import Origin, Problem, Trajectory


@dataclass(frozen=True)
class Draft:
    """A failed attempt up to its first wrong step: the ``kept`` steps with what ends each, and a worked solution if there is one."""

    problem: Problem
    kept: list[str]
    reference: str | None = None

    @property
    def ending(self) -> str:
        """What ends a step in this attempt, without blanks behind it: they belong to the next word's token."""
        return self.kept[-1][len(bare(self.kept[-1])) :].rstrip(" \t") if self.kept else ""


@dataclass(frozen=True)
class Correction:
    """What follows the kept steps; ``complete`` if nothing comes after it."""

    text: str
    complete: bool


class Corrector(Protocol):
    """Whoever can go on from right steps. ``origin`` marks the tokens it writes."""

    origin: Origin

    def correct(self, drafts: Sequence[Draft], whole: bool, attempt: int) -> list[Correction | None]:
        """One step for each draft, or with ``whole`` everything to the end; None where it has nothing to say.

        ``attempt`` counts the tries at one draft; whoever can should answer each differently.
        """
        ...


class ReferenceCorrector:
    """Copies the step of the reference that comes next after the last one whose result the kept steps reach."""

    origin = Origin.REFERENCE

    def __init__(self, step_end: str | None = None) -> None:
        self.step_end = step_end

    def correct(self, drafts: Sequence[Draft], whole: bool, attempt: int) -> list[Correction | None]:
        return [self._next(draft, whole) for draft in drafts]

    def _next(self, draft: Draft, whole: bool) -> Correction | None:
        if draft.reference is None:
            return None
        steps = split_steps(draft.reference, self.step_end)
        rest = steps[aligned(draft.kept, steps) :]
        if not rest:
            return None
        if whole or len(rest) == 1:
            return Correction("".join(rest), complete=True)
        return Correction(bare(rest[0]) + draft.ending, complete=False)


class PolicyCorrector:
    """A policy goes on from the kept steps; if ``shown``, with the reference in its prompt in place of a plan."""

    origin = Origin.TEACHER

    def __init__(self, policy: Policy, shown: bool, max_tokens: int, step_end: str | None = None) -> None:
        self.policy, self.shown, self.max_tokens, self.step_end = policy, shown, max_tokens, step_end

    def correct(self, drafts: Sequence[Draft], whole: bool, attempt: int) -> list[Correction | None]:
        able = [draft for draft in drafts if draft.reference is not None or not self.shown]
        prompts = [
            self.policy.encode_prompt(draft.problem, draft.reference if self.shown else None)
            + self.policy.encode_completion("".join(draft.kept).rstrip(" \t"), end=False)
            for draft in able
        ]
        drawn = iter(self.policy.sample(prompts, 1, None if whole else self.max_tokens))
        return [self._correction(next(drawn)[0], draft, whole) if draft in able else None for draft in drafts]

    def _correction(self, drawn: Trajectory, draft: Draft, whole: bool) -> Correction | None:
        steps = split_steps(drawn.text, self.step_end)
        if not steps or (len(steps) == 1 or whole) and not drawn.finished:
            return None
        if whole or len(steps) == 1:
            return Correction(drawn.text, complete=True)
        return Correction(bare(steps[0]) + draft.ending, complete=False)


def bare(step: str) -> str:
    """A step without what ends it."""
    end = len(step)
    while end and (step[end - 1].isspace() or step[end - 1] == ";"):  # a regular expression would be quadratic in inner white space
        end -= 1
    return step[:end]
