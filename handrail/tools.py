"""What a method works with."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from handrail.policy import Policy
from handrail.problems import Problem
from handrail.trajectory import Group, Trajectory
from handrail.verifier_pool import VerifierPool


@dataclass(frozen=True)
class Tools:
    """The policy, the verifier, randomness that resumes exactly, and named counts for the step's metrics."""

    policy: Policy
    verifier: VerifierPool
    require_end: bool = True
    rng: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)

    def reference(self, problem: Problem) -> Trajectory | None:
        """One of the problem's references as a completion of its prompt, ungraded; None if it has none."""
        if not problem.references:
            return None
        text = self.rng.choice(problem.references)
        return Trajectory.reference(self.policy.encode_prompt(problem), self.policy.encode_completion(text), text)

    def grade(self, pairs: Sequence[tuple[Problem, Trajectory]]) -> list[Trajectory]:
        """The trajectories with the verifier's reward; one that was cut off earns nothing where an end is required."""
        complete = [member.finished or not self.require_end for _, member in pairs]
        verdicts = self.verifier.grade([(problem, member.text) for (problem, member), ok in zip(pairs, complete, strict=True) if ok])
        for verdict in verdicts:
            if verdict.status != "ok":
                self.counts.update(["verifier/unverified", f"verifier/{verdict.status}"])
        rewards = (verdict.reward for verdict in verdicts)
        return [replace(member, reward=next(rewards) if ok else 0.0) for (_, member), ok in zip(pairs, complete, strict=True)]

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with every trajectory graded."""
        graded = iter(self.grade([(group.problem, member) for group in groups for member in group.trajectories]))
        return [replace(group, trajectories=[next(graded) for _ in group.trajectories]) for group in groups]
