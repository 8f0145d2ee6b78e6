"""Checksums of values that would be gigabytes as one text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any


def digest_items(items: Iterable[Any], default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of ``items`` as one JSON list, of which only one item is in memory as text.

    ``default`` converts what JSON does not support; keys of dicts that it does not support are left out.
    """
    encode = json.JSONEncoder(skipkeys=True, default=default).encode
    found = hashlib.sha256(b"[")
    for place, item in enumerate(items):
        found.update(f"{', ' if place else ''}{encode(item)}".encode())
    found.update(b"]")
    return found.hexdigest()
