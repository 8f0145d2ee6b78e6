"""What the loss of an update is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handrail.types import Group


@dataclass(frozen=True)
class Counts:
    """What normalisers divide by: totals of one optimiser update, over all its micro-batches and all processes.

    Rows dropped later for having no credit are counted: dropping must not change the gradient.
    """

    problems: int
    trajectories: int
    tokens: int
    demonstrated: int  # problems with a demonstration
    demonstrations: int
    demonstration_tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group], total: Callable[[list[int]], list[int]] = lambda local: local) -> Counts:
        """``total`` sums a list of integers over the processes."""
        local = [
            len(groups),
            sum(len(group.trajectories) for group in groups),
            sum(len(member) for group in groups for member in group.trajectories),
            sum(bool(group.demonstrations) for group in groups),
            sum(len(group.demonstrations) for group in groups),
            sum(len(member) for group in groups for member in group.demonstrations),
        ]
        return cls(*total(local))
