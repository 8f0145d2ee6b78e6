"""When a run ends (steps, sampled tokens or seconds), and the learning rate, which depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from handrail.training.config import TrainConfig
from handrail.training.metrics import tokens_sampled, training_seconds


class StopCriteria:
    """``train.steps``, ``train.token_budget`` and ``train.seconds_budget``; a step that exceeds a budget
    still completes."""

    def __init__(
        self, config: TrainConfig, steps: Sequence[Mapping[str, Any]], timings: Sequence[Mapping[str, Any]]
    ) -> None:
        """``steps`` and ``timings``: the lines of the steps that the run has already completed."""
        self.config = config
        self.tokens = sum(map(tokens_sampled, steps))
        self.seconds = sum(map(training_seconds, timings))

    def spend(self, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Add one step to what is used."""
        self.tokens += tokens_sampled(metrics)
        self.seconds += training_seconds(seconds)

    def last_step(self, step: int) -> int:
        """Expected last step, given the budgets and what the steps up to ``step`` used of them."""
        uses = ((self.config.token_budget, self.tokens), (self.config.seconds_budget, self.seconds))
        return min(
            [
                self.config.steps,
                *(max(step, math.ceil(limit * step / used)) for limit, used in uses if limit and used),
            ]
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of ``step``.

        It rises from 0 over the warm-up, then decays with the used share of the remaining steps or of the
        token budget, whichever is larger.
        """
        c = self.config
        before = step - 1
        rise = min(1.0, before / c.warmup_steps) if c.warmup_steps else 1.0
        of_steps = (before - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        of_tokens = self.tokens / c.token_budget if c.token_budget else 0.0
        share = min(1.0, max(0.0, of_steps, of_tokens))
        fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
        return c.learning_rate * rise * fall[c.schedule]

    @property
    def spent(self) -> Literal["", "tokens", "seconds"]:
        """Name of the spent budget; empty if none is spent."""
        if self.config.token_budget is not None and self.tokens >= self.config.token_budget:
            return "tokens"
        if self.config.seconds_budget is not None and self.seconds >= self.config.seconds_budget:
            return "seconds"
        return ""
