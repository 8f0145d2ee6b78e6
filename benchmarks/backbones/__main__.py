"""``python -m benchmarks.backbones``: make the built-in models from scratch, and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.backbones.make import RECIPES
from benchmarks.backbones.make import make as make_backbone
from benchmarks.backbones.make_prm import make_prm
from benchmarks.backbones.measure import measure as measured
from handrail._util.errors import UserError
from handrail._util.progress import console, quiet, show
from handrail.cli import main

app = typer.Typer(help="Make and measure the models that come with Handrail.")


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="Name of the recipe.")],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train a built-in model from scratch, in the same way as the shipped one."""

    def progress(step: int, steps: int, loss: float) -> None:
        show(f"step {step}/{steps} loss {loss:.4f}")

    if name == "house-prm":
        return make_prm(output, seed, progress)
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; there are: {', '.join([*RECIPES, 'house-prm'])}")
    make_backbone(name, output, seed, progress)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Model directory or builtin:NAME.")] = "builtin:house-tiny",
    n: Annotated[int, typer.Option(min=1, help="Held-out problems per level.")] = 512,
) -> None:
    """Measure a built-in model.

    Language model: accuracy on easy and hard problems, and how many correct answers have a correct
    derivation. Process reward model: how well it finds the first wrong step.
    """
    for line in measured(model, n):
        console.print(line)


if __name__ == "__main__":
    quiet()
    main(app)
