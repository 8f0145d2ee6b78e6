"""``handrail report``: the results of runs as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handrail._util.progress import quiet, show


def report_command(
    directory: Annotated[
        Path, typer.Argument(help="Directory that handrail train or handrail compare wrote, finished or not.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write (default: report.html in the directory).")
    ] = None,
) -> None:
    """Write an HTML page with results, learning curves, groups, trajectories token by token, and settings."""
    quiet()
    from handrail.eval.report.page import write_report

    show(f"report: {write_report(directory, output)}")
