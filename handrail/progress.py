"""Live progress on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINES = 20
# Of several processes, one speaks. No markup: it would swallow [lora], or a method called "SORT [alpha=0]".
console = Console(quiet=os.environ.get("RANK", "0") != "0", markup=False, highlight=False)


def show(text: str) -> None:
    console.print(text, soft_wrap=True)


def status(metrics: dict[str, Any]) -> str:
    """A step in one line."""
    held_out = " ".join(f"{key.split('/')[1]} {value:.1%}" for key, value in metrics.items() if key.endswith("/mean"))
    if "groups/all" not in metrics:
        return f"held out: {held_out}" if held_out else "no held-out problems (set eval.sets)"
    if "note" in metrics:
        text = str(metrics["note"])
    else:
        reward = "" if metrics["reward"] is None else f"reward {metrics['reward']:.3f} · "
        groups = " ".join(f"{metrics[f'groups/{kind}']} {kind.replace('_', ' ')}" for kind in ("all_wrong", "mixed", "all_right"))
        text = f"{reward}groups {groups} · rescued {metrics['groups/rescued']}"
    return f"{text} · held out: {held_out}" if held_out else text


class Bars:
    """One progress bar for each run; on a dumb terminal a line at every twentieth of a run and at every evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[status]}", markup=False),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}

    def update(self, name: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        text = status(metrics)
        if "warning" in metrics:
            self.console.print(f"{name} step {step}: {metrics['warning']}".lstrip(), style="yellow", highlight=False, markup=False)
        if not self.console.is_terminal:
            if step % max(1, steps // LINES) == 0 or any(key.startswith("eval/") for key in metrics):
                self.console.print(f"{name} step {step}/{steps}: {text}".lstrip(), highlight=False, markup=False, soft_wrap=True)
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=steps, status="")
        self.bars.update(self.tasks[name], completed=step, total=steps, status=text)


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
