"""Make the content of docs/smollm2.md from the comparison that it names: the metrics of every run, a plot,
and the table, which is printed.

Run ``python -m benchmarks.smollm2 runs/smollm2-gsm``. Without a directory, the metrics that were copied
earlier are used.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

DOCS = Path("docs/smollm2")
SETS = ("new_numbers", "new_templates")
WINDOW = 5
"""Number of steps over which the reward is averaged."""


def keep(comparison: Path) -> None:
    """Copy the metrics of the runs that have ended."""
    for summary in sorted(comparison.glob("*/seed-*/summary.json")):
        name, seed = summary.parent.parent.name, summary.parent.name
        (DOCS / f"{name}-{seed}.jsonl").write_text((summary.parent / "metrics.jsonl").read_text())


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    def figures(line: dict[str, Any], name: str) -> str:
        mean, low, high = (100 * line[f"eval/{name}/{key}"] for key in ("mean", "low", "high"))
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    rows = [
        "| run | new numbers | new templates | groups all wrong, first → last five steps | tokens sampled | "
        "steps |",
        "|---|---|---|---|---|---|",
    ]
    rows.append(
        f"| start | {' | '.join(figures(next(iter(runs.values()))[0], name) for name in SETS)} | | | |"
    )
    for name, (_, *steps) in runs.items():
        wrong = [
            sum(s["groups/all_wrong"] for s in part) / sum(s["groups/all"] for s in part)
            for part in (steps[:WINDOW], steps[-WINDOW:])
        ]
        rows.append(
            f"| {name} | {' | '.join(figures(steps[-1], each) for each in SETS)} | {wrong[0]:.0%} → "
            f"{wrong[1]:.0%} "
            f"| {sum(s['tokens/sampled'] for s in steps):,} | {len(steps)} |"
        )
    return "\n".join(rows)


def picture(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = dict(
        zip(
            ("reward of rollouts, mean of five steps", "accuracy, new numbers"),
            figure.subplots(1, 2),
            strict=True,
        )
    )
    reward, accuracy = panels.values()
    for name, (start, *steps) in runs.items():
        spent = [0, *accumulate(step["tokens/sampled"] for step in steps)]
        rewards = [step["reward"] for step in steps]
        means = [
            sum(part) / len(part)
            for end in range(1, len(steps) + 1)
            if (part := rewards[max(0, end - WINDOW) : end])
        ]
        reward.plot(spent[1:], means, label=name)
        at = [
            (tokens, line)
            for tokens, line in zip(spent, [start, *steps], strict=True)
            if "eval/new_numbers/mean" in line
        ]
        mean, low, high = (
            np.array([line[f"eval/new_numbers/{key}"] for _, line in at]) for key in ("mean", "low", "high")
        )
        accuracy.errorbar(
            [tokens for tokens, _ in at], mean, [mean - low, high - mean], marker="o", markersize=3, capsize=2
        )
    for title, axes in panels.items():
        axes.set(title=title, xlabel="tokens sampled", ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    reward.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for comparison in sys.argv[1:]:
        keep(Path(comparison))
    files = {file.stem.replace("-seed-", ", seed "): file for file in sorted(DOCS.glob("*.jsonl"))}
    runs = {
        name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()
    }
    with matplotlib.rc_context({"svg.hashsalt": "handrail"}):
        picture(runs).savefig("docs/images/smollm2.svg", metadata={"Date": None})
    print(table(runs))


if __name__ == "__main__":
    main()
