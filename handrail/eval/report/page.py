"""Write an HTML page of a run or a comparison: figures, charts, trajectories and settings."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from handrail._util.files import writable, write_whole
from handrail._util.version import __version__
from handrail.eval.compare import aggregate, without_verdict
from handrail.eval.report import charts, palette, series
from handrail.eval.report.charts import Line, Style
from handrail.eval.report.chunks import chunks
from handrail.eval.report.read import Results, Run, read
from handrail.eval.report.series import KINDS

HOME = Path(__file__).parent / "templates"
STATUS = {
    "published": "the formulas are the paper's or its released code's",
    "secondary": "from sources that agree with each other; the paper's own text was not at hand",
    "reconstruction": "our reading of a paper whose text was not at hand; call these numbers {name}-style",
    "yours": "a method of your own",
}
CURVES = {  # metric -> title, unit
    "reward": ("Reward", "mean over rollouts"),
    "loss": ("Loss", "loss of the update"),
    "entropy": ("Entropy of sampled tokens", "nats per token"),
    "tokens/sampled": ("Tokens sampled", "tokens per step"),
    "tokens/trained": ("Tokens trained on", "tokens per step"),
}
COUNTS = ("tokens/sampled", "tokens/trained")
"""Curves to leave out if they are always 0."""


class Chart(NamedTuple):
    """A chart, and the same figures as a table."""

    title: str
    svg: Markup
    header: list[str]
    rows: list[list[str]]


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Write the report of ``directory`` and return its path.

    Raises UserError if the directory holds no run or the report cannot be written.
    """
    page = render(read(directory))
    file = writable(output or directory / "report.html")
    write_whole(file, page)
    return file


def render(results: Results) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("handrail.eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": share,
        "number": number,
        "points": points,
        "ends": ends,
        "breakable": breakable,
    }
    style, script = ((HOME / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("report.html").render(
        results=results,
        version=__version__,
        facts=facts(results),
        methods=figures(results),
        measures=measures(results),
        verdict=results.summary.get("verdict", []),
        unverified=[] if "verdict" in results.summary else without_verdict(results.runs),
        unfinished=[run for run in results.runs if run.summary is None],
        statuses=statuses(results),
        settings=settings(results),
        versions=versions(results),
        interval=charts.interval,
        columns=columns(results),
        **draw_charts(results),
        **trajectories(results),
        style=Markup(palette.css() + style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def draw_charts(results: Results) -> dict[str, Any]:
    """Return the charts and their legends."""
    window = series.window_size(results.runs)
    return {
        "window": window,
        "legend": {name: charts.line_swatch(Style(place)) for place, name in enumerate(results.methods)},
        "kinds": {kind.replace("_", " "): charts.area_swatch(place) for place, kind in enumerate(KINDS)},
        "accuracy": list(accuracy_charts(results)),
        "curves": list(curve_charts(results, window)),
        "groups": list(group_charts(results, window)),
        "guided": counts_chart(
            "All-wrong groups guided so far",
            "groups so far",
            lines(results, partial(series.guided, size=window)),
        ),
    }


def trajectories(results: Results) -> dict[str, Any]:
    """Return the packed samples, and an index of their runs and steps."""
    pieces = [
        chunk
        for place, run in enumerate(results.runs)
        for chunk in chunks(place, run.directory / "samples.jsonl")
    ]
    index = [
        {
            "run": place,
            "label": label(run),
            "steps": [(piece.step, piece.signal) for piece in pieces if piece.run == place],
        }
        for place, run in enumerate(results.runs)
    ]
    return {"chunks": pieces, "index": [entry for entry in index if entry["steps"]]}


def share(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None else f"{value:.{decimals}%}"


def number(value: float | None) -> str:
    return "–" if value is None else charts.figure_text(value, False)


def points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def ends(values: Mapping[str, float | None] | None) -> str:
    """Format a figure before and after training."""
    return " → ".join(
        "–" if (value := (values or {}).get(end)) is None else f"{value:.3f}" for end in ("start", "end")
    )


def breakable(key: str) -> Markup:
    """Let a narrow column break the name of a setting after dots and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", key))


# Figures


def figures(results: Results) -> dict[str, Any]:
    """Return each method's figures over its finished seeds, preferring those in the comparison's summary."""
    finished = [run for run in results.runs if run.summary]
    return {**(aggregate(finished) if finished else {}), **results.summary.get("methods", {})}


def measures(results: Results) -> list[str]:
    """Return the measures of diversity that exist for any held-out set."""
    rows = [
        row[name].get("diversity", {})
        for row in figures(results).values()
        for name in results.sets
        if name in row
    ]
    return list(dict.fromkeys(measure for row in rows for measure in row))


def columns(results: Results) -> set[str]:
    """Return the optional columns of the results that hold anything but zeros and gaps."""
    rows = figures(results).values()
    known = {
        key
        for row in rows
        for key in ("guided", "off_policy", "salvaged", "steps_without_signal")
        if row.get(key)
    }
    return known | {"all_wrong" for row in rows if row["all_wrong"]["first"] is not None}


def statuses(results: Results) -> list[dict[str, str]]:
    """Describe how closely each method follows its source."""
    out = []
    for name, runs in results.methods.items():
        if summary := next((run.summary for run in runs if run.summary), None):
            words = STATUS.get(summary["status"], "").format(name=summary["method"].upper())
            out.append(
                {
                    "name": name,
                    "words": words,
                    **{key: summary[key] for key in ("method", "source", "status")},
                }
            )
    return out


# Charts


def lines(results: Results, seeds: Callable[[Run], dict[int, float]]) -> list[Line]:
    """Return a line for each method; ``seeds`` maps a run to its figures by step."""
    methods = results.methods.items()
    return [
        Line(name, Style(place), series.over_seeds([seeds(run) for run in runs]))
        for place, (name, runs) in enumerate(methods)
    ]


def chart(title: str, unit: str, drawn: list[Line], share: bool = False) -> list[Chart]:
    """Return the chart with its table, or an empty list if there are no points."""
    drawn = [line for line in drawn if line.points]
    steps = sorted({point.step for line in drawn for point in line.points})
    if not steps:
        return []
    cells = [{point.step: point for point in line.points} for line in drawn]
    rows = [[str(step), *(cell(points.get(step), share) for points in cells)] for step in steps]
    return [
        Chart(
            title,
            charts.line_chart(title, drawn, share, unit),
            ["step", *(line.name for line in drawn)],
            rows,
        )
    ]


def counts_chart(title: str, unit: str, drawn: list[Line]) -> list[Chart]:
    """Return a chart of counts, or an empty list if all of them are 0."""
    return chart(title, unit, drawn) if any(point.high for line in drawn for point in line.points) else []


def cell(point: series.Point | None, share: bool) -> str:
    if point is None:
        return "–"
    band = (
        f" ({charts.figure_text(point.low, share)} to {charts.figure_text(point.high, share)})"
        if point.low != point.high
        else ""
    )
    return charts.figure_text(point.mean, share) + band


def accuracy_charts(results: Results) -> Iterator[Chart]:
    for held_out in results.sets:
        yield from chart(
            f"Accuracy on {held_out}",
            "held-out accuracy",
            lines(results, partial(series.evaluated, held_out=held_out)),
            share=True,
        )


def curve_charts(results: Results, size: int) -> Iterator[Chart]:
    for key, (title, unit) in CURVES.items():
        drawn = lines(results, partial(series.windowed, key=key, size=size))
        yield from (counts_chart if key in COUNTS else chart)(title, unit, drawn)


def group_charts(results: Results, size: int) -> Iterator[Chart]:
    for name, runs in results.methods.items():
        if shares := series.group_shares(runs, size):
            rows = [[str(step), *(f"{value:.0%}" for value in values)] for step, values in shares.items()]
            yield Chart(
                name,
                charts.area_chart(name, shares),
                ["step", *(kind.replace("_", " ") for kind in KINDS)],
                rows,
            )


# Settings and versions of the runs


def facts(results: Results) -> dict[str, str]:
    """Return the facts that a reader of the figures needs, such as the model and the number of steps."""
    config = results.runs[0].config
    train, rollout = config.get("train", {}), config.get("rollout", {})
    sampled = any(row.get("rollouts") for run in results.runs for row in run.metrics)
    rollouts = f" × {rollout['group_size']} rollouts" if rollout and sampled else ""
    seeds = dict.fromkeys(str(run.seed) for run in results.runs)
    out = {
        "model": config.get("model", {}).get("path"),
        "steps": train.get("steps"),
        "per step": f"{train['problems_per_step']} problems{rollouts}" if train else None,
        "seeds" if len(seeds) > 1 else "seed": ", ".join(seeds),
        "verifier": config.get("verifier", {}).get("name"),
        "trained on": ", ".join(source["path"] for source in config.get("data", {}).get("train", [])),
    }
    return {name: value for name, value in out.items() if value}


def settings(results: Results) -> list[tuple[str, list[str]]]:
    """Return the settings in which the methods differ, each with every method's value."""
    flats = [dict(flat(runs[0].config)) for runs in results.methods.values()]
    keys = dict.fromkeys(
        key
        for settings in flats
        for key in settings
        if key != "train.seed" and not key.startswith("compare.")
    )
    return [
        (key, values)
        for key in keys
        if len(set(values := [settings.get(key, "–") for settings in flats])) > 1
    ]


def flat(tree: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its dotted name; the tables of a list are numbered."""
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(place): item for place, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            yield from flat(value, f"{start}{key}.")
        else:
            yield start + key, str(value)


def versions(results: Results) -> list[tuple[str, list[str]]]:
    """Return every distinct set of software versions, with the runs or parts of runs that used it."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in results.runs:
        for row in run.versions:
            used = tuple((name, str(version)) for name, version in row.items() if name != "step")
            found.setdefault(used, []).append(
                label(run) + (f" from step {row['step']}" if row["step"] else "")
            )
    return [(", ".join(f"{name} {version}" for name, version in used), runs) for used, runs in found.items()]


def label(run: Run) -> str:
    return f"{run.name}, seed {run.seed}"
