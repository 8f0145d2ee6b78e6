"""Arguments that several commands share, and the configuration that they define."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer

from handrail._util.errors import UserError
from handrail._util.progress import show
from handrail._util.section import flat
from handrail.training.config import Config, load_config, parse_config, set_value
from handrail.training.resuming import as_text
from handrail.training.trained import model_of, settings_file, settings_to_use

DATA = "a file, a directory, a dataset, task:NAME?key=value or reasoning-gym:FAMILY?key=value"
Data = Annotated[str, typer.Argument(help=f"Data source: {DATA}.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. May be repeated.")
]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Map a column: our_field=their_column. May be repeated.")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="Take all other settings from this configuration file.")
]


def show_help_if_alone(context: typer.Context) -> None:
    """Show the help of a command group that is called without a command, and succeed."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def parse_column(pair: str) -> tuple[str, str]:
    """Parse ``our_field=their_column``. Raises UserError."""
    field, equals, column = pair.partition("=")
    if not equals:
        raise UserError(f"--column takes our_field=their_column, not {pair!r}")
    return field, column


def build_config(config: Path | None, settings: list[str] | None, **defaults: Any) -> Config:
    """Build the configuration of a command that takes --config and --set.

    ``settings`` override the configuration file. Without a file, they override the settings of the run that
    trained the model, which are printed, and those override ``defaults``. If the model path names a run, it
    becomes the path of that run's model. Raises UserError.
    """
    if config is None:
        return _with_run_model(parse_config(_with_run_settings(defaults, settings), "--set"))
    return _with_run_model(load_config(config, settings))


def _with_run_model(config: Config) -> Config:
    """Replace a model path that names a run with the path of that run's model."""
    return with_model(config, config.model.path)


def with_model(config: Config, path: str) -> Config:
    """Replace the model of ``config`` with ``path``, or with the model of the run that ``path`` names."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": model_of(path)})})


def _with_settings(tree: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    tree = deepcopy(tree)
    for setting in settings or []:
        set_value(tree, setting)
    return tree


def _with_run_settings(defaults: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """Override ``defaults`` with the settings of the run that trained the model, if any, and ``settings``."""
    tree = _with_settings(defaults, settings)
    model = tree.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    file = settings_file(model_of(path)) if isinstance(path, str) else None
    if file is None:
        return tree
    train = defaults["data"]["train"]
    used = settings_to_use(file, [train] if isinstance(train, str) else train, default_verifier)
    shown = ", ".join(
        f"{key} = {as_text(value)}"
        for key, value in flat({**used, "eval": {}}).items()
        if key != "data.train"
    )
    show(
        f"settings from {file}: {shown or 'all defaults'} "
        "(--set changes a setting, --config takes all from another file)"
    )
    return _with_settings(
        {**defaults, **{key: {**defaults.get(key, {}), **values} for key, values in used.items()}}, settings
    )


def default_verifier(*sources: str) -> str:
    """Return the name of the default verifier for these sources."""
    kinds = {source.partition(":")[0] for source in sources}
    return kinds.pop() if kinds in ({"task"}, {"reasoning-gym"}) else "math"
