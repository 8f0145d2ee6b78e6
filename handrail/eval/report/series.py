"""Turn metrics into points: means over windows of steps, and over seeds with the range of the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

from handrail.eval.report.read import Run

KINDS = ("all_wrong", "mixed", "all_right")
WINDOWS = 40
"""The most points of a line for figures that every step has."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The mean over seeds at a step, with the lowest and the highest seed."""

    step: int
    mean: float
    low: float
    high: float


def over_seeds(seeds: Sequence[Mapping[int, float]]) -> list[Point]:
    """Return a point for every step at which any seed has a figure."""
    points = []
    for step in sorted({step for seed in seeds for step in seed}):
        values = [seed[step] for seed in seeds if step in seed]
        points.append(Point(step, mean(values), min(values), max(values)))
    return points


def window_size(runs: Sequence[Run]) -> int:
    """Return the number of steps in a window, the same for all runs of a report."""
    return max(1, -(-max((run.last_step for run in runs), default=0) // WINDOWS))


def windows(rows: Sequence[Row], size: int) -> dict[int, list[Row]]:
    """Divide the rows into windows, keyed by their last step; the last window may be shorter."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return {part[-1]["step"]: list(part) for part in parts}


def evaluated(run: Run, held_out: str) -> dict[int, float]:
    """Return the accuracy on a held-out set at the steps that evaluated."""
    key = f"eval/{held_out}/mean"
    return {row["step"]: row[key] for row in run.metrics if key in row}


def windowed(run: Run, key: str, size: int) -> dict[int, float]:
    """Return the mean of a metric over windows of steps, without windows that have no figure."""
    known = {
        step: [row[key] for row in part if row.get(key) is not None]
        for step, part in windows(run.steps, size).items()
    }
    return {step: mean(values) for step, values in known.items() if values}


def guided(run: Run, size: int) -> dict[int, float]:
    """Return the number of all-wrong groups guided so far, at the last step of every window."""
    counts = accumulate(row.get("groups/guided", 0) for row in run.steps)
    so_far = dict(zip((row["step"] for row in run.steps), counts, strict=True))
    return {step: so_far[step] for step in windows(run.steps, size)}


def group_shares(runs: Sequence[Run], size: int) -> dict[int, tuple[float, ...]]:
    """Return the shares of KINDS among the groups with rollouts, in windows of steps, over all seeds."""
    counts: dict[int, list[int]] = {}
    for run in runs:
        for step, part in windows(run.steps, size).items():
            here = [sum(row.get(f"groups/{kind}", 0) for row in part) for kind in KINDS]
            counts[step] = [a + b for a, b in zip(counts.get(step, [0, 0, 0]), here, strict=True)]
    return {
        step: tuple(n / sum(kinds) for n in kinds) for step, kinds in sorted(counts.items()) if sum(kinds)
    }


def share_all_wrong(run: Run, size: int) -> dict[int, float]:
    """Return the share of all-wrong groups in windows of steps, without windows that sampled nothing."""
    return {step: shares[0] for step, shares in group_shares([run], size).items()}
