"""``handrail methods`` and ``handrail config``: list methods and settings."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from handrail._util.errors import UserError
from handrail._util.progress import console, reflowed, show

if TYPE_CHECKING:
    from handrail.cli.schema import SettingsTable


def methods_command(
    name: Annotated[
        str | None, typer.Argument(help="Show this method or term with its verbs and settings.")
    ] = None,
) -> None:
    """List the methods and terms with source and status, or show one with its settings."""
    from handrail.cli.schema import first_line, method_table, term_table
    from handrail.methods import METHODS, combinations, find, term_combinations, verbs
    from handrail.methods.terms import TERMS

    if name is None:
        kinds: dict[str, dict[str, Any]] = {"method": {**METHODS}, "term": {**TERMS}}
        for kind, classes in kinds.items():
            table = Table(kind, "status", "source", "what it is")
            for key, cls in classes.items():
                table.add_row(key, cls.status, cls.source, first_line(cls))
            console.print(table)
        return
    if name.lower() in TERMS:
        name = name.lower()
    if name.lower() in METHODS or name not in TERMS:
        method = find(name)
        describe(method.name or name, "method", method, verbs(method), *combinations(method))
        show("\nsettings, under [method]")
        console.print(make_table(method_table(method)))
    if name in TERMS:
        term = TERMS[name]
        describe(name, "term", term, verbs(term), *term_combinations(name))
        show("\nsettings, in an item of method.terms")
        console.print(make_table(term_table(name, term)))


def describe(
    name: str, kind: str, cls: Any, verbs: list[str], composes: list[str], refuses: dict[str, str]
) -> None:
    """Show what a method or a term is, what it does, and what it can be combined with."""
    show(f"{name} · {kind} · {cls.source} · status: {cls.status}\n")
    show(reflowed(inspect.getdoc(cls) or ""))
    show(f"\nverbs of its own: {', '.join(verbs) or 'none'}")
    show(f"composes with: {', '.join(composes) or 'no term'}")
    for other, why in refuses.items():
        show(f"refuses {other}: {why}")


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
