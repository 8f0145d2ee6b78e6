"""Format figures as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Methods = Mapping[str, Any]
"""Map a method to its figures over the seeds, as in a comparison's summary."""


def comparison_table(methods: Methods, sets: list[str]) -> Table:
    """Return a table with held-out accuracy before and after training, and the share of all-wrong groups.

    Each method is a row. A terminal of 80 columns has room for two sets.
    """
    table = Table(title="held-out accuracy before → after training [95 % interval]", title_justify="left")
    table.add_column("method")
    for name in sets:
        table.add_column(name, justify="right")
    sampled = any(row["all_wrong"]["first"] is not None for row in methods.values())
    if sampled:
        table.add_column("groups all wrong\nfirst → last", justify="right")
    for method, row in methods.items():
        cells = [
            "{start:.1%} → {mean:.1%}\n[{low:.1%}, {high:.1%}]".format(**row[name]) if name in row else "–"
            for name in sets
        ]
        ends = [row["all_wrong"][end] for end in ("first", "last")]
        wrong = "no rollouts" if None in ends else " → ".join(f"{end:.0%}" for end in ends)
        table.add_row(method, *cells, *[wrong] * sampled)
    return table


def training_table(methods: Methods, sets: list[str]) -> Table:
    """Return a table with what each method learned from; columns with only zeros or gaps are left out."""
    kinds = {
        "all-wrong\ngroups guided": ("guided", "{:.0f}"),
        "off-policy\ntokens": ("off_policy", "{:.1%}"),
        "rollouts\nsalvaged": ("salvaged", "{:.1%}"),
        "steps without\nsignal": ("steps_without_signal", "{:.0f}"),
        "training\nseconds": ("seconds", "{:.0f}"),
    }
    shown = {
        title: kind for title, kind in kinds.items() if any(row.get(kind[0]) for row in methods.values())
    }
    table = Table(title="what it learned from", title_justify="left")
    table.add_column("method")
    for title in shown:
        table.add_column(title, justify="right")
    for method, row in methods.items():
        table.add_row(
            method, *("–" if row.get(key) is None else form.format(row[key]) for key, form in shown.values())
        )
    return table


MEASURES = {
    "distinct_4": "distinct\n4-grams",
    "one_minus_self_bleu": "1 − self-\nBLEU",
    "distinct_first_steps": "first\nsteps",
    "correct_derivations": "deri-\nvations",
}  # fmt: skip


def diversity_table(methods: Methods, sets: list[str]) -> Table | None:
    """Return a table with the diversity of held-out completions, a row per set; None if not measured."""
    measured = [
        measure
        for measure in MEASURES
        if any(measure in row[name]["diversity"] for row in methods.values() for name in sets if name in row)
    ]
    if not measured:
        return None
    table = Table(
        "method", "held out", title="diversity of held-out completions after training", title_justify="left"
    )
    for measure in measured:
        table.add_column(MEASURES[measure], justify="right")
    for method, row in methods.items():
        for place, name in enumerate(name for name in sets if name in row):
            values = [row[name]["diversity"].get(measure, {}).get("end") for measure in measured]
            table.add_row(
                "" if place else method, name, *("–" if value is None else f"{value:.3f}" for value in values)
            )
    return table


def evaluation_table(sets: Mapping[str, Any]) -> Table:
    """Return a table with a row for each figure and a column for each set."""
    table = Table(
        "", *(f"{name}\n{figures['problems']} × {figures['samples']}" for name, figures in sets.items())
    )
    keys = dict.fromkeys(key for figures in sets.values() for key in figures)
    for key in keys:
        if key not in ("problems", "samples", "first_unverified"):
            table.add_row(
                key.removeprefix("diversity/").replace("_", " "),
                *(_figure(key, figures.get(key)) for figures in sets.values()),
            )
    return table


def _figure(key: str, value: Any) -> str:
    if isinstance(value, dict) and value["low"] is None:
        return f"{value['mean']:.1f}"
    if isinstance(value, dict):
        return (
            "{mean:.1f} [{low:.1f}, {high:.1f}]"
            if key in ("tokens", "routed_attempts")
            else "{mean:.1%} [{low:.1%}, {high:.1%}]"
        ).format(**value)
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def probe_table(found: Mapping[str, Any]) -> Table:
    """Return a table with the share of dead groups by group size, and the rollouts that they waste."""
    table = Table(title="groups by their size, shares of all groups [95 % interval]", title_justify="left")
    for column in ("size", "all wrong", "all right", "dead", "rollouts in dead\ngroups in a pass"):
        table.add_column(column, justify="right")
    for size, each in found["groups"].items():
        shares = (
            _figure("", each[share]).replace(" [", "\n[") for share in ("all_wrong", "all_right", "wasted")
        )
        table.add_row(size, *shares, f"{each['wasted_rollouts']:.0f}")
    return table
