"""Metrics as points to draw: means over windows of steps, and over seeds with the band they span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

from handrail.eval.report.read import Run

KINDS = ("all_wrong", "mixed", "all_right")
WINDOWS = 40  # at most so many points a line, where every step has a figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The mean over seeds at a step, and the least and the greatest of them."""

    step: int
    mean: float
    low: float
    high: float


def over_seeds(seeds: Sequence[Mapping[int, float]]) -> list[Point]:
    """One point for every step that any seed has a figure for."""
    points = []
    for step in sorted({step for seed in seeds for step in seed}):
        values = [seed[step] for seed in seeds if step in seed]
        points.append(Point(step, mean(values), min(values), max(values)))
    return points


def window_size(runs: Sequence[Run]) -> int:
    """How many steps a window has, the same for all runs of a report."""
    return max(1, -(-max((run.last_step for run in runs), default=0) // WINDOWS))


def windows(rows: Sequence[Row], size: int) -> dict[int, list[Row]]:
    """The steps' rows in windows, each under its last step; the last window may be shorter."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return {part[-1]["step"]: list(part) for part in parts}


def evaluated(run: Run, held_out: str) -> dict[int, float]:
    """Accuracy on a held-out set, on the steps that evaluated."""
    key = f"eval/{held_out}/mean"
    return {row["step"]: row[key] for row in run.metrics if key in row}


def windowed(run: Run, key: str, size: int) -> dict[int, float]:
    """The mean of a metric over windows of steps, leaving out those that have no figure."""
    known = {
        step: [row[key] for row in part if row.get(key) is not None]
        for step, part in windows(run.steps, size).items()
    }
    return {step: mean(values) for step, values in known.items() if values}


def guided(run: Run, size: int) -> dict[int, float]:
    """All-wrong groups that were guided, up to and including the last step of every window."""
    counts = accumulate(row.get("groups/guided", 0) for row in run.steps)
    so_far = dict(zip((row["step"] for row in run.steps), counts, strict=True))
    return {step: so_far[step] for step in windows(run.steps, size)}


def group_shares(runs: Sequence[Run], size: int) -> dict[int, tuple[float, ...]]:
    """The shares of KINDS among the groups with rollouts, in windows of steps, all seeds together."""
    counts: dict[int, list[int]] = {}
    for run in runs:
        for step, part in windows(run.steps, size).items():
            here = [sum(row.get(f"groups/{kind}", 0) for row in part) for kind in KINDS]
            counts[step] = [a + b for a, b in zip(counts.get(step, [0, 0, 0]), here, strict=True)]
    return {
        step: tuple(n / sum(kinds) for n in kinds) for step, kinds in sorted(counts.items()) if sum(kinds)
    }


def share_all_wrong(run: Run, size: int) -> dict[int, float]:
    """The share of all-wrong groups in windows of steps; none where nothing was sampled."""
    return {step: shares[0] for step, shares in group_shares([run], size).items()}
