"""SIGINT and SIGTERM as a wish to stop: heard at once, granted where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self, TypeVar

from handrail._util.errors import Paused

T = TypeVar("T")


class Interrupts:
    """A context manager in which the first of the two signals only asks to stop; the second one ends the process at once.

    A signal that is ignored stays ignored, and outside the main thread, where none is delivered, nothing changes.
    """

    active: ClassVar[list[Interrupts]] = []

    def __init__(self, granted: str) -> None:
        """``granted``: what a person is told when they ask."""
        self.granted = granted
        self.asked = ""
        """By what, a signal's name for example; nothing if no stop was asked for."""
        self._abandonable = False
        self._before: dict[signal.Signals, Any] = {}

    @classmethod
    def ask(cls, why: str) -> None:
        """Does what a first signal does, wherever one is waited for."""
        for each in cls.active:
            each.asked = each.asked or why

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._heard)
        self.active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = signal.Signals(number).name
        with contextlib.suppress(
            OSError
        ):  # nobody may be left to read it; and not print(), which the signal may have interrupted
            os.write(2, f"\n{self.asked}: {self.granted}; once more stops at once\n".encode())

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block that may be left halfway, which is what ``check`` does in it."""
        self._abandonable = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._abandonable = False

    def check(self) -> None:
        """Raises Paused if a stop was asked for and what is being done may be left halfway."""
        if self.asked and self._abandonable:
            raise Paused(f"stopped by {self.asked}")


def results(futures: Sequence[Future[T]]) -> list[T]:
    """Their results when all are there. Raises what one of them raises, and Paused as soon as a stop is asked for and may be granted."""
    left: set[Future[T]] = set(futures)
    while left:
        done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        for each in Interrupts.active:
            each.check()
    return [future.result() for future in futures]
