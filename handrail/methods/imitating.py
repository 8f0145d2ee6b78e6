"""What methods share that imitate references beside the group: the normalizer of their weights."""

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
    """λ, the factor of the imitation loss."""
    mean: Mean = "token"
    """Weigh all reference tokens alike, or all references."""
    divide_by: Divisor = "failed"
    """Divide the imitation loss by all problems of the update, or only by those that imitate a reference."""


class GrpoSftSettings(GrpoSettings, ImitationSettings):
    mean: Mean = "sequence"
    """Weigh all reference tokens alike, or all references."""
    divide_by: Divisor = "all"
    """Divide the imitation loss by all problems of the update, so that it fades as failures become rare, or
    only by those that imitate a reference."""


S = TypeVar("S", bound=ImitationSettings)


class Imitating(Method[S]):
    """References are imitated beside the group: they enter none of its statistics."""

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
    """Add a reference, with weight 1 on every token, if the problem has one."""
    reference = ctx.reference(group.problem)
    return group if reference is None else group.add(imitated(reference))


def imitated(reference: Trajectory) -> Trajectory:
    """The trajectory outside the baseline, with imitation weight 1 on every token."""
    return replace(reference, in_baseline=False).with_columns(imitation_weight=torch.ones(len(reference)))
