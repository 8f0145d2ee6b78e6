"""What a method is: four verbs. This base class holds GRPO's version of each; a paper overrides those it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from handrail._util.section import Section
from handrail.experts.registry import Experts
from handrail.methods import losses
from handrail.methods.context import Tools
from handrail.methods.losses import Ratio, Streams
from handrail.methods.normalizers import Counts
from handrail.models.config import RolloutConfig
from handrail.types import Group, Problem, Trajectory

Status = Literal["published", "secondary", "reconstruction", "yours"]
Normaliser = Literal["sequence", "token", "constant"]
STD_EPSILON = 1e-4


class MethodSettings(Section):
    """Settings of one method."""

    name: str = ""
    """Name of the method, or ``file.py:Name`` for one of your own."""


class GrpoSettings(MethodSettings):
    normalise_std: bool = True
    """Divide the advantage by the standard deviation of the group's rewards + 1e-4; Dr.GRPO does not."""
    clip: bool = True
    """Clip the importance ratio."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """Lower bound of the clipped ratio: 1 − clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """Upper bound of the clipped ratio: 1 + clip_high; DAPO takes 0.28."""
    ratio: Ratio = "token"
    """One importance ratio per token, or one per sequence (GSPO, with clips near 3e-4 and 4e-4)."""
    normaliser: Normaliser = "sequence"
    """How token losses are averaged: mean of sequence means (GRPO), mean over all tokens of the update
    (DAPO), or divided by the constant ``rollout.max_tokens`` (Dr.GRPO)."""
    skip_dead_groups: bool = False
    """Leave groups without signal out of the average too (DAPO); otherwise they count as zeros."""
    kl: float = Field(0.0, ge=0)
    """β, the coefficient of the KL divergence from the starting model. If it is not 0, that model is kept in
    memory too (with ``[lora]``, the model without its adapter), and no trajectory can be dropped."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Coefficient of the tokens' entropy in the objective; if it is not 0, no trajectory can be dropped."""


class Method:
    """rollout: G samples of each problem. guide: nothing. credit: (R − mean)/(std + 1e-4). surrogate: min(rA, clip(r)A)."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = "your own"
    status: ClassVar[Status] = "yours"
    Settings: ClassVar[type[MethodSettings]] = GrpoSettings
    smallest_group: ClassVar[int] = 2
    """Least ``rollout.group_size``: the only rollout of its group has none to be compared with, so its advantage is always 0."""

    def __init__(self, settings: MethodSettings | None = None, rollout: RolloutConfig | None = None) -> None:
        self.settings = settings or self.Settings()
        self.rollout_config = rollout or RolloutConfig()

    @property
    def needs_references(self) -> bool:
        """Whether it cannot do its work where no problem has a reference."""
        return False

    def prepare(self, experts: Experts) -> None:
        """Takes the experts it will ask, once, before anything is sampled or written. Raises UserError where one cannot be had."""

    def rollout(self, problems: Sequence[Problem], tools: Tools) -> list[Group]:
        """What is sampled: one group a problem, not graded yet."""
        return self.sample(problems, tools, self.rollout_config.group_size)

    def guide(self, groups: list[Group], tools: Tools) -> list[Group]:
        """What is added to graded groups, or replaced, or repaired."""
        return groups

    def credit(self, groups: list[Group], tools: Tools) -> list[Group]:
        """The advantage, or imitation weight, of every token. Called before every optimiser update with its groups.

        Groups that are left out do not count in the normalisers.
        """
        settings = self.grpo
        groups = [self.advantages(group) for group in groups]
        return [group for group in groups if group.has_signal] if settings.skip_dead_groups else groups

    def surrogate(self, logp: Tensor, streams: Streams) -> Tensor:
        """The objective of every token [B, T] from the current log-probabilities [B, T]; its sum is maximised."""
        return self.policy_gradient(logp, streams) + losses.imitation(logp, streams)

    # What the verbs are made of

    @property
    def grpo(self) -> GrpoSettings:
        assert isinstance(self.settings, GrpoSettings), f"{type(self).__name__}.Settings must extend GrpoSettings"
        return self.settings

    @staticmethod
    def sample(problems: Sequence[Problem], tools: Tools, n: int) -> list[Group]:
        prompts = [tools.policy.encode_prompt(problem) for problem in problems]
        return [Group(problem, drawn) for problem, drawn in zip(problems, tools.policy.sample(prompts, n), strict=True)]

    def advantages(self, group: Group) -> Group:
        """Equal rewards give exactly zero, by comparison of the rewards and not of a rounded deviation."""
        if group.dead:
            return replace(group, trajectories=[trajectory.credited(0.0) for trajectory in group.trajectories])
        rewards = [trajectory.reward for trajectory in group.trajectories]
        scale = 1 / (stdev(rewards) + STD_EPSILON) if self.grpo.normalise_std else 1.0
        base = mean(rewards)
        return replace(group, trajectories=[t.credited((t.reward - base) * scale) for t in group.trajectories])

    def policy_gradient(self, logp: Tensor, streams: Streams) -> Tensor:
        s = self.grpo
        return losses.policy_gradient(logp, streams, s.ratio, (s.clip_low, s.clip_high) if s.clip else None)

    # Normalisers

    @property
    def entropy_bonus(self) -> float:
        return self.settings.entropy_bonus if isinstance(self.settings, GrpoSettings) else 0.0

    @property
    def kl(self) -> float:
        return self.settings.kl if isinstance(self.settings, GrpoSettings) else 0.0

    def credit_scale(self, trajectory: Trajectory, counts: Counts) -> float:
        """What the advantage of each token of ``trajectory`` is multiplied by."""
        match self.grpo.normaliser:
            case "sequence":
                return 1 / (counts.trajectories * len(trajectory))
            case "token":
                return 1 / counts.tokens
            case "constant":
                return 1 / (counts.trajectories * self.rollout_config.max_tokens)

    def weight_scale(self, demonstration: Trajectory, counts: Counts) -> float:
        """What the weight of each token of ``demonstration`` is multiplied by: a mean over its tokens and all problems."""
        return 1 / (counts.problems * len(demonstration))

    # What outlives a step

    def state(self) -> dict[str, object]:
        """JSON-able state that a checkpoint keeps; it must be the same in every process."""
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        """Takes back what ``state`` gave."""
