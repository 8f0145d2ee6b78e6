"""What a method is: five verbs. This base class holds GRPO's version of each; a paper overrides those it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field
from torch import Tensor

from handrail._util.section import Section
from handrail.experts.registry import Role
from handrail.methods import losses
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.losses import Ratio
from handrail.methods.normalizers import Normalizers
from handrail.methods.requests import Verify, gather
from handrail.types.problem import Problem
from handrail.types.trajectory import Group, Trajectory

Status = Literal["published", "secondary", "reconstruction", "yours"]
LossNormalizer = Literal["sequence", "token", "constant"]
STD_EPSILON = 1e-4


class MethodSettings(Section):
    """Settings of one method."""

    name: str = ""
    """Name of the method, or ``file.py:Name`` for one of your own."""
    terms: list[dict[str, Any]] = []
    """Credit terms, applied in order to the method's advantages: ``[{name = "ace", alpha = 1.0}]``, or
    ``file.py:Name`` for one of your own."""


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
    loss_normalizer: LossNormalizer = "sequence"
    """How token losses are averaged: mean of sequence means (GRPO), mean over all tokens of the update
    (DAPO), or divided by the constant ``rollout.max_tokens`` (Dr.GRPO)."""
    skip_dead_groups: bool = False
    """Leave groups without signal out of the average too (DAPO); otherwise they count as zeros."""
    kl: float = Field(0.0, ge=0)
    """β, the coefficient of the KL divergence from the starting model. If it is not 0, that model is kept in
    memory too (with ``[lora]``, the model without its adapter), and no trajectory can be dropped."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Coefficient of the tokens' entropy in the objective; if it is not 0, no trajectory can be dropped."""


S = TypeVar("S", bound=MethodSettings)


class CreditTerm(Section):
    """A change to credited groups that works under any method; its fields are its settings.

    ``models`` names the models that it scores tokens with besides the policy: {"reference"} for the model before training.
    """

    source: ClassVar[str] = "your own"
    status: ClassVar[Status] = "yours"
    models: ClassVar[frozenset[str]] = frozenset()

    name: str = ""
    """Name of the term, or ``file.py:Name`` for one of your own."""

    async def __call__(self, group: Group, ctx: Context) -> Group:
        """The group with other advantages."""
        raise NotImplementedError


class Method(Generic[S]):
    """rollout: G samples of each problem. guide: nothing. credit: (R − mean)/(std + 1e-4). surrogate: min(rA, clip(r)A).

    A method holds its settings and its state, and no models, threads or files, so that it can be pickled. Each verb but the last works
    on one group and awaits what it needs (``handrail.methods.requests``); an engine answers, and decides what runs together.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = "your own"
    status: ClassVar[Status] = "yours"
    Settings: ClassVar[type[MethodSettings]] = GrpoSettings
    uses_advantages: ClassVar[bool] = True
    """True if the surrogate reads advantages, so that credit terms can act on it."""
    smallest_group: ClassVar[int] = 2
    """Least ``rollout.group_size``: the only rollout of its group has none to be compared with, so its advantage is always 0."""

    def __init__(
        self,
        settings: S | None = None,
        group_size: int = 8,
        max_tokens: int = 256,
        terms: Sequence[CreditTerm] = (),
    ) -> None:
        """``max_tokens``: the longest rollout, for the constant normalizer."""
        self.settings: S = settings or self.Settings()  # type: ignore[assignment]  # a subclass names its own settings
        self.group_size, self.max_tokens, self.terms = group_size, max_tokens, tuple(terms)

    @property
    def needs_references(self) -> bool:
        """True if the method needs at least one problem with a reference."""
        return False

    @property
    def experts(self) -> Mapping[Role, str]:
        """The experts that it asks, by role: they are opened before anything is sampled."""
        return {}

    @property
    def models(self) -> frozenset[str]:
        """The models that it scores tokens with besides the policy; "reference" is the model before training."""
        needed = frozenset({"reference"} if self.kl else ())
        return needed.union(*(term.models for term in self.terms))

    # The verbs

    def samples(self, problem: Problem) -> int:
        """The number of rollouts of a problem."""
        return self.group_size

    async def reward(self, group: Group, ctx: Context) -> Group:
        """Grade every trajectory and set its reward."""
        graded = await gather(*(Verify(group.problem, member) for member in group.trajectories))
        return replace(group, trajectories=graded)

    async def guide(self, group: Group, ctx: Context) -> Group | list[Group]:
        """Add to a graded group, or replace or repair what is in it."""
        return group

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        """Set the advantage or the imitation weight of every token; called right before the update that the group is for.

        None leaves the group out of the update and of its normalizers.
        """
        group = self.advantages(group)
        for term in self.terms:
            group = await term(group, ctx)
        return group

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        """The objective of every token [B, T] from the current log-probabilities [B, T]; its sum is maximized."""
        return self.policy_gradient(logp, batch) + losses.imitation(logp, batch)

    # What the verbs are made of

    def setting(self, name: str, default: Any) -> Any:
        """A setting that not all methods have."""
        return getattr(self.settings, name, default)

    def advantages(self, group: Group) -> Group:
        """Equal rewards give exactly zero, by comparison of the rewards and not of a rounded deviation.

        A trajectory whose reward is unknown gets zero and enters no statistic.
        """
        if group.dead:
            return group.map(lambda member: member.with_advantage(0.0) if member.in_baseline else member)
        base = mean(group.rewards)
        scale = 1 / (stdev(group.rewards) + STD_EPSILON) if self.setting("normalise_std", True) else 1.0

        def credited(member: Trajectory) -> Trajectory:
            known = member.reward == member.reward  # false for NaN
            return (
                member.with_advantage((member.reward - base) * scale if known else 0.0)
                if member.in_baseline
                else member
            )

        return group.map(credited)

    def policy_gradient(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        bounds = (
            (self.setting("clip_low", 0.2), self.setting("clip_high", 0.2))
            if self.setting("clip", True)
            else None
        )
        return losses.policy_gradient(logp, batch, self.setting("ratio", "token"), bounds)

    async def verified_reference(self, group: Group, ctx: Context) -> Trajectory | None:
        """A reference of the group's problem, graded; None, and counted, if it has none."""
        reference = ctx.reference(group.problem)
        if reference is None:
            return None
        graded: Trajectory = await Verify(group.problem, reference)
        ctx.counts["guide/reference_rejected"] += graded.correct is False
        ctx.counts["guide/reference_unverified"] += graded.correct is None
        return graded

    # Normalizers

    @property
    def entropy_bonus(self) -> float:
        return float(self.setting("entropy_bonus", 0.0))

    @property
    def kl(self) -> float:
        return float(self.setting("kl", 0.0))

    def advantage_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        """The factor of the advantage of each token of ``trajectory``."""
        match self.setting("loss_normalizer", "sequence"):
            case "sequence":
                return 1 / (normalizers.trajectories * trajectory.trained_tokens)
            case "token":
                return 1 / normalizers.tokens
            case _:
                return 1 / (normalizers.trajectories * self.max_tokens)

    def imitation_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        """The factor of the imitation weight of each token of ``trajectory``: a mean over its tokens and all problems."""
        return 1 / (normalizers.problems * trajectory.trained_tokens)

    # What outlives a step

    def state(self) -> dict[str, object]:
        """JSON-able state that a checkpoint keeps; it must be the same in every process."""
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        """Restore from ``state()``."""
