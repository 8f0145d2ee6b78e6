"""What a method works with."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from handrail.models import Policy
from handrail.types import Group, Problem, Trajectory
from handrail.verifiers.pool import CUT_OFF, VerifierPool, unreached


@dataclass(frozen=True)
class Tools:
    """The policy, the verifier, randomness that resumes exactly, and named counts for the step's metrics."""

    policy: Policy
    verifier: VerifierPool
    require_end: bool = True
    rng: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)
    unverified: dict[str, str] = field(default_factory=dict)
    """Reason -> the first completion without a verdict for that reason, in one line."""

    def reference(self, problem: Problem) -> Trajectory | None:
        """One of the problem's references as a completion of its prompt, ungraded; None if it has none."""
        if not problem.references:
            return None
        tokens = self.policy.encode_reference(problem, self.rng.choice(problem.references))
        return Trajectory.reference(self.policy.encode_prompt(problem), tokens, self.policy.decode(tokens))

    def grade(self, pairs: Sequence[tuple[Problem, Trajectory]]) -> list[Trajectory]:
        """The trajectories with the verifier's reward and verdict. One that was cut off is wrong if ``require_end``, and earns nothing."""
        complete = [member.finished or not self.require_end for _, member in pairs]
        asked = [pair for pair, ok in zip(pairs, complete, strict=True) if ok]
        verdicts = self.verifier.grade([(problem, member.text) for problem, member in asked])
        for (problem, _), verdict in zip(asked, verdicts, strict=True):
            if verdict.correct is None:
                self.counts.update(["verifier/unverified", f"verifier/{verdict.status}"])
                self.unverified.setdefault(verdict.status, unreached(problem, verdict))
        reached = iter(verdicts)
        graded = [next(reached) if ok else CUT_OFF for ok in complete]
        return [replace(member, reward=verdict.reward, correct=verdict.correct) for (_, member), verdict in zip(pairs, graded, strict=True)]

    def grade_references(self, pairs: Sequence[tuple[Problem, Trajectory]]) -> list[Trajectory]:
        """``grade``, with a count of the references that are wrong and of those without a verdict."""
        graded = self.grade(pairs)
        self.counts["guide/reference_rejected"] += sum(reference.correct is False for reference in graded)
        self.counts["guide/reference_unverified"] += sum(reference.correct is None for reference in graded)
        return graded

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with every trajectory graded."""
        graded = iter(self.grade([(group.problem, member) for group in groups for member in group.trajectories]))
        return [replace(group, trajectories=[next(graded) for _ in group.trajectories]) for group in groups]
