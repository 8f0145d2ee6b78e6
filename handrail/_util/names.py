"""Names of files and directories: safe ones, and similar ones."""

from __future__ import annotations

import difflib
import re
from pathlib import Path


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def near(path: Path) -> str:
    """The end of a message that there is nothing called ``path``: what is called similarly, or where to look."""
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent} either, so check the path"
    names = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()])
    return f"; did you mean {' or '.join(names)}?" if names else f"; check the path, as nothing in {path.parent} has a name like it"
