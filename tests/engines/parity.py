"""The gradient that the local engine gives for groups and weights of another engine's update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from handrail.engines.local import LocalEngine
from handrail.experts.registry import Experts
from handrail.methods.base import Method
from handrail.methods.batch import pack
from handrail.training.policies import load_trainable_policy
from handrail.training.update import Update
from handrail.types.trajectory import Group
from tests.conftest import config

Gradient = dict[str, torch.Tensor]


def gradient(model: Any) -> Gradient:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, gathered from all processes if the tensor is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local_gradient(
    method: Method[Any],
    weights: Mapping[str, torch.Tensor],
    guided: Mapping[int, tuple[Sequence[Group], Sequence[int]]],
    seed: int,
    pool: Any = None,
    model: str = "builtin:house-tiny",
    experts: Experts | None = None,
) -> Gradient:
    """``guided``: groups and places that the update takes from each step; it gives them equal shares."""
    settings = config(rollout={"max_tokens": 48}, model={"path": model})
    policy = load_trainable_policy(settings, Accelerator(cpu=True), "reference" in method.models)
    policy.bare_model.load_state_dict(dict(weights))
    engine = LocalEngine(policy, pool, experts, seed)
    trained = Update(method, policy, policy.accelerator, None, config().train)
    for step, (groups, places) in guided.items():
        engine.begin(step)
        credited = engine.credit(method, groups, places)
        live = [each for each in trained.samples(credited) if each.is_live]
        batches = list(pack(live, 8192, policy.layout))
        trained.backward(batches, len(batches))
    return {name: value / len(guided) for name, value in gradient(policy.bare_model).items()}


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


def require_equal(found: Gradient, expected: Gradient, rounding: float = 0.0) -> float:
    """Compare to 1e-5 of the norm of ``expected``, and return that norm.

    A norm below ``rounding`` is that of rounding errors, so the comparison is to 1e-5 of ``rounding``.
    """
    assert expected.keys() in (found.keys(), set())  # empty if no trajectory has credit
    size = norm(expected.values())
    missing = {name: torch.zeros_like(value) for name, value in found.items()}
    difference = norm(found[name] - value for name, value in (missing | expected).items())
    assert difference <= 1e-5 * max(size, rounding)
    return size
