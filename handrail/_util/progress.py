"""Progress output: live bars on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

LINES = 20
"""About how many progress lines a run prints if the output is not a terminal."""
LABELED = 60
"""The width, in cells, from which a status labels its first figures."""
# Only rank 0 prints. No markup: it would swallow [lora], or a method called "SORT [alpha=0]".
console = Console(quiet=os.environ.get("RANK", "0") != "0", markup=False, highlight=False)


def show(text: str) -> None:
    console.print(text, soft_wrap=True)


def reflowed(text: str) -> str:
    """Join the lines of each paragraph of ``text``, for a terminal to wrap; list items keep their lines."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(re.sub(r"\s*\n(?!\s*[-*] )\s*", " ", paragraph) for paragraph in paragraphs)


def held_out(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Map each held-out set to its accuracy; empty if the step did not evaluate."""
    return {
        found[1]: value for key, value in metrics.items() if (found := re.fullmatch("eval/(.+)/mean", key))
    }


def parts(metrics: Mapping[str, Any]) -> list[str]:
    """Format the figures of a training step, most important first, without those it does not have."""
    figures = {name: metrics[name] for name in ("reward", "loss") if metrics.get(name) is not None}
    unverified = metrics.get("verifier/unverified")
    out = [f"{unverified} unverified"] if unverified else []
    if "note" in metrics:
        return [*out, *str(metrics["note"]).split(": ", 1)]
    out += [f"{name} {value:.3g}" for name, value in figures.items()]
    kinds = {
        kind.replace("_", " "): metrics.get(f"groups/{kind}", 0)
        for kind in ("all_wrong", "mixed", "all_right")
    }
    if any(kinds.values()):
        out.append("groups " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if metrics.get("groups/guided"):
        out.append(f"guided {metrics['groups/guided']}")
    return out


def status(metrics: Mapping[str, Any]) -> str:
    """Format a step as one line of unlimited length."""
    scores = " ".join(f"{name} {value:.1%}" for name, value in held_out(metrics).items())
    texts = [f"held out: {scores}"] if scores else []
    texts += parts(metrics)
    return " · ".join(texts) or "no held-out problems (set eval.sets)"


@dataclass(frozen=True)
class Status:
    """The held-out accuracy, then as many figures of the last step as fit on the line."""

    scores: Mapping[str, float]
    parts: Sequence[str]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.fit(options.max_width), no_wrap=True, overflow="ellipsis")

    def fit(self, width: int) -> str:
        label = "held out: " if self.scores and width >= LABELED else ""
        text = label + next(
            (text for text in self.abbreviated_scores() if cell_len(label + text) <= width), ""
        )
        for part in self.parts:
            longer = f"{text} · {part}" if text else part
            if text and cell_len(longer) > width:
                break
            text = longer
        return text

    def abbreviated_scores(self) -> Iterator[str]:
        """Yield ever shorter texts: shorter set names, then fewer sets, at last one figure alone."""
        if not self.scores:
            return
        for longest in range(max(map(cell_len, self.scores)), 2, -1):
            scores = [f"{shorten(name, longest)} {value:.1%}" for name, value in self.scores.items()]
            yield " ".join(scores)
        for kept in range(len(scores) - 1, 0, -1):
            yield " ".join([*scores[:kept], "…"])
        yield f"{next(iter(self.scores.values())):.1%}"


def shorten(text: str, cells: int) -> str:
    """Cut the middle out of ``text`` so that it takes at most ``cells`` cells of a terminal."""
    if cell_len(text) <= cells:
        return text
    tail = (cells - 1) // 2
    return (
        f"{set_cell_size(text, cells - 1 - tail).rstrip()}…{set_cell_size(text[::-1], tail)[::-1].lstrip()}"
    )


class StatusColumn(ProgressColumn):
    """A column that fills the rest of the line with the status."""

    def get_table_column(self) -> Column:
        return Column(ratio=1, no_wrap=True)

    def render(self, task: Task) -> Status:
        return Status(task.fields["scores"], task.fields["parts"])


class Bars:
    """A progress bar for each active run.

    If the output is not a terminal, print a line at every evaluation and about LINES times in a run.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(6, min(24, console.width // 6))), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True), StatusColumn(), console=console,
            disable=not console.is_interactive, expand=True,
            speed_estimate_period=24 * 3600,  # seconds: a single step may take longer than Rich's 30
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.warned: set[str] = set()

    def update(self, name: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """Show the metrics of a step; ``name`` is the run's name in a comparison, else empty."""
        # The runs of a comparison share their data, so a warning about it is shown once.
        if "warning" in metrics and not (step == 0 and metrics["warning"] in self.warned):
            self.warned.add(metrics["warning"])
            for text in metrics["warning"].splitlines():
                self.line(f"warning: {f'{name} '.lstrip()}step {step}: {text}", style="yellow")
        scores = held_out(metrics)
        self.scores[name] = {**self.scores.get(name, {}), **scores}
        live, ended = self.console.is_interactive, step == steps
        if (ended and name) if live else (ended or scores or step % max(1, steps // LINES) == 0):
            self.line(f"{name} step {step}/{steps}: {status(metrics)}")
        if not live:
            return
        if name not in self.tasks:
            shown = shorten(name, max(8, self.console.width // 4))
            self.tasks[name] = self.bars.add_task(shown, total=steps, scores={}, parts=[])
        task = self.tasks[name]
        # Progress.update(total=…) would reset the speed estimate whenever a budget changes the last step.
        next(each for each in self.bars.tasks if each.id == task).total = steps
        self.bars.update(task, completed=step, scores=self.scores[name], parts=parts(metrics))
        if ended and name:  # its line above stays; this leaves room on the screen for the active runs' bars
            self.bars.remove_task(self.tasks.pop(name))

    def line(self, text: str, style: str | None = None) -> None:
        self.console.print(text.lstrip(), style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Show progress bars while the block runs."""
    shown = Bars(console)
    with shown.bars:
        yield shown


def quiet() -> None:
    """Silence the libraries' progress bars and warnings, which would break ours."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
