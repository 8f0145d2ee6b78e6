"""Linearization of objectives that couple trajectories, such as preferences or distributions over a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from handrail.methods.requests import Score, gather
from handrail.types.trajectory import Group, Trajectory

Objective = Callable[[Sequence[Trajectory], Sequence[Tensor]], Tensor]


async def linearized(group: Group, members: Sequence[Trajectory], objective: Objective) -> Group:
    """Add ∂J/∂log π of every trained token of ``members``, at the current weights, to ``linear_weight``.

    ``objective`` returns J, a scalar to be maximized, given these trajectories of the group and the
    log-probabilities [T] of each. The loss adds Σ w·log π, divided by the update's problems. Its gradient in
    the next update is exactly that of the mean of J, however trajectories are split into micro-batches. Costs
    one forward pass over ``members``.
    """
    scored = await gather(
        *(Score(member.prompt_ids, member.token_ids, targets=member.targets) for member in members)
    )
    logps = [logp.requires_grad_() for logp in scored]
    with torch.enable_grad():
        gradients = torch.autograd.grad(objective(members, logps), logps, materialize_grads=True)
    weighted = [
        member.with_columns(linear_weight=member.column("linear_weight") + gradient * member.trained)
        for member, gradient in zip(members, gradients, strict=True)
    ]
    return group.swap_all(members, weighted)
