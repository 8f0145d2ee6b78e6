"""PyTorch's attention kernels for packed rows, and while sampling with keys and values of grouped queries
shared instead of copied.

If there is a padding mask, transformers repeats keys and values for every query head, because some of CUDA's
kernels need it. A CPU's and cuDNN's do not, and during sampling the copy costs more than everything else in a
layer. But cuDNN makes a kernel for every new shape, which takes longer than it saves. So it is used only
while shapes repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from handrail.models.packing import KERNELS, Packed, packed_attention

NAME = "handrail_sdpa"

REPEATS = ContextVar("repeats", default=False)
"""True while a token is read with the shapes of the one before."""


@contextmanager
def repeating() -> Iterator[None]:
    """Enclose reading a token with the shapes of the one before."""
    token = REPEATS.set(True)
    try:
        yield
    finally:
        REPEATS.reset(token)


def sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    packed: Packed | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Like transformers' ``sdpa``: query [B, H, Q, D], key and value [B, H / groups, K, D], result [B, Q, H,
    D]. ``packed``: the rows that the tokens belong to, if they are packed."""
    if packed is not None:
        return packed_attention(query, key, value, packed, dropout, scaling, sliding_window), None
    if attention_mask is None or position_bias is not None or not shares(query, key, value, attention_mask):
        others |= {"position_bias": position_bias, "sliding_window": sliding_window}
        with sdpa_kernel(KERNELS) if query.is_cuda else nullcontext():
            whole: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **others
            )
        return whole
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if query.is_cuda else nullcontext():
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def shares(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """True if a fast kernel reads the keys and values of grouped queries without copies."""
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    return (
        query.shape[2] == 1
        and REPEATS.get()
        and can_use_cudnn_attention(SDPAParams(query, key, value, mask, 0.0, False, True))
    )


def use_ours(model: Any) -> None:
    """Make ``model`` use ``sdpa`` above instead of transformers'; other attention implementations stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
