"""Plot a comparison, in the report's colors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from handrail.eval.jobs import Job
from handrail.eval.report import palette, series
from handrail.eval.report.charts import Style
from handrail.eval.report.read import Run


def curves(all_jobs: Sequence[Job], sets: Sequence[str], file: Path) -> None:
    """Plot held-out accuracy and the share of all-wrong groups by step.

    As in the report, a method is a line with a band over its seeds. A plot without any figures is left out,
    such as the groups if no method samples.
    """
    runs = [Run(job.name, job.seed, job.directory) for job in all_jobs]
    wanted: list[tuple[str, str, Callable[[Run], dict[int, float]]]] = [
        *(
            (f"Accuracy on held-out {name}", "accuracy", partial(series.evaluated, held_out=name))
            for name in sets
        ),
        (
            "Groups all wrong",
            "share of groups",
            partial(series.share_all_wrong, size=series.window_size(runs)),
        ),
    ]
    panes = [pane for pane in wanted if any(map(pane[2], runs))]
    figure = Figure(figsize=(4.6 * max(1, len(panes)), 4.2), layout="constrained")
    for place, (title, unit, seeds) in enumerate(panes, start=1):
        axes = figure.add_subplot(1, len(panes), place)
        for number, name in enumerate(dict.fromkeys(run.name for run in runs)):
            points = series.over_seeds([seeds(run) for run in runs if run.name == name])
            steps, style = [point.step for point in points], Style(number).plot_arguments(palette.LIGHT)
            axes.plot(
                steps,
                [point.mean for point in points],
                **style,
                markevery=max(1, len(steps) // 8),
                label=name,
            )
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="training step", ylabel=unit, ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.25)
    if panes:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=max(1, 2 * len(panes)),
            frameon=False,
        )
    figure.savefig(file, dpi=130)
