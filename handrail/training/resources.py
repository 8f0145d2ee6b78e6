"""Time and memory of a run: measured, forecast after the first steps, and explained if memory runs out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from handrail._util.memory import enough_memory, peak_resident
from handrail.training.config import Config
from handrail.training.metrics import training_seconds


class Clock:
    """Accumulate seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block. Raises OutOfMemory, naming what to lower, if the block runs out of memory."""
        started = time.perf_counter()
        with enough_memory(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class Forecast:
    """Callable with the arguments of ``progress``; after the first step and again after the second, returns a
    forecast of the remaining time.

    The first step is often slower: a GPU loads its kernels, and a compiled model is compiled, so that only
    the second step says something about the others. It also takes less memory at its peak, because Adam's
    moments are made at its end.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.evaluation = config, 0.0 if not config.eval.sets else None
        self.trained = 0

    def __call__(
        self, step: int, steps: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]
    ) -> str | None:
        self.evaluation = seconds.get("evaluate", self.evaluation)
        each = training_seconds(seconds)
        if not each:  # nothing has been trained yet since the start or the resumption
            return None
        self.trained += 1
        every, left = self.config.eval.every, steps - step
        if self.trained > 2 or not left or (self.trained == 1 and self.config.model.compile):
            return None
        total = left * each + ((left // every if every else 0) + 1) * (self.evaluation or 0.0)
        rest = f"the {left} steps left" if left > 1 else "the step left"
        parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in ("sample", "update") if part in seconds)
        # After a resumption, no evaluation has been timed yet.
        aside = ", without evaluation" if self.evaluation is None else ""
        name, memory = "first", ""
        if self.trained == 2:
            name, memory = "second", f", at most {peak_memory() / 2**30:.1f} GiB"
        return (
            f"{name} step: {each:.1f} s ({parts}){memory}; about {format_duration(total)} for {rest}{aside}"
        )


def peak_memory() -> int:
    """Peak memory of this process in bytes: on its GPU or, without one, in main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved()
    return peak_resident()


def format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
