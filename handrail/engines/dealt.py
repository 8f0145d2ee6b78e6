"""What an engine shares out over processes that all run the verbs of all groups.

They await the same requests in the same order, and each answers a share of them. So a group may lie on
several processes, and sharded models and servers, which wait for all processes, are called equally often by
each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from handrail._util.errors import Paused, UserError
from handrail.experts.registry import Experts
from handrail.models.policy import Policy, limits_of
from handrail.types.problem import Problem
from handrail.types.trajectory import Trajectory
from handrail.verifiers.pool import Verdict, VerifierPool

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """An exception as another process can always read it: not every exception pickles."""

    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        for kind in (UserError, Paused):
            if isinstance(error, kind):
                return cls(kind, str(error))
        return cls(RuntimeError, f"{type(error).__name__}: {error}")


def take_share(items: Sequence[T], equal: bool = True) -> list[T]:
    """Return this process's share. ``equal``: shares have equal length; if need be, items are repeated."""
    state = PartialState()
    size = -(-len(items) // state.num_processes)
    first = state.process_index * size
    if not equal:
        return list(items[first : first + size])
    return [items[(first + place) % len(items)] for place in range(size)]


def deal(items: Sequence[T], work: Callable[[list[T]], Sequence[R]], equal: bool = True) -> list[R]:
    """Apply ``work`` to a share of ``items`` in each process; return all results, in order, in all processes.

    ``equal``: every process works on equally many items, as sharded models need. Otherwise none is repeated,
    and a process may have none. If ``work`` fails in one process, all raise the same: UserError, Paused or,
    for any other exception, RuntimeError.
    """
    if PartialState().num_processes == 1 or not items:
        return list(work(list(items)))
    own, error = take_share(items, equal), None
    try:
        done: list[Any] = list(work(own)) if own else []
    except Exception as raised:
        error, done = raised, [Failure.of(raised)]
    everything = gather_object(done)
    if failure := next((each for each in everything if isinstance(each, Failure)), None):
        raise failure.kind(failure.message) from error
    return list(everything[: len(items)])


class DealtPolicy(Policy):
    """A policy of which each process answers its share."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.renderer = policy, policy.renderer

    @property
    def context(self) -> int | None:
        return self.policy.context

    @property
    def max_tokens(self) -> int:
        return self.policy.max_tokens

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: int | Sequence[int] | None = None,
    ) -> list[Trajectory]:
        limits = limits_of(self, prompts, max_tokens)
        rows = list(zip(prompts, seeds, limits, strict=True))
        return deal(
            rows,
            lambda own: self.policy.generate(
                [row[0] for row in own], [row[1] for row in own], [row[2] for row in own]
            ),
        )

    def score(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> list[Tensor]:
        rows = list(zip(prompts, completions, completions if targets is None else targets, strict=True))
        return deal(
            rows,
            lambda own: self.policy.score(
                [row[0] for row in own], [row[1] for row in own], model, [row[2] for row in own]
            ),
        )

    def top_tokens(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int] | Tensor],
        model: str = "policy",
        vocabulary: int | None = None,
    ) -> list[Tensor]:
        rows = list(zip(prompts, completions, strict=True))
        return deal(
            rows,
            lambda own: self.policy.top_tokens(
                [row[0] for row in own], [row[1] for row in own], model, vocabulary
            ),
        )


class DealtExperts(Experts):
    """Experts of which each process asks its share; those that ask the policy share it out themselves."""

    def _answers(self, name: str, questions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        if name == "policy":
            return super()._answers(name, questions, seeds)

        def ask(own: list[tuple[Any, int]]) -> list[Any]:
            asked, seeded = zip(*own, strict=True)
            return super(DealtExperts, self)._answers(name, asked, seeded)

        return deal(list(zip(questions, seeds, strict=True)), ask, equal=False)


class DealtPool(VerifierPool):
    """A verifier pool in each process, which grades its share."""

    def grade(self, items: Sequence[tuple[Problem, str]], answers: bool = False) -> list[Verdict]:
        return deal(items, lambda own: super(DealtPool, self).grade(own, answers), equal=False)
