"""Scales of trajectories: credit divided by the normalizers of the update, for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from handrail.methods.base import Method
from handrail.methods.batch import Sample
from handrail.methods.normalizers import Normalizers
from handrail.types.trajectory import Group, Trajectory


def scaled(
    method: Method[Any],
    groups: Sequence[Group],
    total: Callable[[list[int]], list[int]] = lambda local: local,
) -> list[Sample]:
    """Scale every trajectory by its normalizers, which also count the trajectories that will be dropped.

    ``total``: see ``Normalizers.of``.
    """
    normalizers = Normalizers.of(groups, total)
    return [
        _sample(method, member, normalizers)
        for group in groups
        for member in group.trajectories
        if member.trained_tokens
    ]


def _sample(method: Method[Any], member: Trajectory, normalizers: Normalizers) -> Sample:
    bonus, kl = (method.entropy_bonus, method.kl) if member.in_baseline else (0.0, 0.0)
    advantage = imitation = 0.0
    if member.column("advantage").any() or bonus or kl:
        advantage = method.advantage_scale(member, normalizers)
    if member.column("imitation_weight").any():
        imitation = method.imitation_scale(member, normalizers)
    return Sample(member, advantage, imitation, 1 / normalizers.problems, bonus * advantage, kl * advantage)
