"""Trajectories, and the groups that they form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from handrail.types.problem import Problem


class Author(IntEnum):
    """Who wrote a token.

    ENVIRONMENT tokens (a tool's output, retrieved text) are read and never trained; they count in no normalizer.
    """

    POLICY = 0
    REFERENCE = 1
    TEACHER = 2
    REPLAY = 3
    ENVIRONMENT = 4


def default(name: str) -> float:
    """What a column holds for a token that nobody gave a value: NaN if its name ends in ``logp`` or is entropy, else 0."""
    return math.nan if name.endswith("logp") or name == "entropy" else 0.0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A prompt and one completion of it, with a column for every fact about its tokens.

    ``prompt_ids`` [P] and ``token_ids`` (int64 [T]) are tokens, ``author`` (int64 [T]) says who wrote each of the latter.
    ``columns`` (float32 [T] each, by name):

    - ``sampling_logp``: log-probability under which the token was sampled; NaN if unknown.
    - ``old_logp``: log-probability that the ratio is taken to; NaN if unknown, which makes the ratio 1.
    - ``entropy``: of the distribution that the token was sampled from; NaN if unknown.
    - ``advantage``: of the token in the policy gradient.
    - ``imitation_weight``: how strongly the token's likelihood is raised.
    - ``linear_weight``: gradient of an objective that couples trajectories, see ``linearised``.
    - whatever a method adds.

    A trajectory whose advantages and imitation weights are all exactly zero never reaches the model.
    ``correct`` is the verifier's verdict (``verifier.correct_from``), whatever the ``reward``; None if ungraded or unverified.
    ``reward`` is what credit starts from, and a method may change it; NaN if the verifier reached no verdict.
    A trajectory with ``in_baseline=False`` is imitated and enters no statistic of its group.
    ``judged`` holds the steps that a judge scored, from the first on, with their scores; None if it was not judged.
    ``plan`` is the plan that its imitation weights depend on, if there is one.
    """

    prompt_ids: list[int]
    token_ids: Tensor
    author: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    text: str = ""
    finished: bool = True
    reward: float = 0.0
    correct: bool | None = None
    in_baseline: bool = True
    judged: list[tuple[str, float | None]] | None = None
    plan: str | None = None

    @classmethod
    def by(
        cls,
        author: Author,
        prompt_ids: list[int],
        tokens: Sequence[int],
        text: str = "",
        finished: bool = True,
    ) -> Trajectory:
        """A completion by one ``author``, of unknown likelihood."""
        token_ids = torch.tensor(tokens, dtype=torch.long)
        return cls(prompt_ids, token_ids, torch.full_like(token_ids, author), text=text, finished=finished)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.token_ids.tolist()]

    @cached_property
    def trained(self) -> Tensor:
        """True for every token but the environment's, bool [T]."""
        return self.author != Author.ENVIRONMENT

    @cached_property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())

    @cached_property
    def is_rollout(self) -> bool:
        """True if it counts in its group's statistics and the policy wrote it, with the environment's answers in between."""
        return self.in_baseline and bool(((self.author == Author.POLICY) | ~self.trained).all())

    @cached_property
    def has_signal(self) -> bool:
        return any(
            bool(self.column(name).any()) for name in ("advantage", "imitation_weight", "linear_weight")
        )

    def column(self, name: str) -> Tensor:
        """float32 [T]; the column's default if the trajectory has none of that name."""
        found = self.columns.get(name)
        return torch.full((len(self),), default(name)) if found is None else found

    def with_columns(self, **columns: Tensor) -> Trajectory:
        return replace(self, columns={**self.columns, **columns})

    def with_advantage(self, advantage: float) -> Trajectory:
        """One advantage on every trained token."""
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
            reward=0.0,
            correct=None,
            judged=None,
        )

    def append(self, tokens: Sequence[int], author: Author, finished: bool) -> Trajectory:
        """More tokens behind its own, all by one author and of unknown likelihood."""
        return self.extend(Trajectory.by(author, self.prompt_ids, tokens, finished=finished))

    def extend(self, more: Trajectory) -> Trajectory:
        """The completion of ``more`` behind its own."""
        names = self.columns.keys() | more.columns.keys()
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, more.token_ids]),
            author=torch.cat([self.author, more.author]),
            columns={name: torch.cat([self.column(name), more.column(name)]) for name in names},
            finished=more.finished,
        )


@dataclass(frozen=True, eq=False)
class Group:
    """The trajectories of one problem in one step; those with ``in_baseline=False`` are imitated beside the others."""

    problem: Problem
    trajectories: list[Trajectory] = field(default_factory=list)

    @property
    def baseline(self) -> list[Trajectory]:
        """The trajectories that share the group's statistics."""
        return [trajectory for trajectory in self.trajectories if trajectory.in_baseline]

    @property
    def imitated(self) -> list[Trajectory]:
        return [trajectory for trajectory in self.trajectories if not trajectory.in_baseline]

    @property
    def rollouts(self) -> list[Trajectory]:
        return [trajectory for trajectory in self.trajectories if trajectory.is_rollout]

    @property
    def all_wrong(self) -> bool:
        """True if a rollout is known to be wrong and none to be correct, whatever they are paid."""
        verdicts = {rollout.correct for rollout in self.rollouts}
        return False in verdicts and True not in verdicts

    @property
    def all_right(self) -> bool:
        """True if a rollout is known to be correct and none to be wrong."""
        verdicts = {rollout.correct for rollout in self.rollouts}
        return True in verdicts and False not in verdicts

    @property
    def mixed(self) -> bool:
        """True if a rollout is known to be correct and another to be wrong."""
        return {True, False} <= {rollout.correct for rollout in self.rollouts}

    @property
    def rewards(self) -> list[float]:
        """The known rewards of the baseline."""
        return [trajectory.reward for trajectory in self.baseline if not math.isnan(trajectory.reward)]

    @property
    def dead(self) -> bool:
        """True if all known rewards are equal, so that rewards alone (GRPO) give no signal, whether the rollouts are wrong or correct."""
        return len(set(self.rewards)) <= 1

    @property
    def has_signal(self) -> bool:
        return any(trajectory.has_signal for trajectory in self.trajectories)

    def map(self, change: Callable[[Trajectory], Trajectory]) -> Group:
        """The group with every trajectory changed."""
        return replace(self, trajectories=[change(trajectory) for trajectory in self.trajectories])

    def swap(self, old: Trajectory, new: Trajectory) -> Group:
        """The group with ``new`` in the place of ``old``."""
        return self.map(lambda trajectory: new if trajectory is old else trajectory)

    def add(self, *more: Trajectory) -> Group:
        return replace(self, trajectories=[*self.trajectories, *more])
