"""Arguments that several commands share, and the configuration that they amount to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from handrail.config import Config, load_config, parse_config, set_value
from handrail.errors import UserError

DATA = "a file, a directory, a dataset, task:NAME?key=value or reasoning-gym:FAMILY?key=value"
Data = Annotated[str, typer.Argument(help=f"Data source: {DATA}.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. May be repeated.")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="Map a column: our_field=their_column. May be repeated.")]
ConfigFile = Annotated[Path | None, typer.Option(help="Take all other settings from this configuration file.")]


def help_alone(context: typer.Context) -> None:
    """A command group named alone shows its help and succeeds."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def parse_column(pair: str) -> tuple[str, str]:
    field, equals, column = pair.partition("=")
    if not equals:
        raise UserError(f"--column takes our_field=their_column, not {pair!r}")
    return field, column


def configured(config: Path | None, settings: list[str] | None, **defaults: Any) -> Config:
    """A configuration file with ``settings`` over it, or where there is none, the settings over ``defaults``."""
    if config:
        return load_config(config, settings)
    for setting in settings or []:
        set_value(defaults, setting)
    return parse_config(defaults, "--set")


def fitting_verifier(*sources: str) -> str:
    """Who grades these sources where nobody else is named."""
    kinds = {source.partition(":")[0] for source in sources}
    return kinds.pop() if kinds in ({"task"}, {"reasoning-gym"}) else "math"
