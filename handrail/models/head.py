"""Log-probabilities and entropies from hidden states, without the logits [N, V] of all positions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**26
"""Number of logits (positions × vocabulary) that are in memory at once: 256 MiB in float32. Smaller chunks
take longer, because each one reads the whole layer."""


def log_probs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute log π [N, K] of K targets per position, and the entropy ([N] or None), at ``temperature``.

    ``hidden`` [N, D]: inputs of the output layer ``head``. ``targets``: int64 [N, K]. float32, or float64 if
    ``hidden`` is. More than CHUNK logits are computed in chunks, forward and again backward, which takes a
    third more multiplications in this layer and hardly any memory. ``compiled``: True to compile what is done
    with a chunk, if K is 1.
    """
    # Only a plain linear layer: an adapter's layer, say, computes something else from its weight.
    chunked = type(head) is nn.Linear and head.bias is None and len(hidden) * len(head.weight) > CHUNK
    if not chunked:
        return from_logits(head(hidden), targets, temperature, with_entropy)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunked_log_probs: Callable[..., tuple[Tensor, Tensor]] = ChunkedLogProbs.apply
    compiled = compiled and targets.shape[1] == 1
    logp, entropy = chunked_log_probs(
        hidden, head.weight, targets, temperature, with_entropy, dtype, compiled
    )
    return logp, entropy if with_entropy else None


def from_logits(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute log π [N, K] of ``targets`` [N, K] and the entropy [N] from logits [N, V]."""
    logits = widen(logits)
    if temperature != 1:
        logits = logits / temperature
    norm = logits.logsumexp(-1)
    logp = logits.gather(-1, targets) - norm.unsqueeze(-1)
    return logp, norm - (torch.softmax(logits, -1) * logits).sum(-1) if with_entropy else None


class ChunkedLogProbs(torch.autograd.Function):
    """``from_logits(hidden @ weight.T)``, of which only a chunk of positions is in memory at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        dtype: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        columns, found, summarize = weight.to(dtype).T, [], fused(summary) if compiled else summary
        for rows, wanted in zip(*(chunks(each, weight, compiled) for each in (hidden, targets)), strict=True):
            found.append(summarize(rows.to(dtype) @ columns, wanted, temperature, with_entropy))
        logp, norm, entropy = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.settings, ctx.dtype, ctx.compiled = (temperature, with_entropy), dtype, compiled
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        weight_cast, derive = weight.to(ctx.dtype), fused(derivative) if ctx.compiled else derivative
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=norm.dtype) if ctx.needs_input_grad[1] else None
        every = (hidden, of_hidden, targets, norm, entropy, *grads)
        for rows, out, *chunk in zip(*(chunks(each, weight, ctx.compiled) for each in every), strict=True):
            rows = rows.to(ctx.dtype)
            of_logits = derive(rows @ weight_cast.T, *chunk, *ctx.settings)
            out.copy_(of_logits @ weight_cast)
            if of_weight is not None and of_weight.dtype == ctx.dtype:
                of_weight.addmm_(of_logits.T, rows)
            elif of_weight is not None:
                of_weight += of_logits.T @ rows
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return of_hidden, of_weight, None, None, None, None, None


def chunks(rows: Tensor, weight: Tensor, compiled: bool) -> tuple[Tensor, ...]:
    """Views of the rows whose logits are in memory together."""
    # Compiled, a chunk has fewer copies; and large chunks add to the weight's gradient less often.
    return torch.split(rows, max(1, (4 if compiled else 1) * CHUNK // len(weight)))


def summary(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log π [N, K] of the targets, log Σ exp [N] and the entropy [N] from logits [N, V] of no graph,
    which may be overwritten."""
    logits = divided(widen(logits), temperature)
    norm = logits.logsumexp(-1)
    logp = logits.gather(-1, targets) - norm.unsqueeze(-1)
    mean = torch.linalg.vecdot(torch.softmax(logits, -1), logits) if with_entropy else norm
    return logp, norm, norm - mean


def derivative(
    logits: Tensor,
    targets: Tensor,
    norm: Tensor,
    entropy: Tensor,
    of_logp: Tensor,
    of_entropy: Tensor,
    temperature: float,
    with_entropy: bool,
) -> Tensor:
    """Compute the gradient of the logits [N, V], in their number type, from those of ``summary``.

    With z the logits, p their softmax and H its entropy: ∂log p_k/∂z = e_k − p, ∂H/∂z = −p·(log p + H).
    """
    dtype = logits.dtype
    logp = divided(widen(logits), temperature).sub_(norm.unsqueeze(-1))
    total = of_logp.sum(-1, keepdim=True)
    if with_entropy:
        p = logp.exp()
        total = logp.add_(entropy.unsqueeze(-1)).mul_(of_entropy.unsqueeze(-1)).add_(total)
    else:
        p = logp.exp_()
    of_logits = p.mul_(total.neg_())
    if torch.compiler.is_compiling():  # becomes one kernel with the rest, which scatter_add_ would not
        places = torch.arange(of_logits.shape[-1], device=of_logits.device)
        of_logits = of_logits + torch.where(places == targets, of_logp, 0)
    else:
        of_logits.scatter_add_(-1, targets, of_logp)
    return divided(of_logits, temperature).to(dtype)


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled ``summary`` or ``derivative``; asked for late, because it imports the compiler."""
    return torch.compile(function, dynamic=True)


def divided(values: Tensor, temperature: float) -> Tensor:
    """Divide ``values`` in place; by 1, without reading them all."""
    return values if temperature == 1 else values.div_(temperature)


def widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_last(model: Any) -> bool:
    """True if the logits are exactly what the model's output layer returns: no soft-capping or scale after
    it."""
    head, found = model.get_output_embeddings(), []
    if head is None:
        return False
    tokens = torch.arange(8, device=head.weight.device)[None]
    hook = head.register_forward_hook(lambda module, inputs, output: found.append(output))
    with hook, torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return len(found) == 1 and torch.equal(found[0], logits)


@contextmanager
def skipped(head: nn.Module) -> Iterator[None]:
    """Make a model return the inputs of its output layer in place of logits."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
