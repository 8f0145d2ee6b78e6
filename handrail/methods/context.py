"""Context of a verb: everything a method can use without awaiting a request."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from handrail.models.renderer import Renderer
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory


@dataclass(frozen=True)
class Context:
    """Renderer (text ↔ tokens), step number, randomness that resumes exactly, and named counts for the
    metrics.

    ``max_tokens`` is the length limit of a completion (``rollout.max_tokens``); ``longest`` is the model's
    context length, None if unknown.
    """

    renderer: Renderer
    max_tokens: int
    longest: int | None = None
    step: int = 0
    rng: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)

    def reference(self, problem: Problem) -> Trajectory | None:
        """Pick one of the problem's references as an ungraded completion; count and return None if it has
        none."""
        if not problem.references:
            self.counts["guide/no_reference"] += 1
            return None
        tokens = self.renderer.reference(problem, self.rng.choice(problem.references))
        return Trajectory.by(
            Author.REFERENCE, self.renderer.prompt(problem), tokens, self.renderer.text(tokens)
        )
