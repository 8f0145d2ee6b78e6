"""State of methods and terms in files: JSON, and safetensors for the tensors in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSOR = "tensor:"
"""Marks the name of a tensor in state.json."""


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write ``file``.json and, if there are tensors, ``file``.safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(without_tensors(state, tensors), indent=1, default=float)
    file.with_suffix(".json").write_text(text)
    if tensors:
        save_file(tensors, file.with_suffix(".safetensors"))


def read_state(file: Path) -> dict[str, Any]:
    """Read what ``write_state`` wrote."""
    tensors = file.with_suffix(".safetensors")
    saved = json.loads(file.with_suffix(".json").read_text())
    return dict(with_tensors(saved, load_file(tensors) if tensors.exists() else {}))


def copy_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as it would be read again, which no later change reaches."""
    tensors: dict[str, torch.Tensor] = {}
    return dict(with_tensors(without_tensors(state, tensors), tensors))


def without_tensors(value: Any, tensors: dict[str, torch.Tensor], name: str = "state") -> Any:
    """Replace the tensors in nested dictionaries and lists by names, and collect them in ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: without_tensors(inner, tensors, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_tensors(inner, tensors, f"{name}.{place}") for place, inner in enumerate(value)]
    return value


def with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo ``without_tensors``."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: with_tensors(inner, tensors) for key, inner in value.items()}
    return [with_tensors(inner, tensors) for inner in value] if isinstance(value, list) else value
