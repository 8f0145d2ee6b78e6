"""``handrail methods`` and ``handrail config``: list methods and settings."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from handrail._util.errors import UserError
from handrail._util.progress import console, reflowed, show

if TYPE_CHECKING:
    from handrail.cli.schema import SettingsTable


def methods_command(
    name: Annotated[str | None, typer.Argument(help="Show this method with its settings.")] = None,
) -> None:
    """List the methods with source and status, or show one method with its settings."""
    from handrail.cli.schema import first_line, method_table
    from handrail.methods import METHODS, find

    if name is None:
        table = Table("method", "status", "source", "what it is")
        for key, cls in METHODS.items():
            table.add_row(key, cls.status, cls.source, first_line(cls))
        console.print(table)
        return
    cls = find(name)
    show(f"{cls.name or name} · {cls.source} · status: {cls.status}\n")
    show(reflowed(inspect.getdoc(cls) or ""))
    show("\nsettings, under [method]")
    console.print(make_table(method_table(cls)))


def config_command(
    name: Annotated[
        str | None, typer.Argument(help="A section or a setting, such as train or train.steps.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema, for completion in editors.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", hidden=True, help="Print docs/configuration.md.")
    ] = False,
) -> None:
    """List all settings of a configuration, or those of one section, with their values and defaults."""
    from handrail.cli.schema import editor_schema, find, page, tables

    if (name is not None) + schema + markdown > 1:
        raise UserError("a NAME, --schema and --markdown exclude each other; give one of them")
    if schema or markdown:
        sys.stdout.write(
            json.dumps(editor_schema(), indent=2, ensure_ascii=False) + "\n" if schema else page()
        )
        return
    for table in find(name) if name else tables():
        show(f"{table.title}  {table.about}")
        console.print(make_table(table))


def make_table(table: SettingsTable) -> Table:
    """Return a table of three columns, with defaults below values, to fit a terminal of 80 columns."""
    out = Table("setting", Column("values and default", overflow="fold"), "meaning")
    for setting in table.settings:
        default = {"–": "", "required": "\nrequired"}.get(setting.default, f"\ndefault {setting.default}")
        out.add_row(setting.key.removeprefix(f"{table.name}."), setting.values + default, setting.meaning)
    return out
