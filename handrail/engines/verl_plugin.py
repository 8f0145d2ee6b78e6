"""What verl loads when it is imported: the entry point ``verl.plugins`` names this module.

verl hides what goes wrong in a plugin, so an error is written here too.
"""

from __future__ import annotations

import sys

try:
    import handrail.engines.verl  # noqa: F401  # registers the trainer
except Exception as error:
    print(f"handrail: {error}", file=sys.stderr)
    raise
