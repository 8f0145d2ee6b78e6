"""What the losses of an update are divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handrail.types.trajectory import Group


@dataclass(frozen=True)
class Normalizers:
    """Totals of one optimizer update, over all its micro-batches and all processes; tokens of the environment are not counted.

    Trajectories that are dropped later for having no credit are counted: dropping must not change the gradient.
    """

    problems: int
    trajectories: int  # in the baseline
    tokens: int  # of those
    imitating: int  # problems with an imitated trajectory
    imitated: int  # trajectories outside the baseline
    imitated_tokens: int

    @classmethod
    def of(
        cls, groups: Sequence[Group], total: Callable[[list[int]], list[int]] = lambda local: local
    ) -> Normalizers:
        """``total`` sums a list of integers over the processes."""
        baseline = [member for group in groups for member in group.baseline]
        imitated = [member for group in groups for member in group.imitated]
        local = [
            len(groups),
            len(baseline),
            sum(member.trained_tokens for member in baseline),
            sum(bool(group.imitated) for group in groups),
            len(imitated),
            sum(member.trained_tokens for member in imitated),
        ]
        return cls(*total(local))
