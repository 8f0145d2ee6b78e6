"""The nouns: problems, trajectories, and the groups they stand in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One thing to solve.

    ``prompt`` is text or chat messages, ``answer`` what the verifier compares with, ``references`` worked solutions that
    end in the answer, ``plan`` how to go about it without giving values away, ``metadata`` everything else the user's row held,
    ``where`` the file and line it came from.
    """

    id: str
    prompt: str | list[Message]
    answer: str
    references: tuple[str, ...] = ()
    plan: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


def digest(problems: Sequence[Problem]) -> str:
    """A checksum of all that problems hold; two data sets with the same one need no new attempts."""
    rows = [[problem.id, problem.prompt, problem.answer, problem.references, problem.plan, problem.metadata] for problem in problems]
    return hashlib.sha256(json.dumps(rows, default=_as_json, skipkeys=True).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """Metadata that JSON does not know, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return type(value).__name__ if repr(value).startswith("<") else str(value)


class Origin(IntEnum):
    """Who wrote a token."""

    POLICY = 0
    REFERENCE = 1
    TEACHER = 2


@dataclass(frozen=True)
class Trajectory:
    """A prompt and one completion of it; every list but ``prompt`` is as long as ``completion``.

    ``behaviour`` holds the log-probability under which each token was sampled, None where nobody knows it.
    ``credit`` is the advantage of each token, ``weight`` how strongly its likelihood is raised (imitation).
    A trajectory whose credits and weights are all exactly zero never reaches the model.
    ``old`` is the trainer's own log-probability under the weights that sampled each token, where another program sampled it; None where
    it was not computed, and empty where ``behaviour`` is just that.
    ``correct`` is the verifier's verdict (``verifier.correct_from``), whatever the ``reward``; None if ungraded or unverified.
    ``judged`` holds the steps that a judge scored, from the first on, with their scores; None where no judge said anything.
    """

    prompt: list[int]
    completion: list[int]
    text: str
    origin: list[Origin]
    behaviour: list[float | None]
    entropy: list[float] = field(default_factory=list)
    finished: bool = True
    reward: float = 0.0
    correct: bool | None = None
    credit: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    judged: list[tuple[str, float | None]] | None = None
    old: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.completion)

    @property
    def is_rollout(self) -> bool:
        return all(origin is Origin.POLICY for origin in self.origin)

    @property
    def has_signal(self) -> bool:
        return any(self.credit) or any(self.weight)

    @property
    def anchor(self) -> list[float | None]:
        """What a ratio is taken to: the log-probability of each token before any update."""
        return self.old or self.behaviour

    def credited(self, advantage: float) -> Trajectory:
        """The same trajectory with one advantage on every token."""
        return replace(self, credit=[advantage] * len(self))

    def upto(self, length: int) -> Trajectory:
        """Its first ``length`` tokens, ungraded and without end."""
        origin, behaviour = self.origin[:length], self.behaviour[:length]
        return Trajectory(self.prompt, self.completion[:length], "", origin, behaviour, finished=False, old=self.old[:length])

    def followed(self, tokens: list[int], origin: Origin, finished: bool) -> Trajectory:
        """More tokens behind its own, all of one origin and of unknown likelihood."""
        return self.continued(Trajectory(self.prompt, tokens, "", [origin] * len(tokens), [None] * len(tokens), finished=finished))

    def continued(self, more: Trajectory) -> Trajectory:
        """The completion of ``more`` behind its own."""
        return replace(
            self,
            completion=self.completion + more.completion,
            origin=self.origin + more.origin,
            behaviour=self.behaviour + more.behaviour,
            finished=more.finished,
            old=self.anchor + more.anchor if self.old or more.old else [],
        )

    @classmethod
    def reference(cls, prompt: list[int], completion: list[int], text: str) -> Trajectory:
        length = len(completion)
        return cls(prompt, completion, text, [Origin.REFERENCE] * length, [None] * length)


@dataclass(frozen=True)
class Group:
    """The trajectories of one problem in one step.

    ``trajectories`` share the group's baseline; ``demonstrations`` are imitated beside it and count in no statistic.
    """

    problem: Problem
    trajectories: list[Trajectory] = field(default_factory=list)
    demonstrations: list[Trajectory] = field(default_factory=list)

    @property
    def members(self) -> list[Trajectory]:
        return self.trajectories + self.demonstrations

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
    def dead(self) -> bool:
        """True if all rewards are equal, so that rewards alone (GRPO) give no signal, whether the rollouts are wrong or correct."""
        return len({trajectory.reward for trajectory in self.trajectories}) <= 1

    @property
    def has_signal(self) -> bool:
        return any(trajectory.has_signal for trajectory in self.members)
