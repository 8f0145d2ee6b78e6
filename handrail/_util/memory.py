"""Peak memory of this process, and advice when it runs out.

Imports nothing heavy, because short-lived worker processes use it too.
"""

from __future__ import annotations

import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handrail._util.errors import OutOfMemory

ADVICE = {
    "load": 'loading the model; train with [lora] and model.dtype = "bfloat16", or take a smaller model',
    "sample": "sampling; lower rollout.batch_size (completions sampled at once) or sampler.cache_gib, "
    "or in a new run rollout.max_tokens",
    "guide": "guiding; lower rollout.batch_size or train.micro_batch_tokens (tokens scored at once)",
    "update": "updating; lower train.micro_batch_tokens, set model.gradient_checkpointing = true, "
    'or in a new run model.dtype = "bfloat16" or [lora]',
    "run": "running this command; lower train.micro_batch_tokens (tokens read at once) or rollout.batch_size "
    "(completions sampled at once), or take a smaller model",
    "evaluate": "evaluating; lower rollout.batch_size (completions sampled at once), "
    "or in a new run rollout.max_tokens",
}


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:  # on Linux, getrusage() would include the peak of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Raise OutOfMemory, naming the settings to lower, if the block runs out of memory.

    ``doing`` is a key of ADVICE, or else the text that completes "out of memory while".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # frees what the block computed: saving needs memory too
        raise OutOfMemory(
            f"out of memory while {ADVICE.get(doing, doing)}; a run can be resumed from its last checkpoint"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """True if ``error`` reports exhausted memory."""
    # torch and the libraries below it raise several exception types, each with one of these phrases.
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
