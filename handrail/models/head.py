"""Log-probabilities and entropies from hidden states, without the logits [N, V] of all positions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**26
"""Number of logits (positions × vocabulary) that are in memory at once: 256 MiB in float32. Smaller chunks
take longer, because each one reads the whole layer."""


def log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute log π [N, K] of K targets per position, and the entropy ([N] or None), at ``temperature``.

    ``hidden`` [N, D]: inputs of the output layer ``head``. ``targets``: int64 [N, K]. float32, or float64 if
    ``hidden`` is. More than CHUNK logits are computed in chunks, forward and again backward, which takes a
    third more multiplications in this layer and hardly any memory.
    """
    # Only a plain linear layer: an adapter's layer, say, computes something else from its weight.
    chunked = type(head) is nn.Linear and head.bias is None and len(hidden) * len(head.weight) > CHUNK
    if not chunked:
        return from_logits(head(hidden), targets, temperature, with_entropy)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunked_log_probs: Callable[..., tuple[Tensor, Tensor]] = ChunkedLogProbs.apply
    logp, entropy = chunked_log_probs(hidden, head.weight, targets, temperature, with_entropy, dtype)
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
    """``from_logits(hidden @ weight.T)``, of which only a chunk of positions is in memory at a time.

    With z the logits, p their softmax and H its entropy: ∂log p_k/∂z = e_k − p, ∂H/∂z = −p·(log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        columns, found = weight.to(dtype).T, []
        for rows, wanted in zip(chunks(hidden, weight), chunks(targets, weight), strict=True):
            logits = scaled_logits(rows.to(dtype), columns, temperature)
            norm = logits.logsumexp(-1)
            logp = logits.gather(-1, wanted) - norm.unsqueeze(-1)
            mean = torch.linalg.vecdot(torch.softmax(logits, -1), logits) if with_entropy else norm
            found.append((logp, norm, norm - mean))
        logp, norm, entropy = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.temperature, ctx.with_entropy, ctx.dtype = temperature, with_entropy, dtype
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        weight_cast = weight.to(ctx.dtype)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=norm.dtype) if ctx.needs_input_grad[1] else None
        every = (hidden, targets, norm, entropy, *grads, of_hidden)
        for rows, wanted, norms, spread, of_logp, of_entropy, out in zip(
            *(chunks(each, weight) for each in every), strict=True
        ):
            rows = rows.to(ctx.dtype)
            logp = scaled_logits(rows, weight_cast.T, ctx.temperature).sub_(norms.unsqueeze(-1))
            total = of_logp.sum(-1, keepdim=True)
            if ctx.with_entropy:
                p = logp.exp()
                total = logp.add_(spread.unsqueeze(-1)).mul_(of_entropy.unsqueeze(-1)).add_(total)
            else:
                p = logp.exp_()
            of_logits = p.mul_(total.neg_()).scatter_add_(-1, wanted, of_logp)
            of_logits = divided(of_logits, ctx.temperature).to(ctx.dtype)
            out.copy_(of_logits @ weight_cast)
            if of_weight is not None and of_weight.dtype == ctx.dtype:
                of_weight.addmm_(of_logits.T, rows)
            elif of_weight is not None:
                of_weight += of_logits.T @ rows
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None, None, None


def chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Views of the rows whose logits are in memory together."""
    return torch.split(rows, max(1, CHUNK // len(weight)))


def scaled_logits(hidden: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Logits [N, V] in float32, or float64 if ``hidden`` is; of no graph, so that they may be overwritten."""
    return divided(widen(hidden @ columns), temperature)


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
