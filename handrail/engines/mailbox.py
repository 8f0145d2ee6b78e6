"""Mailbox of a run under Ray: events for the driver, a stop for the workers, and why the run ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

FRUITLESS_STARTS = 3
"""A run that is started this many times in a row without finishing a new step is not started again."""
TOGETHER = 5.0
"""Seconds for all workers to end with an error, before Ray is told that one of them failed."""


class Mailbox:
    """Actor between the driver and the workers, which may be replaced."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.arrived, self.all_ended, self.stop_requested = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.why_stop = ""
        self.error: Exception | None = None
        self.traceback = ""
        self.furthest, self.newest, self.ended, self.starts, self.fruitless = -1, -1, 0, 0, 0
        self.workers = 0

    async def begin(self, workers: int = 1) -> int:
        """Note that the workers start; return how many times they did, 0 if the run has ended already.

        A start with more workers than before follows no loss.
        """
        self.fruitless += workers <= self.workers or self.starts == 0
        self.starts, self.workers, self.ended = self.starts + 1, workers, 0
        self.newest = -1
        self.all_ended.clear()
        if self.error is None and self.fruitless > FRUITLESS_STARTS:
            self.error = RuntimeError(
                f"the workers were lost {FRUITLESS_STARTS} times in a row without finishing a step; "
                f"{self.traceback or 'each time they were killed, perhaps out of memory'}"
            )
        if self.error is None and self.starts > 1:
            await self.post("restart")
        return 0 if self.error else self.starts

    async def post(self, *event: Any) -> None:
        self.events.append(event)
        if event[0] == "step":
            if event[1] < self.newest:  # the run itself went back to an earlier checkpoint
                self.furthest = event[1]
            elif event[1] > self.furthest:
                self.furthest, self.fruitless = event[1], 0
            self.newest = event[1]
        self.arrived.set()

    async def take(self, seconds: float) -> list[tuple[Any, ...]]:
        """Remove and return all events; wait up to ``seconds`` for one."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.arrived.wait(), seconds)
        self.arrived.clear()
        taken, self.events = self.events, []
        return taken

    async def stop(self, why: str) -> bool:
        self.why_stop = why
        self.stop_requested.set()
        return True

    async def wait_for_stop(self) -> str:
        await self.stop_requested.wait()
        return self.why_stop

    async def end(self, error: Exception, workers: int) -> bool:
        """End the run with ``error``; True if all ``workers`` do so within a short time."""
        self.error, self.ended = self.error or error, self.ended + 1
        if self.ended == workers:
            self.all_ended.set()
        try:
            await asyncio.wait_for(self.all_ended.wait(), TOGETHER)
        except TimeoutError:
            return False
        return True

    async def fail(self, text: str) -> None:
        """Keep the traceback of an unexpected exception."""
        self.traceback = text

    async def outcome(self) -> Exception | None:
        return self.error
