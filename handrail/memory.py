"""How much memory this process has had; light to import, for processes that start often."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_resident() -> int:
    """The most bytes that were ever in memory at a time."""
    try:  # Linux hands getrusage's figure down from the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
