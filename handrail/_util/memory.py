"""How much memory this process has had, and what to say where it was too little; light to import, for processes that start often."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handrail._util.errors import UserError

ADVICE = {
    "load": 'loading the model; train with [lora] and model.dtype = "bfloat16", or take a smaller model',
    "sample": "sampling; lower rollout.batch_size (completions drawn at once) or sampler.cache_gib, or in a new run rollout.max_tokens",
    "guide": "guiding; lower rollout.batch_size or train.micro_batch_tokens (tokens scored at once)",
    "update": "updating; lower train.micro_batch_tokens, set model.gradient_checkpointing = true, or in a new run "
    'model.dtype = "bfloat16" or [lora]',
    "evaluate": "evaluating; lower rollout.batch_size (completions drawn at once), or in a new run rollout.max_tokens",
}


def peak_resident() -> int:
    """The most bytes that were ever in memory at a time."""
    try:  # Linux hands getrusage's figure down from the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (
        int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )  # bytes on macOS


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Raises UserError, with what to lower, where the block runs out of memory. ``doing``: a key of ADVICE."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory while {ADVICE.get(doing, doing)}; what was checkpointed can be resumed"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """torch and the libraries below it raise several kinds of error, with one of these words in them."""
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
