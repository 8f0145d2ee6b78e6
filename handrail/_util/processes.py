"""Single and distributed runs: the device of each process, and gathering work that was dealt out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from handrail._util.errors import UserError

T = TypeVar("T")


def accelerator(device: str, trackers: Sequence[str] = ()) -> Accelerator:
    """Return the accelerator for ``model.device``, in one process or in each process of torchrun.

    Raises UserError if there are more processes than GPUs, or if a tracker is not installed.
    """
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
    return Accelerator(cpu=on_cpu, log_with=list(trackers) or None)


def dealt_back(parts: Sequence[Sequence[T]]) -> list[T]:
    """Undo dealing ``items[rank::processes]`` to each rank: return the items in their original order."""
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]
