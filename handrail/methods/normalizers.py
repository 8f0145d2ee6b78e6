"""Loss normalizers of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handrail.types.trajectory import Group


@dataclass(frozen=True)
class Normalizers:
    """Totals over all micro-batches and processes of one optimizer update; environment tokens are not
    counted.

    Trajectories that are later dropped because they have no credit do count: dropping must not change the
    gradient.
    """

    problems: int
    trajectories: int  # in the baseline
    tokens: int  # of trajectories in the baseline
    imitating: int  # problems with an imitated trajectory
    imitated: int  # trajectories outside the baseline
    imitated_tokens: int

    @classmethod
    def of(
        cls, groups: Sequence[Group], total: Callable[[list[int]], list[int]] = lambda local: local
    ) -> Normalizers:
        """Count ``groups``; ``total`` sums a list of integers over all processes."""
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
