"""``handrail init``: write a first configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handrail._util.errors import UserError
from handrail._util.files import writable, write_whole
from handrail._util.progress import console, quiet, show
from handrail.cli.options import Columns, Data, default_verifier, parse_column


def init_command(
    model: Annotated[str, typer.Argument(help="Model directory, hub name or builtin:NAME.")],
    data: Data,
    held_out: Annotated[str | None, typer.Option(help="Held-out data to measure accuracy on.")] = None,
    columns: Columns = None,
    output: Annotated[Path, typer.Option(help="Configuration file to write.")] = Path("config.toml"),
) -> None:
    """Write a first configuration, with comments, for your model and data.

    It loads both and chooses a suitable verifier, method and length of completions.
    """
    if output.exists():
        raise UserError(f"{output} exists and is not overwritten; choose another --output")
    writable(output)
    quiet()
    from handrail.cli.first_config import first_config

    mapping = dict(parse_column(pair) for pair in columns or [])
    with console.status("loading the model and the data"):
        text, verifier = first_config(model, data, held_out, mapping, default_verifier(data), output)
    write_whole(output, text)
    show(text)
    if not verifier.fits:
        show(
            f"warning: the verifier {verifier.name!r} only {verifier}; "
            f"handrail check {data} shows some that it refuses"
        )
    show(f"configuration: {output}")
