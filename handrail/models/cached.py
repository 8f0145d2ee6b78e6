"""A model with its KV cache, and how the cache grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from handrail.models.batching import Inputs

LEAVE_TOGETHER = 8
"""Ended completions leave once they make up 1/8 of the batch: removing them copies the cache of all
others."""


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its row, not counting left padding; [B, L], like ``mask``."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """KV cache with preallocated space: appending a token copies nothing; transformers' layer copies
    everything."""

    ROOM = 64
    keys: Tensor
    values: Tensor
    stores: list[Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        if before == 0:
            whole: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return whole
        new, after = (key_states, value_states), before + key_states.shape[-2]
        if self.stores is None or after > self.stores[0].shape[-2]:
            old = self.keys, self.values
            self.stores = [
                states.new_empty(*states.shape[:2], after + self.ROOM, states.shape[-1]) for states in new
            ]
            for store, kept in zip(self.stores, old, strict=True):
                store[:, :, :before] = kept
        for store, states in zip(self.stores, new, strict=True):
            store[:, :, before:after] = states
        self.keys, self.values = (store[:, :, :after] for store in self.stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.stores = None


class CachedModel:
    """A model with its KV cache, one row for each sequence."""

    layer: type[DynamicLayer] = PreallocatedCacheLayer

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        """Read the prompts, equal ones only once. ``logits`` [B, V] predict the token after each prompt."""
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.layers = [
            self.layer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]
        inputs = Inputs.of(prompts, [()] * len(prompts)).to(model.device)
        self.mask = inputs.prompt_mask
        self.positions = positions(self.mask)
        self.logits = self._read(inputs.prompt, self.mask)
        self.keep(inputs.prompt_of)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows, in this order; a row may occur several times."""
        self.cache.reorder_cache(rows)
        self.logits, self.mask, self.positions = self.logits[rows], self.mask[rows], self.positions[rows, -1:]

    def follow(self, tokens: Tensor) -> None:
        """Append one token to every row [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self._read(tokens.unsqueeze(1), self.mask)

    def remaining(self, stopped: Tensor) -> Tensor | None:
        """Return the rows to continue with, or None if too few have ``stopped`` [B] to be removed.

        The result is empty if all have. Asking costs a wait for the GPU, so it is asked once per token.
        """
        staying = (~stopped).nonzero().squeeze(-1)
        leave = len(staying) == 0 or (len(stopped) - len(staying)) * LEAVE_TOGETHER >= len(stopped)
        return staying if leave else None

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return torch.as_tensor(out.logits)[:, -1]
