"""The command that shows what runs came to."""

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
    """Write one HTML page: results, learning curves, groups, trajectories token by token, settings."""
    quiet()
    from handrail.eval.report.page import write_report

    show(f"report: {write_report(directory, output)}")
