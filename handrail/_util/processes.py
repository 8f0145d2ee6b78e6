"""Single and distributed runs: the device of each process, and gathering work that was dealt out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from handrail._util.errors import UserError
from handrail._util.launch import Fsdp, launched, require_precision

T = TypeVar("T")

LONGEST_WAIT = 6 * 3600
"""Seconds that a process waits for another, which may write a large checkpoint or ask a slow server.

Launchers and Ray end the others if one dies, so this need not be short."""


def accelerator(device: str, dtype: str = "float32", trackers: Sequence[str] = ()) -> Accelerator:
    """Return the accelerator for ``model.device``, in one process or in each process of a launcher.

    ``dtype``: ``model.dtype``. Raises UserError if there are more processes than GPUs, if a tracker is not
    installed, or if ``accelerate launch`` has settings that cannot be honoured.
    """
    require_precision(os.environ, dtype)
    launched()
    if missing := [name for name in trackers if name not in map(str, get_available_trackers())]:
        raise UserError(f"train.trackers: {missing[0]} is not installed; pip install {missing[0]}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = torch.accelerator.current_accelerator()
    # CUDA builds of PyTorch name their kind without a GPU too. A Mac has one device, not one per process.
    has_gpus = torch.accelerator.is_available() and kind is not None and kind.type != "mps"
    if device != "cpu" and has_gpus and local > torch.accelerator.device_count():
        raise UserError(
            f"{local} processes but only {torch.accelerator.device_count()} GPUs; "
            'start one process per GPU, or set model.device = "cpu"'
        )
    # Without cpu=True, Accelerate would not connect several CPU processes: each would be a world of one.
    on_cpu = device == "cpu" or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and not has_gpus)
    # The model computes in its own number type, and autocasts itself.
    return Accelerator(
        cpu=on_cpu, mixed_precision="no", log_with=list(trackers) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=LONGEST_WAIT))],
    )  # fmt: skip


def sharding(asked: bool) -> Fsdp | None:
    """Return how to shard the model; None if neither ``train.fsdp`` (``asked``) nor the launcher wants it."""
    fsdp = launched() or (Fsdp() if asked else None)
    return fsdp if torch.distributed.is_initialized() else None  # alone, there is nothing to share


def dealt_back(parts: Sequence[Sequence[T]]) -> list[T]:
    """Undo dealing ``items[rank::processes]`` to each rank: return the items in their original order."""
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]
