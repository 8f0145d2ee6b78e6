"""The loss that all engines share, and its per-token objectives: pure functions of current log-probabilities.

All tensors are float32 [B, T]. Objectives are maximized; the loss of an update is minus their plain sum,
however its trajectories are split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from handrail.methods.batch import TokenBatch
from handrail.types.trajectory import Author

Ratio = Literal["token", "sequence"]
Shape = Literal["p/(p+c)", "p", "p^e", "sqrt", "log"]
Surrogate = Callable[[Tensor, TokenBatch], Tensor]

SHAPES: dict[Shape, Callable[[Tensor, float], Tensor]] = {
    # p/(p+c) as a sigmoid of log(p/c) stays accurate even if p underflows.
    "p/(p+c)": lambda logp, c: torch.sigmoid(logp - torch.log(torch.tensor(c))),
    "p": lambda logp, c: logp.exp(),
    "p^e": lambda logp, c: (c * logp).exp(),
    "sqrt": lambda logp, c: (logp / 2).exp(),
    "log": lambda logp, c: logp,
}


class HasSurrogate(Protocol):
    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor: ...


def token_loss(
    method: HasSurrogate,
    logp: Tensor,
    batch: TokenBatch,
    entropy: Tensor | None = None,
    reference_logp: Tensor | None = None,
    importance_weight_cap: float = 0.0,
) -> Tensor:
    """Compute −Σ (surrogate + linear_weight·log π + entropy_coef·H − kl_coef·KL) over trained tokens.

    ``logp``: current log-probabilities, with gradient. ``entropy``: of the current distributions; None
    without an entropy bonus. ``reference_logp``: log-probabilities under the model before training; None
    without a KL term. ``importance_weight_cap``: see ``importance_weight``; 0 turns the weights off.
    """
    if importance_weight_cap:
        weighted = batch.advantage * importance_weight(logp.detach(), batch, importance_weight_cap)
        batch = replace(batch, columns={**batch.columns, "advantage": weighted})
    per_token = objective(method, logp, batch)
    if entropy is not None:
        per_token = per_token + batch.entropy_coef * entropy
    if reference_logp is not None:
        per_token = per_token - divergence(logp, reference_logp, batch)
    return -torch.where(batch.mask > 0, per_token, 0.0).sum()


def objective(method: HasSurrogate, logp: Tensor, batch: TokenBatch) -> Tensor:
    """The method's surrogate + linear_weight·log π."""
    return method.surrogate(logp, batch) + batch["linear_weight"] * logp


def old(logp: Tensor, batch: TokenBatch) -> Tensor:
    """log π_old, without gradient; if it is unknown, the current log-probability."""
    return torch.where(batch.old_logp.isnan(), logp.detach(), batch.old_logp)


def log_ratio(logp: Tensor, batch: TokenBatch, ratio: Ratio) -> Tensor:
    """log(π/π_old) per token, or its mean over the trajectory's sampled tokens (GSPO, arXiv 2507.18071 eq.
    7), those of the policy and of its replayed answers.

    A token with unknown old log-probability counts as on-policy: its ratio is 1, with the gradient of log π.
    Bounded by ±20 a token, so that no ratio overflows.
    """
    per_token = ((logp - old(logp, batch)) * batch.mask).clamp(-20, 20)
    if ratio == "token":
        return per_token
    sampled = batch.mask * ((batch.author == Author.POLICY) | (batch.author == Author.REPLAY))
    mean = (per_token * sampled).sum(1, keepdim=True) / sampled.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(per_token)


def importance_weight(logp: Tensor, batch: TokenBatch, cap: float) -> Tensor:
    """min(π_old/μ, cap) for tokens sampled with known probability μ, 1 for all others; without gradient.

    Truncated importance sampling, as in "Your efficient RL framework secretly brings you off-policy RL
    training" (Yao et al., 2025).
    """
    ratio = sampling_ratio(logp, batch)
    return torch.where(ratio.isnan(), 1.0, ratio.clamp(max=cap))


def sampling_ratio(logp: Tensor, batch: TokenBatch) -> Tensor:
    """π_old/μ per token, without gradient: the importance weight before its cap; NaN if μ is unknown."""
    return (old(logp, batch) - batch.sampling_logp).exp()


def divergence(logp: Tensor, reference_logp: Tensor, batch: TokenBatch) -> Tensor:
    """kl_coef · (exp(log π_ref − log π) − (log π_ref − log π) − 1) on the policy's own tokens, 0 elsewhere.

    The k3 estimator of the KL divergence (GRPO, arXiv 2402.03300 eq. 4).
    """
    log_ratio = (reference_logp - logp) * (batch.author == Author.POLICY) * batch.mask
    return batch.kl_coef * (log_ratio.exp() - log_ratio - 1)


def policy_gradient(
    logp: Tensor,
    batch: TokenBatch,
    ratio: Ratio = "token",
    clip: tuple[float, float] | None = None,
    dual_clip: float = 0.0,
) -> Tensor:
    """r·A; with ``clip`` = (low, high), min(r·A, clip(r, 1−low, 1+high)·A) (GRPO, arXiv 2402.03300 eq. 3).

    With ``dual_clip`` = c, at least c·A if A < 0 (arXiv 1912.09729 eq. 5).
    """
    r = log_ratio(logp, batch, ratio).exp()
    objective = r * batch.advantage
    if clip is not None:
        objective = torch.minimum(objective, r.clamp(1 - clip[0], 1 + clip[1]) * batch.advantage)
    if dual_clip:
        bounded = torch.maximum(objective, dual_clip * batch.advantage)
        objective = torch.where(batch.advantage < 0, bounded, objective)
    return objective


def shaped(logp: Tensor, batch: TokenBatch, shape: Shape, constant: float) -> Tensor:
    """f(π)·A with gradient through f (LUFFY, arXiv 2504.14945 eq. 8): rare reference tokens weigh more."""
    return SHAPES[shape](logp, constant) * batch.advantage


def imitation(logp: Tensor, batch: TokenBatch) -> Tensor:
    """w·log π, with w constant."""
    return batch.imitation_weight * logp


def by_author(surrogates: Mapping[Author, Surrogate]) -> Surrogate:
    """Combine one surrogate per author; tokens of other authors get 0."""

    def surrogate(logp: Tensor, batch: TokenBatch) -> Tensor:
        out = torch.zeros_like(logp)
        for author, of_author in surrogates.items():
            out = torch.where(batch.author == author, of_author(logp, batch), out)
        return out

    return surrogate


def plan_weights(
    logp: Tensor,
    plan_logp: Tensor,
    mask: Tensor,
    alpha: float,
    hard_mask: bool = False,
    normalize: bool = False,
) -> Tensor:
    """w = p0^(1−α)·p1^α of every token, without gradient, from log p0 and log p1 (SORT); p0 if log p1 is NaN.

    ``hard_mask``: 0 unless p1 > p0. ``normalize``: divide by the mean over the trajectory's tokens.
    """
    planned = torch.where(plan_logp.isnan(), logp, plan_logp)
    weights = torch.exp((1 - alpha) * logp + alpha * planned) * mask
    if hard_mask:
        weights = weights * ((planned > logp) | plan_logp.isnan())
    if normalize:
        mean = weights.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        weights = weights / mean.clamp(min=torch.finfo(weights.dtype).tiny)
    return weights
