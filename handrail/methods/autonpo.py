from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import exp
from typing import Any

from pydantic import Field

from handrail.data.answers import Answer
from handrail.methods.context import Context
from handrail.methods.replaying import Replaying, ReplaySettings
from handrail.types.trajectory import Group


class AutoNpoSettings(ReplaySettings):
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Share of the previous value in the moving averages of reward and entropy."""
    patience: int = Field(20, ge=1)
    """The run is on a plateau if, over this many steps, the average reward rose by less than ``min_gain`` and
    the average entropy fell."""
    min_gain: float = Field(0.01, ge=0)
    """Rise of the average reward over ``patience`` steps that is too small to go on."""
    farthest: int = Field(80, ge=1)
    """Number of steps that the run may go back."""
    probe_problems: int = Field(64, ge=1)
    """Number of problems to probe, of those whose rollouts all failed in the last ``farthest`` steps."""
    probe_rollouts: int = Field(4, ge=1)
    """Number of completions of each of them."""
    most: int = Field(3, ge=1)
    """Number of times that a run may go back."""


class AutoNpo(Replaying[AutoNpoSettings]):
    """AutoNPO: on a plateau, go back some steps and train them again with the answers found since.

    rollout: G samples of each problem.
    guide: nothing, until the run is on a plateau. Then the policy tries the problems that it failed lately,
        and the run goes back to the checkpoint Δ steps ago with the largest Q/V: Q is the share of right
        completions of the problems failed in these Δ steps, V = exp(KL(policy || checkpoint) per token).
        Until it is back at the plateau, right completions are replayed as in NPO.
    credit: GRPO's over the mixed group.
    surrogate: the clipped ratio; that of an answer's tokens is π/q with the later policy's q.

    The plateau's test and all its constants are ours; the paper's are not known.
    """

    name, source, status, Settings = "autonpo", "arXiv 2604.20733", "reconstruction", AutoNpoSettings
    needs_rollback = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.answers: dict[str, list[Answer]] = {}
        self.until = 0
        """The plateau that the run went back from; answers are replayed up to this step."""

    async def guide(self, group: Group, ctx: Context) -> Group:
        return await super().guide(group, ctx) if ctx.step <= self.until else group

    def on_plateau(self, steps: Sequence[Mapping[str, Any]]) -> bool:
        """True if the metrics of the steps since the last plateau, oldest first, show another one."""
        patience = self.settings.patience
        rewards, entropies = (
            self.averages([step[key] for step in steps if step.get(key) is not None])
            for key in ("reward", "entropy")
        )
        if min(len(rewards), len(entropies)) <= patience:
            return False
        gained = rewards[-1] - rewards[-1 - patience]
        return gained < self.settings.min_gain and entropies[-1] < entropies[-1 - patience]

    def averages(self, values: Sequence[float]) -> list[float]:
        keep = self.settings.smoothing
        return list(accumulate(values, lambda before, value: keep * before + (1 - keep) * value))

    @staticmethod
    def best(solved: Mapping[int, float], divergence: Mapping[int, float]) -> int | None:
        """The Δ with the largest Q/V, the smaller one of equals; None if nothing was solved.

        ``solved``: Q by Δ. ``divergence``: KL per token, in nats, by Δ.
        """
        useful = [delta for delta, share in solved.items() if share > 0]
        return max(useful, key=lambda delta: (solved[delta] / exp(divergence[delta]), -delta), default=None)
