"""Packed rows: every distinct prompt and every completion once, one behind the other, without padding.

Only attention needs to know the rows. It gathers them from the packed tokens, pads them on the right, where
causal attention needs no mask, and keeps the result of one copy of every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from handrail.models.batching import Inputs

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which is rebuilt for every shape, and hardly two micro-batches have the same."""


@dataclass(frozen=True)
class Packed:
    """L tokens of B rows: the U distinct prompts, then the completions without their last tokens, which
    predict nothing.

    The prompt ``a b`` with the completions ``c d e`` and ``f g``: tokens ``a b c d f``, rows ``a b c d`` and
    ``a b f``.
    """

    tokens: Tensor  # [L]
    positions: Tensor  # [L], within the row
    rows: Tensor  # [B, S], places in ``tokens``; right-padded with 0
    source: Tensor  # [L], place of each token, or of one of its copies, in the flattened ``rows``
    copies: Tensor  # [C], places of the other copies
    before: Tensor  # [N], place in ``tokens`` of the token before each of the N completion tokens
    completion: Tensor  # [N], place of each completion token in the flattened [B, T]

    @classmethod
    def of(cls, inputs: Inputs) -> Packed:
        """Pack rows whose prompts are not empty."""
        prompts, read = inputs.prompt_mask.sum(1), inputs.completion_mask[:, 1:]
        lengths = read.sum(1)
        starts = prompts.cumsum(0) - prompts
        behind = prompts.sum() + lengths.cumsum(0) - lengths
        start, prompt = starts[inputs.prompt_of, None], prompts[inputs.prompt_of, None]
        at = torch.arange(int((prompt[:, 0] + lengths).max())).expand(len(lengths), -1)
        inside = at < prompt + lengths[:, None]
        rows = torch.where(at < prompt, start + at, behind[:, None] + at - prompt) * inside
        tokens = torch.cat([
            inputs.prompt[inputs.prompt_mask.bool()], inputs.completion[:, :-1][read.bool()]
        ])  # fmt: skip
        positions, source = torch.empty_like(tokens), torch.empty_like(tokens)
        positions[rows[inside]] = at[inside]
        source[rows[inside]] = inside.flatten().nonzero()[:, 0]
        other = inside.flatten()
        other[source] = False
        row, place = inputs.completion_mask.nonzero(as_tuple=True)
        before = rows[row, prompt[row, 0] - 1 + place]
        completion = row * inputs.completion.shape[1] + place
        return cls(tokens, positions, rows, source, other.nonzero()[:, 0], before, completion)

    def to(self, device: torch.device) -> Packed:
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


class Unpack(torch.autograd.Function):
    """Give each row its tokens: ``states[rows]``.

    As most tokens are in one row, the gradient is read at ``source`` and added up for the copies only.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, source: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(rows, source, copies)
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, source, copies = ctx.saved_tensors
        of_states = grads[0].index_select(0, source)
        of_states.index_add_(0, rows[copies], grads[0].index_select(0, copies))
        return of_states, None, None, None


class Pack(torch.autograd.Function):
    """Keep one copy of each token: ``states[source]``. The gradient of the others is zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        ctx.shape = states.shape
        return states.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, source, grads[0]), None


unpack: Callable[..., Tensor] = Unpack.apply
pack: Callable[..., Tensor] = Pack.apply


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each packed row.

    query [1, H, L, D], key and value [1, H / groups, L, D], result [1, L, H, D].
    """
    width, flat = packed.rows.shape[1], packed.rows.flatten()

    def rows(states: Tensor) -> Tensor:
        gathered = unpack(states[0].transpose(0, 1), flat, packed.source, packed.copies)
        return gathered.view(*packed.rows.shape, *gathered.shape[1:]).transpose(1, 2)

    mask = None
    if sliding_window is not None and sliding_window < width:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - sliding_window)
    keys, values, groups = rows(key), rows(value), query.shape[1] // key.shape[1]
    if groups > 1 and not reads_groups(query.device.type, computed_in(query), mask is not None):
        keys, values, groups = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), 1
    with sdpa_kernel(KERNELS):
        out = scaled_dot_product_attention(
            rows(query), keys, values, mask, dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=groups > 1,
        )  # fmt: skip
    return pack(out.transpose(1, 2).flatten(0, 1), packed.source).unsqueeze(0)


def reads_groups(device: str, dtype: torch.dtype, masked: bool) -> bool:
    """True if a fast kernel reads the keys and values of grouped queries without copies.

    On CUDA only FlashAttention does, for numbers of 16 bits and without a mask. The kernel that is left for
    the others has every query times every key in memory at once.
    """
    return device != "cuda" or (dtype in (torch.bfloat16, torch.float16) and not masked)


def computed_in(query: Tensor) -> torch.dtype:
    """Number type of attention: autocast's, if it is on, whatever that of ``query``."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def forward(model: Any, packed: Packed) -> Tensor:
    """Return what ``model`` puts out for the token before each completion token, [N, V]."""
    out = model(
        input_ids=packed.tokens[None],
        position_ids=packed.positions[None],
        # Four dimensions keep transformers from making a mask; ``packed_attention`` reads ``packed`` instead.
        attention_mask=packed.tokens.new_zeros(1, 1, 1, 1, dtype=torch.bool),
        logits_to_keep=packed.before,
        use_cache=False,
        packed=packed,
    )
    return torch.as_tensor(out.logits)[0]


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """True if ``model`` puts out the same for packed rows as for rows read alone.

    It does not if it mixes tokens elsewhere than in attention, or attends with biases or caps of its own.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    prompts, completions = [[4, 3, 2], [1, 2], [4, 3, 2]], [[5, 1, 2], [3, 4, 5, 6], [2, 2]]
    found = forward(model, Packed.of(Inputs.of(prompts, completions)).to(model.device))
    alone = [
        model(input_ids=torch.tensor([prompt + row], device=model.device), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        for prompt, row in zip(prompts, completions, strict=True)
    ]
    expected = torch.cat(alone).float()
    rounding = 1e-4 if found.dtype == torch.float32 else 0.1
    return bool((found.float() - expected).abs().mean() <= rounding * expected.std())
