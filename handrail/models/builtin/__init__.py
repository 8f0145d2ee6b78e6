"""Built-in models that are small enough to ship; made by ``benchmarks.backbones.make``."""

from __future__ import annotations

import os
from pathlib import Path

from handrail._util.errors import UserError

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def locate(path: str, field: str = "model.path") -> str:
    """Return the directory of ``builtin:NAME``, or any other path with ``~`` expanded.

    Raises UserError, naming ``field``, for an unknown name.
    """
    if not path.startswith("builtin:"):
        return os.path.expanduser(path)
    name = path.removeprefix("builtin:")
    if name not in names():
        raise UserError(f"{field}: there is no built-in model {name!r}; there are: {', '.join(names())}")
    return str(HERE / name)
