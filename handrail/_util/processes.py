"""One process or several: where each computes, and what each does of a common task."""

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
    """The accelerator for ``model.device``, in one process or in each of several that torchrun started.

    Raises UserError if there are more processes than GPUs, or if a tracker is not installed.
    """
    if missing := [name for name in trackers if name not in map(str, get_available_trackers())]:
        raise UserError(f"train.trackers: {missing[0]} is not installed; pip install {missing[0]}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = torch.accelerator.current_accelerator()
    shared = kind is not None and kind.type != "mps"  # of these, every process has one
    if device != "cpu" and shared and local > torch.accelerator.device_count():
        raise UserError(
            f'{local} processes and {torch.accelerator.device_count()} GPUs; start one process a GPU, or set model.device = "cpu"'
        )
    # Without cpu=True, Accelerate makes each of several processes on CPUs a world of its own.
    return Accelerator(cpu=device == "cpu" or (local > 1 and not shared), log_with=list(trackers) or None)


def dealt_back(parts: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt out, ``items[rank::processes]`` to each, in its first order."""
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]
