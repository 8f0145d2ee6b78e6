"""What a method has at hand without waiting."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


@dataclass(frozen=True)
class Context:
    """Text and tokens, the number of the step, randomness that resumes exactly, and named counts for the step's metrics.

    ``max_tokens`` is the longest completion (``rollout.max_tokens``); ``longest`` the longest sequence that the model reads, None if it
    does not say.
    """

    renderer: Renderer
    max_tokens: int
    longest: int | None = None
    step: int = 0
    rng: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)

    def reference(self, problem: Problem) -> Trajectory | None:
        """One of the problem's references as a completion of its prompt, ungraded; None, and counted, if it has none."""
        if not problem.references:
            self.counts["guide/no_reference"] += 1
            return None
        tokens = self.renderer.reference(problem, self.rng.choice(problem.references))
        return Trajectory.by(
            Author.REFERENCE, self.renderer.prompt(problem), tokens, self.renderer.text(tokens)
        )
