"""Base class of methods that imitate references outside the group: the normalizer of their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import torch
from pydantic import Field

from handrail.methods.base import GrpoSettings, Method, MethodSettings
from handrail.methods.context import Context
from handrail.methods.normalizers import Normalizers
from handrail.types.trajectory import Group, Trajectory

Mean = Literal["token", "sequence"]
Divisor = Literal["all", "failed"]


class ImitationSettings(MethodSettings):
    imitation_coef: float = Field(1.0, ge=0)
    """λ, the coefficient of the imitation loss."""
    mean: Mean = "token"
    """``token`` weights all reference tokens equally, ``sequence`` all references."""
    divide_by: Divisor = "failed"
    """Divide the imitation loss by the number of all problems of the update, or only of those that imitate a
    reference."""


class GrpoSftSettings(GrpoSettings, ImitationSettings):
    mean: Mean = "sequence"
    """``token`` weights all reference tokens equally, ``sequence`` all references."""
    divide_by: Divisor = "all"
    """Divide the imitation loss by the number of all problems of the update, so that it fades as failures
    become rare, or only of those that imitate a reference."""


S = TypeVar("S", bound=ImitationSettings)


class Imitating(Method[S]):
    """A method that imitates references outside the group's baseline: they enter none of its statistics."""

    @property
    def needs_references(self) -> bool:
        return True

    def imitation_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        problems = normalizers.problems if self.settings.divide_by == "all" else normalizers.imitating
        share = self.settings.imitation_coef * normalizers.imitating / problems
        if self.settings.mean == "token":
            return share / normalizers.imitated_tokens
        return share / (normalizers.imitated * trajectory.trained_tokens)


def imitate(group: Group, ctx: Context) -> Group:
    """Add a reference with imitation weight 1 on every token, if the problem has one."""
    reference = ctx.reference(group.problem)
    return group if reference is None else group.add(imitated(reference))


def imitated(reference: Trajectory) -> Trajectory:
    """Return the trajectory outside the baseline, with imitation weight 1 on every token."""
    return replace(reference, in_baseline=False).with_columns(imitation_weight=torch.ones(len(reference)))
