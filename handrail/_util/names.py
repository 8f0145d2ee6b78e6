"""Safe directory names from arbitrary names, and suggestions of similar names."""

from __future__ import annotations

import difflib
import re
from pathlib import Path


def slug(name: str) -> str:
    """Return ``name`` in lower case with hyphens for everything but letters, digits and underscores."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def near(path: Path) -> str:
    """Suggest names like that of ``path`` for the end of a message."""
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent} either, so check the path"
    names = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()])
    if names:
        return f"; did you mean {' or '.join(names)}?"
    return f"; check the path, as nothing in {path.parent} has a name like it"
