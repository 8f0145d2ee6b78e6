"""Requests that methods await, and the driver that runs many verbs concurrently.

An engine answers the requests; it alone decides how they are batched and where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from handrail.types.problem import Problem
from handrail.types.trajectory import Trajectory

Flow = Coroutine[Any, Any, Any]


@dataclass(frozen=True, eq=False)
class Request:
    def __await__(self) -> Generator[Request, Any, Any]:
        return (yield self)


@dataclass(frozen=True, eq=False)
class Generate(Request):
    """Sample ``n`` completions of a prompt. Answer: a list of ungraded trajectories.

    ``max_tokens`` defaults to ``rollout.max_tokens``.
    """

    prompt_ids: list[int]
    n: int = 1
    max_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Score(Request):
    """Score tokens (int64 [T]) that follow a prompt. Answer: log-probabilities, float32 [T], without
    gradient.

    ``model`` is "policy", or one that ``Method.models`` declares: "reference", the model before training, or
    "teacher", the model ``experts.teacher``. ``targets`` (int64 [T]) are the tokens to predict at each
    position if they differ from those that are read.
    """

    prompt_ids: list[int]
    token_ids: Tensor
    model: str = "policy"
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TopTokens(Request):
    """Find the likeliest token at every position of ``token_ids`` (int64 [T]). Answer: int64 [T].

    ``model`` is "policy" or "teacher", see ``Score``. Only tokens that the policy knows are considered.
    """

    prompt_ids: list[int]
    token_ids: Tensor
    model: str = "policy"


@dataclass(frozen=True, eq=False)
class Verify(Request):
    """Grade a trajectory with the verifier. Answer: the trajectory with ``correct`` and ``reward`` set.

    ``answer``: True to set its ``answer`` too.
    """

    problem: Problem
    trajectory: Trajectory
    answer: bool = False


@dataclass(frozen=True, eq=False)
class Ask(Request):
    """Ask an expert, by name or ``file.py:Name``, a question from ``handrail.experts.questions``.

    Answer: as documented by the question's class.
    """

    expert: str
    question: Any


@dataclass(frozen=True, eq=False)
class Gather(Request):
    flows: Sequence[Flow]


async def gather(*flows: Flow | Request) -> list[Any]:
    """Await several requests or coroutines concurrently, so that an engine can batch them."""
    return list(await Gather([_answer(flow) if isinstance(flow, Request) else flow for flow in flows]))


async def _answer(request: Request) -> Any:
    return await request


ANSWERED_FIRST: tuple[type[Request], ...] = (Verify, Ask, Score, TopTokens, Generate)
"""Cheap requests come first: answering them lets more flows join the batches of expensive requests."""


@dataclass
class Pending:
    """A request that waits for its answer. ``key`` is unique within a step and identical in every run."""

    request: Any
    key: tuple[object, ...]
    flow: _Running = field(repr=False)


@dataclass
class _Running:
    """A started flow, with the results of the flows that it waits for."""

    coroutine: Flow
    key: tuple[object, ...]
    place: int
    parent: _Running | None = None
    requests: int = 0
    results: list[Any] = field(default_factory=list)
    unfinished: int = 0


def drive(
    flows: Sequence[tuple[tuple[object, ...], Flow]], answer: Callable[[list[Pending]], Sequence[Any]]
) -> list[Any]:
    """Run every (key, coroutine) to completion and return the results in order.

    All flows advance to their next request; ``answer`` then receives all waiting requests of one kind and
    returns one answer for each. Batches never depend on timing, so runs resume exactly.
    """
    root = _Running(_nothing(), (), 0, results=[None] * len(flows), unfinished=len(flows))
    waiting: list[Pending] = []
    children: list[Flow] = []

    def start(parent: _Running, flows: Sequence[tuple[tuple[object, ...], Flow]]) -> None:
        children.extend(coroutine for _, coroutine in flows)
        for place, (key, coroutine) in enumerate(flows):
            advance(_Running(coroutine, key, place, parent), None)

    def advance(flow: _Running, value: Any) -> None:
        try:
            request = flow.coroutine.send(value)
        except StopIteration as end:
            return finish(flow, end.value)
        if not isinstance(request, ANSWERED_FIRST + (Gather,)):
            raise TypeError(f"a method awaits {request!r}, which is no request of handrail.methods.requests")
        key = (*flow.key, flow.requests)
        flow.requests += 1
        if not isinstance(request, Gather):
            waiting.append(Pending(request, key, flow))
        elif not request.flows:
            advance(flow, [])
        else:
            flow.results, flow.unfinished = [None] * len(request.flows), len(request.flows)
            start(flow, [((*key, place), child) for place, child in enumerate(request.flows)])

    def finish(flow: _Running, value: Any) -> None:
        parent = flow.parent
        assert parent is not None
        parent.results[flow.place] = value
        parent.unfinished -= 1
        if parent is not root and not parent.unfinished:
            advance(parent, parent.results)

    try:
        start(root, flows)
        while waiting:
            kind = next(
                kind for kind in ANSWERED_FIRST if any(isinstance(each.request, kind) for each in waiting)
            )
            batch = [each for each in waiting if isinstance(each.request, kind)]
            waiting = [each for each in waiting if not isinstance(each.request, kind)]
            for each, value in zip(batch, answer(batch), strict=True):
                advance(each.flow, value)
    finally:  # flows are left open if the engine raises
        root.coroutine.close()
        for coroutine in children:
            coroutine.close()
    return root.results


async def _nothing() -> None:
    """Placeholder coroutine of the root flow; never run."""
