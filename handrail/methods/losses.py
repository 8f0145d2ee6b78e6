"""Per-token objectives, to be maximised. Pure functions of the current log-probabilities and the token streams.

All tensors are float32 [B, T]. ``credit`` and ``weight`` arrive divided by their normalisers (``handrail.training.batch``), so
that the loss of a step is minus the plain sum of its tokens' objectives, however they were split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from handrail.types import Origin


@dataclass(frozen=True)
class Streams:
    """What is known of every token before the loss; zero where ``mask`` is zero."""

    mask: Tensor  # 1 on completion tokens
    credit: Tensor  # advantage / normaliser
    weight: Tensor  # imitation weight / normaliser
    bonus: Tensor  # entropy coefficient / normaliser
    kl: Tensor  # coefficient of the divergence from the frozen model / normaliser
    behaviour: Tensor  # log-probability when sampled; NaN where unknown
    old: Tensor  # log-probability before any update, by the trainer; NaN where unknown
    origin: Tensor  # int64, see Origin


Ratio = Literal["token", "sequence"]
Shape = Literal["p/(p+c)", "p", "p^e", "sqrt", "log"]

SHAPES: dict[Shape, Callable[[Tensor, float], Tensor]] = {
    # p/(p+c) as a sigmoid of log(p/c): exact where p underflows
    "p/(p+c)": lambda logp, c: torch.sigmoid(logp - torch.log(torch.tensor(c))),
    "p": lambda logp, c: logp.exp(),
    "p^e": lambda logp, c: (c * logp).exp(),
    "sqrt": lambda logp, c: (logp / 2).exp(),
    "log": lambda logp, c: logp,
}


def log_ratio(logp: Tensor, streams: Streams, ratio: Ratio) -> Tensor:
    """log(π/π_old): of each token, or (GSPO, arXiv 2507.18071 eq. 7) its mean over the row's sampled tokens.

    A token whose old log-probability is unknown counts as on-policy: ratio 1, gradient that of log π.
    """
    per_token = (logp - old(logp, streams)) * streams.mask
    if ratio == "token":
        return per_token
    sampled = streams.mask * (streams.origin == Origin.POLICY)
    mean = (per_token * sampled).sum(1, keepdim=True) / sampled.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(per_token)


def old(logp: Tensor, streams: Streams) -> Tensor:
    """log π_old, without gradient; the current one where nobody knows it."""
    return torch.where(streams.old.isnan(), logp.detach(), streams.old)


def correction(logp: Tensor, streams: Streams, cap: float) -> Tensor:
    """min(π_old/μ, cap) of tokens that another program sampled with likelihood μ, 1 elsewhere: truncated importance sampling, as in
    ``Your efficient RL framework secretly brings you off-policy RL training`` (Yao et al., 2025). Without gradient."""
    weight = (old(logp, streams) - streams.behaviour).exp().clamp(max=cap)
    return torch.where(streams.behaviour.isnan(), 1.0, weight)


def divergence(logp: Tensor, frozen: Tensor, streams: Streams) -> Tensor:
    """exp(log π_ref − log π) − (log π_ref − log π) − 1 on tokens that the policy sampled (k3; GRPO, arXiv 2402.03300 eq. 4), times its
    coefficient."""
    log_ratio = (frozen - logp) * (streams.origin == Origin.POLICY) * streams.mask
    return streams.kl * (log_ratio.exp() - log_ratio - 1)


def policy_gradient(logp: Tensor, streams: Streams, ratio: Ratio = "token", clip: tuple[float, float] | None = None) -> Tensor:
    """r·A, or with ``clip`` = (low, high) min(r·A, clip(r, 1−low, 1+high)·A) (GRPO, arXiv 2402.03300 eq. 3)."""
    r = log_ratio(logp, streams, ratio).exp()
    if clip is None:
        return r * streams.credit
    return torch.minimum(r * streams.credit, r.clamp(1 - clip[0], 1 + clip[1]) * streams.credit)


def shaped(logp: Tensor, streams: Streams, shape: Shape, constant: float) -> Tensor:
    """f(π)·A with the gradient through f (LUFFY, arXiv 2504.14945 eq. 8): rare tokens of a reference weigh more."""
    return SHAPES[shape](logp, constant) * streams.credit


def imitation(logp: Tensor, streams: Streams) -> Tensor:
    """w·log π with w held constant."""
    return streams.weight * logp
