"""Sampling from a transformers model: distinct prompts are read once, and ended completions leave the
batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from handrail.models.batching import Inputs

LEAVE_TOGETHER = 8
"""Ended completions leave once they make up 1/8 of the batch: removing them copies the cache of all
others."""


@dataclass(frozen=True)
class Completion:
    """One completion of T tokens, the end token included."""

    tokens: Tensor  # int64 [T]
    logp: Tensor  # float32 [T], log-probability of each token
    entropy: Tensor  # float32 [T], entropy of each token's distribution; NaN if unknown
    finished: bool


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

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        """Read the prompts, equal ones only once. ``logits`` [B, V] predict the token after each prompt."""
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.layers = [
            PreallocatedCacheLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]
        inputs = Inputs.of(prompts, [()] * len(prompts)).to(model.device)
        self.mask = inputs.prompt_mask
        self.positions = positions(self.mask)
        self.logits = self._read(inputs.prompt)
        self.keep(inputs.prompt_of)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows, in this order; a row may occur several times."""
        self.cache.reorder_cache(rows)
        self.logits, self.mask, self.positions = self.logits[rows], self.mask[rows], self.positions[rows, -1:]

    def follow(self, tokens: Tensor) -> None:
        """Append one token to every row [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self._read(tokens.unsqueeze(1))

    def _read(self, ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return torch.as_tensor(out.logits)[:, -1]


class Uniforms:
    """One stream of random numbers in [0, 1) per completion; each stream depends only on its seed."""

    BLOCK = 64
    """Number of random numbers drawn at a time."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.device, self.at = device, 0

    def next(self) -> Tensor:
        """Return the next number of every stream, float64 [B]."""
        if self.at % self.BLOCK == 0:
            block = np.stack([stream.random(self.BLOCK) for stream in self.streams])
            self.block = torch.from_numpy(block).to(self.device)
        self.at += 1
        return self.block[:, (self.at - 1) % self.BLOCK]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    max_tokens: Sequence[int],
    temperature: float,
    ends: set[int],
    poll: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Sample one completion per prompt, of at most its ``max_tokens``; temperature 0 always picks the
    likeliest token.

    A completion depends only on its prompt and its seed, not on the rest of the batch. ``poll`` is called
    before every token.
    """
    cached, device = CachedModel(model, prompts), model.device
    uniforms = Uniforms(seeds, device)
    end_tokens = torch.tensor(sorted(ends), device=device)
    rows = torch.arange(len(prompts), device=device)  # indices of the completions still in the batch
    lengths, longest = torch.tensor(max_tokens, device=device), max(max_tokens)
    finished, stopped = torch.zeros(2, len(prompts), dtype=torch.bool, device=device)
    tokens = rows.new_zeros(len(prompts), longest)
    logp, entropy = torch.zeros(2, len(prompts), longest, device=device)
    for at in range(longest):
        poll()
        drawn, logp[rows, at], entropy[rows, at] = draw(cached.logits, uniforms.next()[rows], temperature)
        tokens[rows, at] = drawn
        ended = rows[torch.isin(drawn, end_tokens) & ~stopped[rows]]
        lengths[ended], finished[ended] = at + 1, True
        stopped |= lengths <= at + 1
        staying = (~stopped[rows]).nonzero().squeeze(-1)
        if len(staying) == 0:
            break
        if (len(rows) - len(staying)) * LEAVE_TOGETHER >= len(rows):
            rows, drawn = rows[staying], drawn[staying]
            cached.keep(staying)
        cached.follow(drawn)
    return [
        Completion(row[:n].clone(), logs[:n].clone(), spread[:n].clone(), ended)
        for n, ended, row, logs, spread in zip(
            lengths.tolist(), finished.tolist(), tokens.cpu(), logp.cpu(), entropy.cpu(), strict=True
        )
    ]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a token per row of ``logits`` [B, V] by inverting the cumulative distribution at ``uniform``
    [B].

    Returns (token, its log-probability, entropy). Needs one random number per row; the Gumbel trick would
    need V. Temperature 0 picks the likeliest token, with the log-probabilities of temperature 1.
    """
    logits = logits.float() / (temperature or 1.0)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    # In float32, rare tokens of a large vocabulary would round away.
    summed = weights.cumsum(-1, dtype=torch.float64)
    total = summed[:, -1:]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        token = torch.searchsorted(summed, uniform.unsqueeze(-1) * total, right=True).clamp(
            max=logits.shape[-1] - 1
        )
    norm = total.log().float().squeeze(-1)
    entropy = norm - torch.linalg.vecdot(
        weights, logits.clamp(min=torch.finfo(torch.float32).min)
    ) / total.float().squeeze(-1)
    return token.squeeze(-1), logits.gather(-1, token).squeeze(-1) - norm, entropy


class CopySampler:
    """Sample from a bfloat16 copy of a float32 model, because casting all weights costs more than a token."""

    def __init__(self, model: Any, temperature: float, ends: set[int], device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device).requires_grad_(False).eval()
        # Buffers stay in float32: positions need the full precision of the rotary frequencies.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.temperature, self.ends = temperature, ends

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on, named as in the model."""
        self.model.load_state_dict(dict(weights), strict=False)  # tied weights come only once

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt; see ``generate``."""
        return generate(self.model, prompts, seeds, max_tokens, self.temperature, self.ends, poll)
