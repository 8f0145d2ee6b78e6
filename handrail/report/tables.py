"""A comparison as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from handrail.jobs import Job


def comparison_table(methods: Mapping[str, Any], sets: list[str]) -> Table:
    """One line a method: held-out accuracy with its interval, dead groups at both ends, rescues, seconds."""
    table = Table(title="held-out accuracy after training, mean over seeds [95 % interval]", title_justify="left")
    table.add_column("method")
    for name in sets:
        table.add_column(f"{name} (start {next(iter(methods.values()))[name]['start']:.1%})", justify="right")
    for title in ("groups all wrong\nfirst → last", "problems\nrescued", "steps without\nsignal", "seconds"):
        table.add_column(title, justify="right")
    for method, row in methods.items():
        accuracies = [f"{row[name]['mean']:.1%} [{row[name]['low']:.1%}, {row[name]['high']:.1%}]" for name in sets]
        ends = [row["all_wrong"][end] for end in ("first", "last")]
        dead = "no rollouts" if None in ends else " → ".join(f"{end:.0%}" for end in ends)
        table.add_row(method, *accuracies, dead, f"{row['rescued']:.0f}", f"{row['steps_without_signal']:.0f}", f"{row['seconds']:.0f}")
    return table


MEASURES = {
    "distinct_4": "distinct\n4-grams",
    "one_minus_self_bleu": "1 − self-\nBLEU",
    "distinct_first_steps": "first\nsteps",
    "correct_derivations": "deri-\nvations",
}  # fmt: skip


def guidance_table(methods: Mapping[str, Any], sets: list[str]) -> Table | None:
    """How much of what a method trained on the policy did not write, and how different its held-out completions are, a line a set."""
    measured = [measure for measure in MEASURES if any(measure in next(iter(methods.values()))[name]["diversity"] for name in sets)]
    if not measured and not any(row["off_policy"] for row in methods.values()):
        return None
    table = Table(title="what it learnt from" + "; diversity of held-out completions after training" * bool(measured), title_justify="left")
    table.add_column("method")
    for title in ("off-\npolicy", "sal-\nvaged"):
        table.add_column(title, justify="right")
    if measured:
        table.add_column("held out")
    for measure in measured:
        table.add_column(MEASURES[measure], justify="right")
    for method, row in methods.items():
        first = [method, *("–" if row[key] is None else f"{row[key]:.1%}" for key in ("off_policy", "salvaged"))]
        if not measured:
            table.add_row(*first)
        for name in sets if measured else []:
            values = [row[name]["diversity"].get(measure, {}).get("end") for measure in measured]
            table.add_row(*first, name, *("–" if value is None else f"{value:.3f}" for value in values))
            first = [""] * 3
    return table


def evaluation_table(sets: Mapping[str, Any]) -> Table:
    """A line a figure, a column a set."""
    table = Table("", *(f"{name}\n{figures['problems']} × {figures['samples']}" for name, figures in sets.items()))
    keys = dict.fromkeys(key for figures in sets.values() for key in figures)
    for key in keys:
        if key not in ("problems", "samples"):
            table.add_row(key.removeprefix("diversity/").replace("_", " "), *(_figure(key, figures.get(key)) for figures in sets.values()))
    return table


def _figure(key: str, value: Any) -> str:
    if isinstance(value, dict) and value["low"] is None:
        return f"{value['mean']:.1f}"
    if isinstance(value, dict):
        return ("{mean:.1f} [{low:.1f}, {high:.1f}]" if key == "tokens" else "{mean:.1%} [{low:.1%}, {high:.1%}]").format(**value)
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def probe_table(found: Mapping[str, Any]) -> Table:
    """Groups by their size: how many are dead, and what that costs."""
    table = Table(title="groups by their size, shares of all groups [95 % interval]", title_justify="left")
    for column in ("size", "all wrong", "all right", "rollouts wasted in a pass"):
        table.add_column(column, justify="right")
    for size, each in found["groups"].items():
        table.add_row(size, _figure("", each["all_wrong"]), _figure("", each["all_right"]), f"{each['wasted_rollouts']:.0f}")
    return table


def curves(all_jobs: list[Job], sets: list[str], file: Path) -> None:
    """Held-out accuracy, and the share of groups that are all wrong, against the step: a line a method, a band over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((*panes,),) = pyplot.subplots(1, len(sets) + 1, figsize=(4.6 * (len(sets) + 1), 3.8), layout="constrained", squeeze=False)
    for name in dict.fromkeys(job.name for job in all_jobs):
        runs = [_read(job.directory / "metrics.jsonl") for job in all_jobs if job.name == name]
        for pane, key in zip(panes, [*(f"eval/{held_out}/mean" for held_out in sets), "all_wrong"], strict=True):
            lines = [_smooth(run) if key == "all_wrong" else [(row["step"], row[key]) for row in run if key in row] for run in runs]
            steps = [step for step, _ in lines[0]]
            columns = list(zip(*([value for _, value in line] for line in lines), strict=True))
            (drawn,) = pane.plot(steps, [mean(column) for column in columns], label=name)
            pane.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=drawn.get_color(), alpha=0.15, linewidth=0)
    for pane, title in zip(panes, [*(f"held-out {name} accuracy" for name in sets), "groups all wrong"], strict=True):
        pane.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
        pane.grid(alpha=0.25)
    panes[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _smooth(run: list[dict[str, Any]], window: int = 10) -> list[tuple[int, float]]:
    """The share of all-wrong groups, a mean over windows of steps."""
    rows = run[1:]
    out = []
    for at in range(0, len(rows), window):
        part = rows[at : at + window]
        graded = sum(row[f"groups/{kind}"] for row in part for kind in ("all_wrong", "mixed", "all_right"))
        out.append((part[-1]["step"], sum(row["groups/all_wrong"] for row in part) / max(1, graded)))
    return out
