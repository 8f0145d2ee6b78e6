"""Charts as inline SVG, with CSS variables as colors, so that one chart serves light, dark and print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from handrail.eval.report import palette
from handrail.eval.report.series import KINDS, Point

# Placeholders, because matplotlib needs real colors: the finished SVG has the CSS variable of that name
# instead.
COLORS = {name: f"#0000{place:02x}" for place, name in enumerate(palette.LIGHT, start=1)}
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^DvP*X"
HATCHES = ("///", "", "\\\\\\")  # for KINDS; lines, because dots would make large files
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 8.5,
    "text.color": COLORS["ink"], "axes.labelcolor": COLORS["muted"],
    "xtick.color": COLORS["muted"], "ytick.color": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"], "grid.color": COLORS["grid"],
    "axes.spines.top": False, "axes.spines.right": False,
    "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.linewidth": 0.8, "grid.linewidth": 0.6, "hatch.linewidth": 0.4,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """The style of a method's line: color, dash and marker, so that lines do not differ in color alone."""

    place: int

    @property
    def line(self) -> dict[str, Any]:
        return self.plot_arguments(COLORS)

    def plot_arguments(self, colors: Mapping[str, str]) -> dict[str, Any]:
        """Return the arguments of matplotlib's ``plot`` in the colors of a palette."""
        return {
            "color": colors[f"series-{self.place % palette.SERIES}"],
            "linestyle": DASHES[self.place % len(DASHES)],
            "marker": MARKERS[(self.place + self.place // 8) % 8],
            "markersize": 3.4,
            "linewidth": 1.5,
        }


class Line(NamedTuple):
    """The points of one method."""

    name: str
    style: Style
    points: list[Point]


@matplotlib.rc_context(SETTINGS)
def line_chart(title: str, lines: Sequence[Line], share: bool, unit: str) -> Markup:
    """Draw a line for each method with a band over its seeds; if ``share``, the axis is 0 to 100 %."""
    figure, axes = canvas(unit)
    for line in lines:
        steps = [point.step for point in line.points]
        axes.plot(
            steps, [point.mean for point in line.points], **line.style.line, markevery=max(1, len(steps) // 8)
        )
        low, high = [point.low for point in line.points], [point.high for point in line.points]
        if low != high:
            axes.fill_between(steps, low, high, color=line.style.line["color"], alpha=0.16, linewidth=0)
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        least, most = min(0.0, axes.dataLim.y0), axes.dataLim.y1
        margin = 0.05 * (most - least or 1.0)
        axes.set_ylim(least - margin, most + margin)
        axes.yaxis.set_major_formatter(lambda value, place: figure_text(value, False))
    ends = "; ".join(
        f"{line.name} {figure_text(line.points[-1].mean, share)}" for line in lines if line.points
    )
    return svg(figure, f"Line chart: {title} by step. At the last step: {ends}.")


@matplotlib.rc_context(SETTINGS)
def area_chart(title: str, shares: Mapping[int, tuple[float, ...]]) -> Markup:
    """Draw the shares of all-wrong, mixed and all-right groups, stacked."""
    figure, axes = canvas("share of groups")
    steps = list(shares)
    columns = list(zip(*shares.values(), strict=True))
    layers = axes.stackplot(
        steps, columns, colors=[COLORS[variable(kind)] for kind in KINDS], alpha=0.8, linewidth=0
    )
    for layer, hatch in zip(layers, HATCHES, strict=True):
        layer.set(hatch=hatch, edgecolor=COLORS["ink"])
    axes.set(ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ends = ", ".join(
        f"{kind.replace('_', ' ')} {shares[steps[-1]][place]:.0%}" for place, kind in enumerate(KINDS)
    )
    return svg(figure, f"Stacked areas: groups of {title} by step. At the last step: {ends}.")


@matplotlib.rc_context(SETTINGS)
def interval(name: str, row: Mapping[str, Any]) -> Markup:
    """Draw an accuracy on a line from 0 to 100 %: interval as a bar, seeds as dots, start as a tick."""
    figure = Figure(figsize=(2.0, 0.2))
    axes = figure.add_axes((0.02, 0, 0.96, 1))
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    axes.axis("off")
    axes.plot([0, 1], [0, 0], color=COLORS["grid"], linewidth=1, zorder=1)
    axes.plot([row["low"], row["high"]], [0, 0], color=COLORS["muted"], linewidth=4, alpha=0.45, zorder=2)
    axes.plot([row["start"]] * 2, [-0.7, 0.7], color=COLORS["muted"], linewidth=1, zorder=3)
    axes.plot(
        row["per_seed"],
        [0] * len(row["per_seed"]),
        "o",
        color=COLORS["ink"],
        markersize=3.2,
        zorder=4,
        clip_on=False,
    )
    return svg(
        figure,
        f"{name}: {row['mean']:.1%}, 95 % interval {row['low']:.1%} to {row['high']:.1%}, "
        f"started at {row['start']:.1%}",
    )


@matplotlib.rc_context(SETTINGS)
def line_swatch(style: Style) -> Markup:
    """Draw a method's line for the legend."""
    figure, axes = swatch()
    axes.plot([0.04, 0.5, 0.96], [0.5] * 3, **style.line, markevery=[1])
    return svg(figure)


@matplotlib.rc_context(SETTINGS)
def area_swatch(place: int) -> Markup:
    """Draw the area of one of KINDS for the legend."""
    figure, axes = swatch()
    axes.fill_between(
        [0, 1],
        0,
        1,
        facecolor=COLORS[variable(KINDS[place])],
        edgecolor=COLORS["ink"],
        hatch=HATCHES[place],
        alpha=0.8,
        linewidth=0,
    )
    return svg(figure)


def variable(kind: str) -> str:
    """Return the name of the color of one of KINDS."""
    return kind.replace("_", "-")


def canvas(unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel="training step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def swatch() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(0.42, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return figure, axes


def svg(figure: Figure, label: str = "") -> Markup:
    """Render the figure as an element of the page; without a label, it is hidden from screen readers."""
    with matplotlib.rc_context({"svg.hashsalt": f"handrail {label}"}):
        stream = StringIO()
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = stream.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Remove style elements, which would apply to the whole page; ids such as axes_1, which every chart would
    # repeat; and fonts, which the page sets.
    body = re.sub(
        r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| id="[A-Za-z0-9.]+_\d+"| font-family: [^;]*;',
        "",
        body,
        flags=re.DOTALL,
    )
    body = re.sub(r"\s*\n\s*", " ", body)
    for name, color in COLORS.items():
        body = body.replace(color, f"var(--{name})")
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return Markup(f"{head} {role}>{body}")


def figure_text(value: float, share: bool) -> str:
    """Format a figure as a percentage or with three significant digits."""
    return f"{value:.1%}" if share else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
