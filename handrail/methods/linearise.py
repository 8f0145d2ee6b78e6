"""Linearization of objectives that couple trajectories, such as preferences or distributions over a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from handrail.methods.requests import Score, gather
from handrail.types.trajectory import Group

Objective = Callable[[Group, Sequence[Tensor]], Tensor]


async def linearised(group: Group, objective: Objective) -> Group:
    """Add ∂J/∂log π of every trained token, at the current weights, to the column ``linear_weight``.

    ``objective`` returns J, a scalar to be maximized, given the group and the log-probabilities [T] of each
    of its trajectories. The loss adds Σ w·log π, divided by the update's problems. Its gradient in the next
    update is exactly that of the mean of J, however trajectories are split into micro-batches. Costs one
    forward pass.
    """
    scored = await gather(*(Score(member.prompt_ids, member.token_ids) for member in group.trajectories))
    logps = [logp.requires_grad_() for logp in scored]
    with torch.enable_grad():
        gradients = torch.autograd.grad(objective(group, logps), logps, materialize_grads=True)
    pairs = zip(group.trajectories, gradients, strict=True)
    weighted = [
        member.with_columns(linear_weight=member.column("linear_weight") + gradient * member.trained)
        for member, gradient in pairs
    ]
    return Group(group.problem, weighted)
