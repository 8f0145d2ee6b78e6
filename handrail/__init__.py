"""Reinforcement learning on problems the policy cannot solve yet.

The names below are the public interface; they are imported on first use, so that ``import handrail`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handrail._util.errors import UserError
    from handrail.data.load import load_problems
    from handrail.methods.base import Method
    from handrail.methods.context import Tools
    from handrail.training.config import Config, load_config
    from handrail.training.loop import train
    from handrail.types import Group, Origin, Problem, Trajectory

__version__ = "0.1.0"

_HOMES = {
    "Config": "training.config", "load_config": "training.config", "UserError": "_util.errors", "Method": "methods.base",
    "Problem": "types", "load_problems": "data.load", "Tools": "methods.context", "train": "training.loop", "Group": "types",
    "Origin": "types", "Trajectory": "types",
}  # fmt: skip

__all__ = [
    "Config", "Group", "Method", "Origin", "Problem", "Tools", "Trajectory", "UserError", "load_config", "load_problems", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'handrail' has no attribute {name!r}")
    value = getattr(import_module(f"handrail.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
