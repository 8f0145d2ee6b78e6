"""Seeds derived from their purpose, so that a resumed run needs no saved random state."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
