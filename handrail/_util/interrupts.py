"""Graceful stop on SIGINT and SIGTERM: a signal is recorded at once and acted on when no work is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self, TypeVar

from handrail._util.errors import Paused

T = TypeVar("T")
U = TypeVar("U")


class Interrupts:
    """Context manager in which the first SIGINT or SIGTERM requests a stop and the second ends the process.

    A signal that was ignored stays ignored. Outside the main thread, which alone receives signals, the
    context manager installs no handlers.
    """

    active: ClassVar[list[Interrupts]] = []

    def __init__(self, granted: str) -> None:
        """``granted`` is printed after a first signal: it says what will happen before the stop."""
        self.granted = granted
        self.asked = ""
        """What requested the stop, such as the name of a signal; empty if nothing did."""
        self._abandonable = False
        self._before: dict[signal.Signals, Any] = {}

    @classmethod
    def ask(cls, why: str) -> None:
        """Request a stop from every active instance, as a first signal does."""
        for each in cls.active:
            each.asked = each.asked or why

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        self.active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = signal.Signals(number).name
        # os.write(), because the signal may have interrupted a print(); stderr may be closed already.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.asked}: {self.granted}; send it again to stop at once\n".encode())

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Mark a block that may be abandoned halfway: only in such a block does ``check`` raise."""
        self._abandonable = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._abandonable = False

    def check(self) -> None:
        """Raise Paused if a stop was requested and the current block may be abandoned."""
        if self.asked and self._abandonable:
            raise Paused(f"stopped by {self.asked}")


def in_daemons(work: Callable[[U], T], items: Sequence[U], threads: int) -> list[Future[T]]:
    """Start ``work`` on all items, ``threads`` at a time; return their futures.

    Unlike an executor's, the threads are daemons: a call that hangs does not keep a stopped process alive.
    """
    futures: list[Future[T]] = [Future() for _ in items]
    todo = deque(zip(futures, items, strict=True))

    def run() -> None:
        while todo:
            with contextlib.suppress(IndexError):  # another thread may have taken the last one
                future, item = todo.popleft()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(work(item))
                    except BaseException as error:
                        future.set_exception(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    return futures


def results(futures: Sequence[Future[T]]) -> list[T]:
    """Wait for all futures and return their results in order.

    Raises the exception of the first future that fails, and Paused as soon as a stop is requested inside an
    abandonable block.
    """
    left: set[Future[T]] = set(futures)
    while left:
        done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        for each in Interrupts.active:
            each.check()
    return [future.result() for future in futures]
