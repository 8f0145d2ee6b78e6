"""Requests that methods await, and the driver that runs many verbs concurrently.

An engine answers the requests; it alone decides how they are batched and where they run.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from handrail._util.errors import Paused, UserError
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

    ``max_tokens`` defaults to ``rollout.max_tokens``. ``model`` is "policy", or one of ``Method.trained``.
    """

    prompt_ids: list[int]
    n: int = 1
    max_tokens: int | None = None
    model: str = "policy"


@dataclass(frozen=True, eq=False)
class Score(Request):
    """Score tokens (int64 [T]) that follow a prompt. Answer: log-probabilities, float32 [T], without
    gradient; all NaN if the model's context has no room for prompt and tokens.

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
    """Find the likeliest token at every position of ``token_ids`` (int64 [T]). Answer: int64 [T], or None if
    the model's context has no room for prompt and tokens.

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
    """Await several requests or coroutines concurrently, so that an engine can batch them.

    Raises the first error that one of them raises, and closes the others.
    """
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


@dataclass(eq=False)
class _Running:
    """A started flow and, while it awaits ``gather``, the flows that it waits for."""

    coroutine: Flow
    key: tuple[object, ...]
    parent: _Running | None = None
    requests: int = 0
    children: Sequence[_Running] = ()
    ended: bool = False
    result: Any = None
    error: Exception | None = None

    def step(self, value: Any, error: Exception | None) -> Any:
        """Resume with an answer or an error; return the next request, or None if the flow has ended."""
        try:
            return self.coroutine.send(value) if error is None else self.coroutine.throw(error)
        except StopIteration as end:
            self.result = end.value
        except Exception as raised:
            self.error = raised
        self.ended = True
        return None

    def close(self) -> None:
        """End the flow and its children without a result."""
        self.ended = True
        for child in self.children:
            child.close()
        self.coroutine.close()


def drive(
    flows: Sequence[tuple[tuple[object, ...], Flow]], answer: Callable[[list[Pending]], Sequence[Any]]
) -> list[Any]:
    """Run every (key, coroutine) to completion and return the results in order.

    All flows advance to their next request; ``answer`` then receives all waiting requests of one kind and
    returns one answer for each. Batches never depend on timing, so runs resume exactly.

    An error in a flow is raised in the ``gather`` that awaits it, and by ``drive`` if no flow catches it. An
    error in ``answer`` is raised in every flow of the batch, except UserError and Paused: the run cannot go
    on after them, so ``drive`` raises them at once.
    """
    return _Driver([_Running(coroutine, key) for key, coroutine in flows], answer).run()


class _Driver:
    def __init__(self, flows: list[_Running], answer: Callable[[list[Pending]], Sequence[Any]]) -> None:
        self.flows, self.answer = flows, answer
        self.waiting: list[Pending] = []

    def run(self) -> list[Any]:
        try:
            for flow in self.flows:
                self.advance(flow)
            while self.waiting:
                batch = self.next_batch()
                values, error = self.answers(batch)
                for each, value in zip(batch, values, strict=True):
                    self.advance(each.flow, value, error)
        finally:  # flows are left open after an error
            for flow in self.flows:
                flow.close()
        return [flow.result for flow in self.flows]

    def next_batch(self) -> list[Pending]:
        """Take all waiting requests of the cheapest kind."""
        kind = next(
            kind for kind in ANSWERED_FIRST if any(isinstance(each.request, kind) for each in self.waiting)
        )
        batch = [each for each in self.waiting if isinstance(each.request, kind)]
        self.waiting = [each for each in self.waiting if not isinstance(each.request, kind)]
        return batch

    def answers(self, batch: list[Pending]) -> tuple[Sequence[Any], Exception | None]:
        try:
            return self.answer(batch), None
        except (UserError, Paused):
            raise
        except Exception as error:
            return [None] * len(batch), error

    def advance(self, flow: _Running, value: Any = None, error: Exception | None = None) -> None:
        """Resume a flow, unless it was closed, up to its next request."""
        if flow.ended:
            return
        request = flow.step(value, error)
        if flow.ended:
            return self.finish(flow)
        if not isinstance(request, ANSWERED_FIRST + (Gather,)):
            raise TypeError(f"a method awaits {request!r}, which is no request of handrail.methods.requests")
        key = (*flow.key, flow.requests)
        flow.requests += 1
        if not isinstance(request, Gather):
            self.waiting.append(Pending(request, key, flow))
            return
        children = [_Running(child, (*key, place), flow) for place, child in enumerate(request.flows)]
        flow.children = children
        for child in children:
            self.advance(child)
        if not children:
            self.advance(flow, [])

    def finish(self, flow: _Running) -> None:
        """Give a flow's error, or all results once there are, to the flow that awaits them."""
        parent = flow.parent
        if flow.error is not None:
            if parent is None:
                raise flow.error
            for child in parent.children:
                child.close()
            self.waiting = [each for each in self.waiting if not each.flow.ended]
            self.advance(parent, error=flow.error)
        elif parent is not None and all(child.ended for child in parent.children):
            self.advance(parent, [child.result for child in parent.children])
