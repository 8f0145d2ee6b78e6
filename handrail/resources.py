"""What a run takes of the machine: measured, forecast after the first step, and explained where it was too much."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from handrail.config import Config
from handrail.errors import UserError
from handrail.memory import peak_resident
from handrail.metrics import TRAINING_PARTS

ADVICE = {
    "sample": "sampling; lower rollout.batch_size (completions drawn at once), rollout.max_tokens or sampler.cache_gib",
    "guide": "guiding; lower rollout.batch_size or train.micro_batch_tokens (tokens scored at once)",
    "update": 'updating; lower train.micro_batch_tokens, set model.gradient_checkpointing = true or model.dtype = "bfloat16", add [lora]',
    "evaluate": "evaluating; lower rollout.batch_size (completions drawn at once) or rollout.max_tokens",
}


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Raises UserError, with what to lower, where the block runs out of memory."""
        started = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"out of memory while {ADVICE.get(name, name)}; what was checkpointed can be resumed") from error
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def out_of_memory(error: Exception) -> bool:
    """torch raises one kind of error for a GPU, and for a CPU any RuntimeError with these words in it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Forecast:
    """Called after every step with its number, the number of steps, its metrics and seconds; says once how long the rest will take."""

    def __init__(self, config: Config) -> None:
        self.config, self.evaluation = config, 0.0
        self.said = False

    def __call__(self, step: int, steps: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> str | None:
        self.evaluation = seconds.get("evaluate", self.evaluation)
        if step == 0 or self.said:
            return None
        self.said = True
        train, every = self.config.train, self.config.eval.every
        each = sum(seconds.get(part, 0.0) for part in TRAINING_PARTS)
        left = steps - step
        if train.token_budget and metrics["tokens/sampled"]:
            left = min(left, train.token_budget // metrics["tokens/sampled"])
        total = left * each + ((left // every if every else 0) + 1) * self.evaluation
        if train.seconds_budget:
            total = min(total, train.seconds_budget)
        parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in ("sample", "update") if part in seconds)
        return (
            f"first step: {each:.1f} s ({parts}), at most {peak_memory() / 2**30:.1f} GiB; about {spoken(total)} for the {left} steps left"
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
