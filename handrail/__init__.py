"""Reinforcement learning on problems the policy cannot solve yet.

The names below are the public interface; they are imported on first use, so that ``import handrail`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handrail.config import Config, load_config
    from handrail.errors import UserError
    from handrail.methods.base import Method
    from handrail.problems import Problem
    from handrail.sources import load_problems
    from handrail.tools import Tools
    from handrail.train import train
    from handrail.trajectory import Group, Origin, Trajectory

__version__ = "0.1.0"

_HOMES = {
    "Config": "config", "load_config": "config", "UserError": "errors", "Method": "methods.base", "Problem": "problems",
    "load_problems": "sources", "Tools": "tools", "train": "train", "Group": "trajectory", "Origin": "trajectory",
    "Trajectory": "trajectory",
}  # fmt: skip

__all__ = [
    "Config", "Group", "Method", "Origin", "Problem", "Tools", "Trajectory", "UserError", "load_config", "load_problems", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'handrail' has no attribute {name!r}")
    value = getattr(import_module(f"handrail.{_HOMES[name]}"), name)
    globals()[name] = value  # over the submodule of the same name, which the import above has just set here
    return value
