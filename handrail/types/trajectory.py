"""Trajectories and groups of trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from handrail.types.problem import Problem


class Author(IntEnum):
    """Author of a token.

    ENVIRONMENT tokens (tool output, retrieved text) are read but never trained, and count in no normalizer.
    """

    POLICY = 0
    REFERENCE = 1
    TEACHER = 2
    REPLAY = 3
    ENVIRONMENT = 4


def default(name: str) -> float:
    """Return a column's value for tokens without one: NaN for ``entropy`` and ``...logp``, else 0."""
    return math.nan if name.endswith("logp") or name == "entropy" else 0.0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A prompt and one completion, with per-token data in named columns.

    ``prompt_ids`` [P] and ``token_ids`` (int64 [T]) are tokens; ``author`` (int64 [T]) is the Author of each
    completion token. ``columns`` (float32 [T] each, by name):

    - ``sampling_logp``: log-probability under the distribution that sampled the token; NaN if unknown.
    - ``old_logp``: log-probability in the denominator of the ratio; NaN if unknown, which makes the ratio 1.
    - ``entropy``: entropy of the distribution that the token was sampled from; NaN if unknown.
    - ``advantage``: the token's advantage in the policy gradient.
    - ``imitation_weight``: coefficient of the token's log-probability in the imitation objective.
    - ``linear_weight``: gradient of an objective that couples trajectories, see ``linearized``.
    - any column that a method adds.

    A trajectory whose advantages and imitation weights are all exactly zero is dropped before the forward
    pass, unless the objective has an entropy or KL term.

    - ``correct``: the verifier's verdict (``verifier.correct_from``), independent of ``reward``; None if
      ungraded or unverified.
    - ``reward``: the value that credit starts from, which a method may change; NaN if there is no
      verdict, so that its advantage is 0 and it enters no statistic.
    - ``in_baseline``: if False, the trajectory is imitated and enters no statistic of its group.
    - ``answer``: the answer that the verifier reads in the text; None if there is none, or nobody asked.
    - ``judged``: the leading steps that a judge scored, with their scores; None if no judge scored it.
    - ``plan``: the plan that its imitation weights depend on, if any.
    - ``hint``: what the prompt showed besides the problem when the completion was sampled, if anything; it is
      not in ``prompt_ids``.
    - ``version``: the step after which the policy had the weights that sampled the completion, 0 before
      training; None if the policy did not sample it, or no training step asked for it.
    - ``targets``: the tokens to predict at each position, int64 [T], if they differ from ``token_ids``, the
      tokens that are read. ``old_logp`` and what an update learns are then the targets'.
    """

    prompt_ids: list[int]
    token_ids: Tensor
    author: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    text: str = ""
    finished: bool = True
    reward: float = math.nan
    correct: bool | None = None
    in_baseline: bool = True
    answer: str | None = None
    judged: list[tuple[str, float | None]] | None = None
    plan: str | None = None
    hint: str | None = None
    version: int | None = None
    targets: Tensor | None = None

    @classmethod
    def by(
        cls,
        author: Author,
        prompt_ids: list[int],
        tokens: Sequence[int],
        text: str = "",
        finished: bool = True,
    ) -> Trajectory:
        """Make a completion by a single ``author``, with unknown log-probabilities."""
        token_ids = torch.tensor(tokens, dtype=torch.long)
        return cls(prompt_ids, token_ids, torch.full_like(token_ids, author), text=text, finished=finished)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.token_ids.tolist()]

    @property
    def predicted(self) -> Tensor:
        """Tokens to predict, int64 [T]: ``targets`` or else ``token_ids``."""
        return self.token_ids if self.targets is None else self.targets

    @cached_property
    def trained(self) -> Tensor:
        """Mask of trained tokens, bool [T]: all except the environment's."""
        return self.author != Author.ENVIRONMENT

    @cached_property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    @cached_property
    def is_rollout(self) -> bool:
        """True if the trajectory is in the baseline and all its tokens are the policy's or the
        environment's."""
        return self.in_baseline and bool(((self.author == Author.POLICY) | ~self.trained).all())

    @cached_property
    def is_reference(self) -> bool:
        """True if all its trained tokens, at least one, are a reference's."""
        return set(self.author[self.trained].tolist()) == {Author.REFERENCE}

    @cached_property
    def has_signal(self) -> bool:
        return any(
            bool(self.column(name).any()) for name in ("advantage", "imitation_weight", "linear_weight")
        )

    def column(self, name: str) -> Tensor:
        """Return a column, float32 [T]; its default (``default``) if the trajectory lacks it."""
        found = self.columns.get(name)
        return torch.full((len(self),), default(name)) if found is None else found

    def with_columns(self, **columns: Tensor) -> Trajectory:
        return replace(self, columns={**self.columns, **columns})

    def with_advantage(self, advantage: float) -> Trajectory:
        """Set the same advantage on every trained token."""
        return self.with_columns(advantage=self.trained * advantage)

    def truncate(self, length: int) -> Trajectory:
        """Its first ``length`` tokens, without text, verdict, reward and end."""
        return replace(
            self,
            token_ids=self.token_ids[:length],
            author=self.author[:length],
            columns={name: column[:length] for name, column in self.columns.items()},
            text="",
            finished=False,
            reward=math.nan,
            correct=None,
            answer=None,
            judged=None,
            targets=None if self.targets is None else self.targets[:length],
        )

    def append(self, tokens: Sequence[int], author: Author, finished: bool) -> Trajectory:
        """Append tokens by one author, with unknown log-probabilities."""
        return self.extend(Trajectory.by(author, self.prompt_ids, tokens, finished=finished))

    def extend(self, more: Trajectory) -> Trajectory:
        """Append the completion of ``more``, with its columns."""
        names = self.columns.keys() | more.columns.keys()
        same = self.targets is None and more.targets is None
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, more.token_ids]),
            author=torch.cat([self.author, more.author]),
            columns={name: torch.cat([self.column(name), more.column(name)]) for name in names},
            finished=more.finished,
            targets=None if same else torch.cat([self.predicted, more.predicted]),
        )


@dataclass(frozen=True, eq=False)
class Group:
    """The trajectories of one problem in one step; those with ``in_baseline=False`` are only imitated.

    ``notes``: what a method or a term wants to know of the group later in the step, by its name. ``model``:
    the model that the group trains, "policy" or one of ``Method.trained``. Make changed groups with
    ``dataclasses.replace``, which keeps both.
    """

    problem: Problem
    trajectories: list[Trajectory] = field(default_factory=list)
    notes: Mapping[str, Any] = field(default_factory=dict)
    model: str = "policy"

    @property
    def baseline(self) -> list[Trajectory]:
        """Trajectories that enter the group's statistics."""
        return [trajectory for trajectory in self.trajectories if trajectory.in_baseline]

    @property
    def imitated(self) -> list[Trajectory]:
        return [trajectory for trajectory in self.trajectories if not trajectory.in_baseline]

    @property
    def rollouts(self) -> list[Trajectory]:
        return [trajectory for trajectory in self.trajectories if trajectory.is_rollout]

    @property
    def all_wrong(self) -> bool:
        """True if at least one rollout is known to be wrong and none to be correct, whatever the rewards."""
        verdicts = {rollout.correct for rollout in self.rollouts}
        return False in verdicts and True not in verdicts

    @property
    def all_right(self) -> bool:
        """True if at least one rollout is known to be correct and none to be wrong."""
        verdicts = {rollout.correct for rollout in self.rollouts}
        return True in verdicts and False not in verdicts

    @property
    def mixed(self) -> bool:
        """True if at least one rollout is known to be correct and another to be wrong."""
        return {True, False} <= {rollout.correct for rollout in self.rollouts}

    @property
    def rewards(self) -> list[float]:
        """Known rewards of the trajectories in the baseline."""
        return [trajectory.reward for trajectory in self.baseline if not math.isnan(trajectory.reward)]

    @property
    def dead(self) -> bool:
        """True if all known rewards are equal, so that rewards alone (GRPO) give no signal."""
        return len(set(self.rewards)) <= 1

    @property
    def has_signal(self) -> bool:
        return any(trajectory.has_signal for trajectory in self.trajectories)

    def map(self, change: Callable[[Trajectory], Trajectory]) -> Group:
        """Return the group with ``change`` applied to every trajectory."""
        return replace(self, trajectories=[change(trajectory) for trajectory in self.trajectories])

    def swap(self, old: Trajectory, new: Trajectory) -> Group:
        """Return the group with ``new`` in place of ``old``."""
        return self.swap_all([old], [new])

    def swap_all(self, old: Sequence[Trajectory], new: Sequence[Trajectory]) -> Group:
        """Return the group with each of ``new`` in place of the trajectory of the same index in ``old``."""
        found = dict(zip(map(id, old), new, strict=True))
        return self.map(lambda trajectory: found.get(id(trajectory), trajectory))

    def add(self, *more: Trajectory) -> Group:
        return replace(self, trajectories=[*self.trajectories, *more])
