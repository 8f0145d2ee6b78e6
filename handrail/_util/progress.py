"""Live progress on a terminal, sparse lines elsewhere."""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LINES = 20
"""At most about so many lines of a run where nobody watches."""
LABELLED = 60
"""Cells from which on there is room to say what the first figures of a status are."""
# Of several processes, one speaks. No markup: it would swallow [lora], or a method called "SORT [alpha=0]".
console = Console(quiet=os.environ.get("RANK", "0") != "0", markup=False, highlight=False)


def show(text: str) -> None:
    console.print(text, soft_wrap=True)


def reflowed(text: str) -> str:
    """``text`` with each paragraph on one line, which the terminal breaks where it ends; lists keep their lines."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(re.sub(r"\s*\n(?!\s*[-*] )\s*", " ", paragraph) for paragraph in paragraphs)


def held_out(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Held-out set -> accuracy, if the step evaluated."""
    return {found[1]: value for key, value in metrics.items() if (found := re.fullmatch("eval/(.+)/mean", key))}


def parts(metrics: Mapping[str, Any]) -> list[str]:
    """What a training step came to, most important first; what it has no figure for is left out."""
    figures = {name: metrics[name] for name in ("reward", "loss") if metrics.get(name) is not None}
    unverified = metrics.get("verifier/unverified")
    out = [f"{unverified} unverified"] if unverified else []
    if "note" in metrics:
        return [*out, *str(metrics["note"]).split(": ", 1)]
    out += [f"{name} {value:.3g}" for name, value in figures.items()]
    kinds = {kind.replace("_", " "): metrics.get(f"groups/{kind}", 0) for kind in ("all_wrong", "mixed", "all_right")}
    if any(kinds.values()):
        out.append("groups " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if metrics.get("groups/guided"):
        out.append(f"guided {metrics['groups/guided']}")
    return out


def status(metrics: Mapping[str, Any]) -> str:
    """A step in one line of any length."""
    scores = " ".join(f"{name} {value:.1%}" for name, value in held_out(metrics).items())
    texts = [f"held out: {scores}"] if scores else []
    texts += parts(metrics)
    return " · ".join(texts) or "no held-out problems (set eval.sets)"


@dataclass(frozen=True)
class Status:
    """Held-out accuracy, then as many parts of the last step as the line has room for."""

    scores: Mapping[str, float]
    parts: Sequence[str]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.fitted(options.max_width), no_wrap=True, overflow="ellipsis")

    def fitted(self, width: int) -> str:
        label = "held out: " if self.scores and width >= LABELLED else ""
        text = label + next((text for text in self.shorter_scores() if cell_len(label + text) <= width), "")
        for part in self.parts:
            longer = f"{text} · {part}" if text else part
            if text and cell_len(longer) > width:
                break
            text = longer
        return text

    def shorter_scores(self) -> Iterator[str]:
        """First the sets' names are cut, then sets are left out, the first one's figure last."""
        if not self.scores:
            return
        for longest in range(max(map(cell_len, self.scores)), 2, -1):
            scores = [f"{shortened(name, longest)} {value:.1%}" for name, value in self.scores.items()]
            yield " ".join(scores)
        for kept in range(len(scores) - 1, 0, -1):
            yield " ".join([*scores[:kept], "…"])
        yield f"{next(iter(self.scores.values())):.1%}"


def shortened(text: str, cells: int) -> str:
    """``text`` without its middle, so that it takes at most so many cells of a terminal."""
    if cell_len(text) <= cells:
        return text
    tail = (cells - 1) // 2
    return f"{set_cell_size(text, cells - 1 - tail).rstrip()}…{set_cell_size(text[::-1], tail)[::-1].lstrip()}"


class StatusColumn(ProgressColumn):
    """What is left of the line."""

    def get_table_column(self) -> Column:
        return Column(ratio=1, no_wrap=True)

    def render(self, task: Task) -> Status:
        return Status(task.fields["scores"], task.fields["parts"])


class Bars:
    """One progress bar for each run under way; on anything but a terminal a line at every twentieth of a run and at every evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(6, min(24, console.width // 6))), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
            StatusColumn(), console=console, disable=not console.is_interactive, expand=True,
            speed_estimate_period=24 * 3600,  # seconds: a single step may take longer than Rich's 30
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.warned: set[str] = set()

    def update(self, name: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """``name`` is that of one of several runs, or empty."""
        if "warning" in metrics and not (step == 0 and metrics["warning"] in self.warned):  # runs of a comparison share their data
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
            shown = shortened(name, max(8, self.console.width // 4))
            self.tasks[name] = self.bars.add_task(shown, total=steps, scores={}, parts=[])
        task = self.tasks[name]
        # Progress.update(total=…) would forget the speed whenever a budget moves the last step.
        next(each for each in self.bars.tasks if each.id == task).total = steps
        self.bars.update(task, completed=step, scores=self.scores[name], parts=parts(metrics))
        if ended and name:  # its line stays; the bars of those that still run must fit on the screen
            self.bars.remove_task(self.tasks.pop(name))

    def line(self, text: str, style: str | None = None) -> None:
        self.console.print(text.lstrip(), style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    shown = Bars(console)
    with shown.bars:
        yield shown


def quiet() -> None:
    """Our own progress instead of the libraries' bars and warnings."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
