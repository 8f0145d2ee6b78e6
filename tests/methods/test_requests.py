"""The driver: the order of flows, which requests are answered together, and the keys of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from handrail._util.errors import Paused, UserError
from handrail.methods.requests import Ask, Generate, Pending, drive, gather


def driven(*flows: Any) -> tuple[list[Any], list[list[Pending]]]:
    """Return the results of the flows, and the batches that were answered. The answer to a question is its
    text, that to a prompt its length."""
    batches: list[list[Pending]] = []

    def answer(pending: list[Pending]) -> Sequence[Any]:
        batches.append(pending)
        return [
            each.request.question if isinstance(each.request, Ask) else len(each.request.prompt_ids)
            for each in pending
        ]

    return drive([((place,), flow) for place, flow in enumerate(flows)], answer), batches


async def asks(*questions: str) -> str:
    return "".join([await Ask("anyone", question) for question in questions])


def test_flows_advance_together_and_may_end_at_different_times() -> None:
    results, batches = driven(asks("a", "b", "c"), asks("d"), asks(), asks("e", "f"))
    assert results == ["abc", "d", "", "ef"]
    assert [[each.request.question for each in batch] for batch in batches] == [
        ["a", "d", "e"],
        ["b", "f"],
        ["c"],
    ]


def test_every_request_has_its_own_key_that_depends_only_on_its_flow() -> None:
    async def both() -> Any:
        return await gather(asks("a", "b"), Ask("anyone", "c"), asks("d"))

    (results,), alone = driven(both())
    assert results == ["ab", "c", "d"]
    _, beside = driven(both(), asks("x", "y"))
    keys = [
        [each.key for batch in batches for each in batch if each.request.question in "abcd"]
        for batches in (alone, beside)
    ]
    assert sorted(keys[0]) == sorted(keys[1]) and len(set(keys[0])) == 4


def test_cheap_requests_are_answered_first_so_that_expensive_ones_come_together() -> None:
    async def generates_at_once() -> Any:
        return await Generate([1, 2])

    async def asks_first() -> Any:
        await asks("a", "b")
        return await Generate([1, 2, 3])

    results, batches = driven(generates_at_once(), asks_first())
    assert results == [2, 3] and [len(batch) for batch in batches] == [1, 1, 2]


def test_empty_and_nested_gather() -> None:
    async def nested() -> Any:
        return await gather(gather_of("a", "b"), gather_of())

    async def gather_of(*questions: str) -> list[Any]:
        return await gather(*(asks(question) for question in questions))

    assert driven(nested())[0] == [[["a", "b"], []]]


@pytest.mark.parametrize("fails", ["flow", "engine"])
def test_an_error_reaches_the_caller_and_leaves_no_coroutine_behind(
    fails: str, recwarn: pytest.WarningsRecorder
) -> None:
    closed = []

    async def flow(question: str) -> None:
        try:
            await Ask("anyone", question)
            if fails == "flow":
                raise ZeroDivisionError
            await Ask("anyone", question)
        finally:
            closed.append(question)

    def failing(pending: list[Pending]) -> Sequence[Any]:
        if fails == "engine":
            raise ZeroDivisionError
        return [None for _ in pending]

    answer: Callable[[list[Pending]], Sequence[Any]] = failing
    with pytest.raises(ZeroDivisionError):
        drive([((place,), flow(question)) for place, question in enumerate("abc")], answer)
    assert sorted(closed) == ["a", "b", "c"] and not recwarn.list


def test_awaiting_something_other_than_a_request_is_reported() -> None:
    class Odd:
        def __await__(self) -> Any:
            return (yield self)

    async def flow() -> None:
        await Odd()

    with pytest.raises(TypeError, match="which is no request of handrail.methods.requests"):
        driven(flow())


def test_a_failure_inside_gather_closes_its_siblings(recwarn: pytest.WarningsRecorder) -> None:
    async def failing() -> None:
        raise ZeroDivisionError

    async def parent() -> None:
        await gather(failing(), asks("a"), asks("b"))

    with pytest.raises(ZeroDivisionError):
        driven(parent())
    assert not recwarn.list


async def fails(after: str = "") -> None:
    await asks(*after)
    raise ZeroDivisionError


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("after", ["", "a", "ab"])
def test_a_flow_can_catch_what_fails_inside_gather_and_go_on(
    after: str, nested: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """The sibling "xyz" is closed: what it has not asked yet stays unasked."""

    async def within() -> Any:
        return await gather(asks("p"), gathering())

    async def gathering() -> Any:
        return await gather(asks("x", "y", "z"), fails(after), asks())

    async def catches() -> Any:
        try:
            await (within() if nested else gathering())
        except ZeroDivisionError:
            return await gather(asks("c"), asks("d"))

    results, batches = driven(catches(), asks("m", "n"))
    assert results == [["c", "d"], "mn"]
    asked = [each.request.question for batch in batches for each in batch]
    assert len(asked) == len(set(asked))
    assert {"c", "d", "m", "n"} <= set(asked) and [q in asked for q in "xyz"] == [
        len(after) > 0,
        len(after) > 1,
        False,
    ]
    assert not recwarn.list


def test_an_error_that_nobody_catches_keeps_its_own_traceback() -> None:
    async def parent() -> None:
        await gather(asks("a"), fails("b"))

    with pytest.raises(ZeroDivisionError) as caught:
        driven(parent())
    assert "fails" in {entry.name for entry in caught.traceback}


@pytest.mark.parametrize(("error", "caught"), [(OSError, 2), (UserError, 0), (Paused, 0)])
def test_what_ends_the_run_cannot_be_caught_by_a_flow(error: type[Exception], caught: int) -> None:
    """An engine's other errors are raised in every flow of the batch, and the rest go on."""
    seen = []

    async def catches(prompt: list[int]) -> str:
        try:
            await gather(Generate(prompt))
        except Exception as failed:
            seen.append(failed)
        return await asks("c")

    def answer(pending: list[Pending]) -> Sequence[Any]:
        if isinstance(pending[0].request, Generate):
            raise error("no")
        return [each.request.question for each in pending]

    flows = [((place,), flow) for place, flow in enumerate([catches([1]), asks("a", "b"), catches([2])])]
    if caught:
        assert drive(flows, answer) == ["c", "ab", "c"]
    else:
        with pytest.raises(error):
            drive(flows, answer)
    assert len(seen) == caught
