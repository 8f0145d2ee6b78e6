"""Base class of methods: five verbs, as GRPO defines them; a paper overrides those it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import Field, ValidationError
from torch import Tensor

from handrail._util.errors import UserError
from handrail._util.section import Section, explain
from handrail.experts.config import Role
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
    """Terms, applied in order to the method's rewards and advantages: ``[{name = "ace", alpha = 1.0}]``, or
    ``file.py:Name`` for one of your own."""


class GrpoSettings(MethodSettings):
    normalize_std: bool = True
    """Divide advantages by (standard deviation of the group's rewards + std_epsilon); Dr.GRPO does not."""
    std_epsilon: float = Field(STD_EPSILON, ge=0)
    """Small number added to that standard deviation; TGPO uses 1e-6, i-MENTOR 1e-10."""
    clip: bool = True
    """Clip the importance ratio."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """Lower bound of the clipped ratio: 1 − clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """Upper bound of the clipped ratio: 1 + clip_high; DAPO uses 0.28."""
    dual_clip: float = Field(0.0, ge=0)
    """Least objective of a token with a negative advantage, as a multiple of it (dual-clip PPO, usually 3); 0
    for none."""
    ratio: Ratio = "token"
    """One importance ratio per token, or one per sequence (GSPO, with clips near 3e-4 and 4e-4)."""
    loss_normalizer: LossNormalizer = "sequence"
    """How token losses are averaged: mean of sequence means (GRPO), mean over all tokens of the update
    (DAPO), or divided by the constant ``rollout.max_tokens`` (Dr.GRPO)."""
    skip_dead_groups: bool = False
    """Exclude groups without signal from the loss normalizers (DAPO); otherwise they count as zeros."""
    kl: float = Field(0.0, ge=0)
    """β, the coefficient of the KL divergence from the starting model. If nonzero, that model stays in memory
    (with ``[lora]``, the model without its adapter), and no trajectory can be dropped."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Coefficient of the token entropy in the objective; if nonzero, no trajectory can be dropped."""


S = TypeVar("S", bound=MethodSettings)


State = dict[str, Any]
"""What a checkpoint keeps: JSON values and tensors, in dictionaries with strings as keys and in lists."""


class Stateful:
    """What outlives a step, and how all processes come to agree on it."""

    def observe(self, group: Group) -> Any:
        """What every process must know of a guided group: anything that pickles, None for nothing."""
        return None

    def learn(self, seen: list[Any]) -> None:
        """Learn from the observations of all the step's groups, in the order of its problems.

        Called once a step, between ``guide`` and the first ``credit``, with the same in every process; never
        if ``observe`` is not overridden.
        """

    def state(self) -> State:
        """State for the checkpoint; must be identical in every process."""
        return {}

    def load_state(self, state: State) -> None:
        """Restore from ``state()``, to the bit."""


def named_experts(settings: Section) -> dict[Role, str]:
    """The experts that settings name by their roles."""
    named = {role: getattr(settings, role, None) for role in get_args(Role)}
    return {role: name for role, name in named.items() if name is not None}


class Term(Section, Stateful):
    """A change of rewards or advantages that works under any method; its fields are its settings.

    State goes into private attributes of pydantic (``_seen: dict = PrivateAttr(default_factory=dict)``).
    """

    source: ClassVar[str] = "your own"
    status: ClassVar[Status] = "yours"
    refuses: ClassVar[Mapping[str, str]] = {}
    """Methods and terms that it cannot be combined with, and why."""
    precedes: ClassVar[frozenset[str]] = frozenset()
    """Terms that it must come before."""
    needs_sampling_logp: ClassVar[bool] = False
    """True if the term reads ``sampling_logp`` of rollouts, see ``Method.needs_sampling_logp``."""

    name: str = ""
    """Name of the term, or ``file.py:Name`` for one of your own."""

    @property
    def experts(self) -> Mapping[Role, str]:
        """Names of the experts that the term asks, by role; by default its settings of these names.

        They are loaded before sampling starts.
        """
        return named_experts(self)

    @property
    def models(self) -> frozenset[str]:
        """Models besides the policy that the term scores with, see ``Method.models``."""
        return frozenset()

    @property
    def needs_answers(self) -> bool:
        """True if the term reads the answers in completions, which a host's rewards need not tell."""
        return False

    async def reward(self, group: Group, ctx: Context) -> Group:
        """Change the rewards of a graded group, before the method's ``guide``."""
        return group

    async def guide(self, group: Group, ctx: Context) -> Group:
        """Look at a group that the method has guided, and ask experts about it.

        Keep their answers in ``Group.notes`` or in columns of the trajectories, for ``credit``.
        """
        return group

    async def credit(self, group: Group, ctx: Context) -> Group:
        """Change the advantages that the method has set."""
        return group

    def changed_labels(self) -> list[dict[str, Any]]:
        """Answers of problems that the term replaced in this step, as lines of the run's labels.jsonl.

        Asked after ``learn``; must be identical in every process.
        """
        return []


class Method(Generic[S], Stateful):
    """Base class of methods: five verbs on one group; the defaults are GRPO's.

    rollout: G samples of each problem.
    reward: the verifier's.
    guide: nothing.
    credit: (R − mean)/(std + 1e-4).
    surrogate: min(rA, clip(r)A).

    A method holds its settings and its state, but no models, threads or files, so it can be pickled. Each
    verb except ``surrogate`` works on one group and awaits requests (``handrail.methods.requests``); an
    engine answers them and decides how they are batched.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = "your own"
    status: ClassVar[Status] = "yours"
    Settings: ClassVar[type[MethodSettings]] = GrpoSettings
    uses_advantages: ClassVar[bool] = True
    """True if the surrogate reads advantages, so that terms can act on it."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Terms that it cannot be combined with, and why."""
    smallest_group: ClassVar[int] = 2
    """Minimum ``rollout.group_size``: the advantage of a group's only rollout is always 0."""
    needs_rollback: ClassVar[bool] = False
    """True if the method goes back to earlier checkpoints of its run, which not every engine can."""
    needs_sampling_logp: ClassVar[bool] = False
    """True if the method reads ``sampling_logp`` of rollouts, which a host's servers need not tell."""

    def __init__(
        self,
        settings: S | None = None,
        group_size: int = 8,
        max_tokens: int = 256,
        terms: Sequence[Term] = (),
    ) -> None:
        """``max_tokens``: length limit of a rollout, used by the constant normalizer. ``terms``: objects;
        ``handrail.methods.build`` makes them of what the settings describe.

        Raises UserError if a setting is missing, or if settings describe terms and none is given.
        """
        self.settings: S = settings or self._default_settings()
        self.group_size, self.max_tokens, self.terms = group_size, max_tokens, tuple(terms)
        if self.settings.terms and not terms:
            raise UserError(
                f"method.terms: {type(self).__name__} does not build the terms of its settings; make it with "
                "handrail.methods.build, or give it objects as the argument terms"
            )

    @classmethod
    def _default_settings(cls) -> S:
        try:
            return cls.Settings()  # type: ignore[return-value]  # a subclass names its own settings
        except ValidationError as error:
            raise UserError(explain(error, cls.Settings, "method")) from error

    @property
    def needs_references(self) -> bool:
        """True if the method needs at least one problem with a reference."""
        return False

    @property
    def experts(self) -> Mapping[Role, str]:
        """Names of the experts that the method asks, by role; by default its settings of these names.

        They are loaded before sampling starts.
        """
        return named_experts(self.settings)

    @property
    def models(self) -> frozenset[str]:
        """Models besides the policy that the method scores with.

        "reference" is the model before training, "teacher" the model ``experts.teacher``, which must have the
        policy's tokens.
        """
        needed = frozenset({"reference"} if self.kl else ())
        return needed.union(*(term.models for term in self.terms))

    @property
    def trained(self) -> frozenset[str]:
        """Models besides the policy that the method trains: "critic", the model ``experts.critic``."""
        return frozenset()

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise UserError if the method cannot learn from these training problems."""
        if self.needs_references and not any(problem.references for problem in problems):
            raise UserError(
                f"{self.settings.name or self.name} learns from references, and no training problem has one; "
                "name their column in data.columns, or choose a method that needs none"
            )

    # The verbs

    def samples(self, problem: Problem) -> int:
        """Number of rollouts to sample for ``problem``."""
        return self.group_size

    async def reward(self, group: Group, ctx: Context) -> Group:
        """Grade every trajectory and set its reward."""
        return await self.grade(group, ctx)

    async def guide(self, group: Group, ctx: Context) -> Group | list[Group]:
        """Add trajectories to a graded group, or replace or repair those in it."""
        return group

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        """Set the advantage or imitation weight of every token; called right before the update that uses the
        group.

        Return None to exclude the group from the update and its normalizers.
        """
        group = self.advantages(group)
        for term in self.terms:
            group = await term.credit(group, ctx)
        return group

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        """Objective of every token [B, T], given current log-probabilities [B, T]; its sum is maximized.

        It may read the settings, ``group_size``, ``max_tokens`` and the columns of ``batch``, and nothing
        else: inside verl, workers compute it with a method that they build again from these.
        """
        return self.policy_gradient(logp, batch) + losses.imitation(logp, batch)

    # Building blocks of the verbs

    @property
    def grpo(self) -> GrpoSettings:
        """Settings of the building blocks: the method's own, or the defaults if it has no GrpoSettings."""
        return self.settings if isinstance(self.settings, GrpoSettings) else GrpoSettings()

    async def grade(self, group: Group, ctx: Context) -> Group:
        """Return the group as the verifier grades it and the terms reward it."""
        graded = await gather(*(Verify(group.problem, member) for member in group.trajectories))
        return await self.apply_rewards(replace(group, trajectories=graded), ctx)

    async def apply_rewards(self, group: Group, ctx: Context) -> Group:
        """Let the terms change the rewards of a graded group."""
        for term in self.terms:
            group = await term.reward(group, ctx)
        return group

    async def reward_additions(
        self, group: Group, graded: Sequence[Trajectory], ctx: Context
    ) -> list[Trajectory]:
        """Let the terms change the rewards of graded trajectories that ``guide`` adds to ``group``."""
        if not graded:  # a term may not expect a group without members
            return []
        return (await self.apply_rewards(replace(group, trajectories=list(graded)), ctx)).trajectories

    def advantages(self, group: Group) -> Group:
        """Set GRPO's advantages in the baseline.

        Equal rewards give exactly zero: rewards are compared, not a standard deviation with its rounding
        error. A trajectory with an unknown reward gets zero and enters no statistic.
        """
        if group.dead:
            return group.map(lambda member: member.with_advantage(0.0) if member.in_baseline else member)
        base = mean(group.rewards)
        scale = 1 / (stdev(group.rewards) + self.grpo.std_epsilon) if self.grpo.normalize_std else 1.0

        def set_advantage(member: Trajectory) -> Trajectory:
            if not member.in_baseline:
                return member
            known = member.reward == member.reward  # False for NaN
            return member.with_advantage((member.reward - base) * scale if known else 0.0)

        return group.map(set_advantage)

    def policy_gradient(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        """The policy gradient's objective of every token [B, T], clipped as the settings say.

        ``logp``: current log-probabilities [B, T], with gradient.
        """
        s = self.grpo
        bounds = (s.clip_low, s.clip_high) if s.clip else None
        return losses.policy_gradient(logp, batch, s.ratio, bounds, s.dual_clip)

    async def verified_reference(self, group: Group, ctx: Context) -> Trajectory | None:
        """Pick and grade a reference of the group's problem; count and return None if it has none."""
        reference = ctx.reference(group.problem)
        if reference is None:
            return None
        (graded,) = await self.reward_additions(group, [await Verify(group.problem, reference)], ctx)
        ctx.counts["guide/reference_rejected"] += graded.correct is False
        ctx.counts["guide/reference_unverified"] += graded.correct is None
        return graded

    # Normalizers

    def keeps(self, group: Group) -> bool:
        """True if a credited group enters the update and its normalizers."""
        return group.has_signal or not self.grpo.skip_dead_groups

    @property
    def entropy_bonus(self) -> float:
        return self.grpo.entropy_bonus

    @property
    def kl(self) -> float:
        return self.grpo.kl

    def advantage_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        """Factor applied to the advantage of each token of ``trajectory``."""
        match self.grpo.loss_normalizer:
            case "sequence":
                return 1 / (normalizers.trajectories * trajectory.trained_tokens)
            case "token":
                return 1 / normalizers.tokens
            case _:
                return 1 / (normalizers.trajectories * self.max_tokens)

    def imitation_scale(self, trajectory: Trajectory, normalizers: Normalizers) -> float:
        """Factor applied to the imitation weight of each token: a mean over its trajectory and all
        problems."""
        return 1 / (normalizers.problems * trajectory.trained_tokens)
