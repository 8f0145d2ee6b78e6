"""Imitation of the references, alone or beside GRPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from handrail.methods import losses
from handrail.methods.base import GrpoSettings, Method, MethodSettings
from handrail.methods.context import Tools
from handrail.methods.losses import Streams
from handrail.methods.normalizers import Counts
from handrail.types import Group, Problem, Trajectory

Mean = Literal["token", "sequence"]
Divisor = Literal["all", "failed"]


class ImitationSettings(MethodSettings):
    strength: float = Field(1.0, ge=0)
    """λ, the factor of the imitation loss."""
    mean: Mean = "token"
    """Weigh all reference tokens alike, or all references."""
    divide_by: Divisor = "failed"
    """Divide the imitation loss by all problems of the update, or only by those that imitate a reference."""


class Imitating(Method):
    """What methods with demonstrations share: adding references, and the normaliser of their weights."""

    @property
    def needs_references(self) -> bool:
        return True

    @property
    def imitation(self) -> ImitationSettings:
        assert isinstance(self.settings, ImitationSettings)
        return self.settings

    def weight_scale(self, demonstration: Trajectory, counts: Counts) -> float:
        settings = self.imitation
        problems = counts.problems if settings.divide_by == "all" else counts.demonstrated
        share = counts.demonstrated / problems
        if settings.mean == "token":
            return settings.strength * share / counts.demonstration_tokens
        return settings.strength * share / (counts.demonstrations * len(demonstration))

    @staticmethod
    def demonstrate(groups: list[Group], tools: Tools, wanted: Callable[[Group], bool] = lambda group: True) -> list[Group]:
        """Adds a reference to the wanted groups that have one; counts those that lack it."""
        out = []
        for group in groups:
            reference = tools.reference(group.problem) if wanted(group) else None
            tools.counts["guide/no_reference"] += wanted(group) and reference is None
            out.append(replace(group, demonstrations=[reference]) if reference else group)
        return out

    @staticmethod
    def weigh(groups: list[Group], weights: Callable[[Trajectory], list[float]]) -> list[Group]:
        """Gives every demonstration its weights."""
        return [
            replace(group, demonstrations=[replace(member, weight=weights(member)) for member in group.demonstrations]) for group in groups
        ]


def uniform(trajectory: Trajectory) -> list[float]:
    return [1.0] * len(trajectory)


class Sft(Imitating):
    """Supervised fine-tuning on the references.

    rollout: nothing is sampled.
    guide: the reference of every problem becomes a demonstration.
    credit: weight 1 on every reference token.
    surrogate: log π.
    """

    name = "sft"
    source = "the standard baseline"
    status = "published"
    Settings = ImitationSettings
    smallest_group = 1

    def rollout(self, problems: Sequence[Problem], tools: Tools) -> list[Group]:
        return [Group(problem) for problem in problems]

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        return self.demonstrate(groups, tools)

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        return self.weigh(groups, uniform)

    def surrogate(self, logp: Tensor, streams: Streams) -> Tensor:
        return losses.imitation(logp, streams)


class Dft(Sft):
    """Dynamic fine-tuning: SFT with every token weighted by its probability, so that unlikely tokens do not dominate.

    rollout: nothing is sampled.
    guide: the reference of every problem becomes a demonstration.
    credit: weight sg π(y_t) on every reference token.
    surrogate: log π.
    """

    name = "dft"
    source = "arXiv 2508.05629"

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        members = [member for group in groups for member in group.demonstrations]
        scores = iter(tools.policy.score([member.prompt for member in members], [member.completion for member in members]))
        return self.weigh(groups, lambda member: next(scores).exp().tolist())


class SftOnFailures(Sft):
    """SFT on failed prompts only.

    rollout: G samples of each problem, which only decide who has failed.
    guide: the reference of an all-wrong group becomes a demonstration.
    credit: weight 1 on every reference token, nothing on the rollouts.
    surrogate: log π.
    """

    name = "sft-on-failures"

    def rollout(self, problems: Sequence[Problem], tools: Tools) -> list[Group]:
        return Method.rollout(self, problems, tools)

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        return self.demonstrate(groups, tools, lambda group: group.all_wrong)


class GrpoSftSettings(GrpoSettings, ImitationSettings):
    mean: Mean = "sequence"
    """Weigh all reference tokens alike, or all references."""
    divide_by: Divisor = "all"
    """Divide the imitation loss by all problems of the update, so that it fades as failures become rare, or
    only by those that imitate a reference."""


class GrpoSft(Imitating):
    """GRPO with an SFT loss beside it in every group.

    rollout: G samples of each problem.
    guide: the reference becomes a demonstration; it takes no part in the group's mean.
    credit: GRPO's for the rollouts, weight 1 (times strength λ) on every reference token.
    surrogate: GRPO's, plus log π on the reference.
    """

    name = "grpo+sft"
    source = "baseline of arXiv 2504.14945 (RL w/ SFT loss)"
    status = "published"
    Settings = GrpoSftSettings

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        return self.demonstrate(groups, tools)

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        return super().credit(self.weigh(groups, uniform), tools)
