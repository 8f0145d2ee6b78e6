"""Reinforcement learning on problems the policy cannot solve yet.

The names below are the public interface, imported on first use, so that ``import handrail`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from handrail._util.version import __version__ as __version__

if TYPE_CHECKING:
    from handrail._util.errors import UserError
    from handrail.data.load import load_problems
    from handrail.engines.local import LocalEngine
    from handrail.methods import METHODS
    from handrail.methods.base import Method, Term
    from handrail.methods.batch import TokenBatch
    from handrail.methods.context import Context
    from handrail.methods.linearize import linearized
    from handrail.methods.requests import Ask, Generate, Score, TopTokens, Verify, gather
    from handrail.models.hf import TransformersPolicy
    from handrail.models.policy import Policy
    from handrail.models.trainable import TrainablePolicy
    from handrail.training.callbacks import Callback
    from handrail.training.config import Config, load_config
    from handrail.training.loop import train
    from handrail.types.problem import Problem
    from handrail.types.trajectory import Author, Group, Trajectory
    from handrail.verifiers.pool import VerifierPool

_HOMES = {
    "_util.errors": ["UserError"],
    "data.load": ["load_problems"],
    "engines.local": ["LocalEngine"],
    "methods": ["METHODS"],
    "methods.base": ["Method", "Term"],
    "methods.batch": ["TokenBatch"],
    "methods.context": ["Context"],
    "methods.linearize": ["linearized"],
    "methods.requests": ["Ask", "Generate", "Score", "TopTokens", "Verify", "gather"],
    "models.hf": ["TransformersPolicy"],
    "models.policy": ["Policy"],
    "models.trainable": ["TrainablePolicy"],
    "training.callbacks": ["Callback"],
    "training.config": ["Config", "load_config"],
    "training.loop": ["train"],
    "types.problem": ["Problem"],
    "types.trajectory": ["Author", "Group", "Trajectory"],
    "verifiers.pool": ["VerifierPool"],
}

__all__ = [
    "METHODS", "Ask", "Author", "Callback", "Config", "Context", "Generate", "Group", "LocalEngine",
    "Method", "Policy", "Problem", "Score", "Term", "TokenBatch", "TopTokens", "TrainablePolicy",
    "Trajectory", "TransformersPolicy", "UserError", "VerifierPool", "Verify", "gather", "linearized",
    "load_config", "load_problems", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'handrail' has no attribute {name!r}")
    value = getattr(import_module(f"handrail.{home}"), name)
    globals()[name] = value
    return value
