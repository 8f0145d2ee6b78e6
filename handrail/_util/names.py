"""Directory names from arbitrary names."""

from __future__ import annotations

import re


def slug(name: str) -> str:
    """Return ``name`` in lower case with hyphens for everything but letters, digits and underscores."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")
