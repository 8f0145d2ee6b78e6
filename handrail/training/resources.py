"""What a run takes of the machine: measured, forecast after the first step, and explained where it was too much."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from handrail._util.memory import enough_memory, peak_resident
from handrail.training.config import Config
from handrail.training.stopping import training_seconds


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Raises UserError, with what to lower, where the block runs out of memory."""
        started = time.perf_counter()
        with enough_memory(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class Forecast:
    """Called after every step as ``train`` calls ``progress``; says once how long the rest will take."""

    def __init__(self, config: Config) -> None:
        self.config, self.evaluation = config, 0.0 if not config.eval.sets else None
        self.said = False

    def __call__(
        self, step: int, steps: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]
    ) -> str | None:
        self.evaluation = seconds.get("evaluate", self.evaluation)
        if self.said or not (
            each := training_seconds(seconds)
        ):  # nothing was trained: before the first step, or the resumed one
            return None
        self.said = True
        every, left = self.config.eval.every, steps - step
        if not left:
            return None
        total = left * each + ((left // every if every else 0) + 1) * (self.evaluation or 0.0)
        parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in ("sample", "update") if part in seconds)
        aside = ", evaluation aside" if self.evaluation is None else ""  # resumed: none was seen yet
        return (
            f"first step: {each:.1f} s ({parts}), at most {peak_memory() / 2**30:.1f} GiB; "
            f"about {spoken(total)} for the {left} steps left{aside}"
        )


def peak_memory() -> int:
    """The most memory that this process has had on its GPU, or without one at all, in bytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved()
    return peak_resident()


def spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
