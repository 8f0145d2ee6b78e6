"""Built-in models small enough to ship: see ``benchmarks.backbones.make`` for how they were made."""

from __future__ import annotations

import os
from pathlib import Path

from handrail._util.errors import UserError

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def locate(path: str) -> str:
    """The directory of ``builtin:NAME``; any other path with ``~`` written out. Raises UserError for an unknown name."""
    if not path.startswith("builtin:"):
        return os.path.expanduser(path)
    name = path.removeprefix("builtin:")
    if name not in names():
        raise UserError(
            f"model.path: there is no built-in backbone {name!r}; there are: {', '.join(names())}"
        )
    return str(HERE / name)
