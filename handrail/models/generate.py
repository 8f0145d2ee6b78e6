"""Sampling from a transformers model: distinct prompts are read once, and ended completions leave the
batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handrail.models.cached import CachedModel
from handrail.models.graphs import GraphedModel, can_repeat


@dataclass(frozen=True)
class Completion:
    """One completion of T tokens, the end token included."""

    tokens: Tensor  # int64 [T]
    logp: Tensor  # float32 [T], log-probability of each token
    entropy: Tensor  # float32 [T], entropy of each token's distribution; NaN if unknown
    finished: bool


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
    kind: type[CachedModel] | None = None,
) -> list[Completion]:
    """Sample one completion per prompt, of at most its ``max_tokens``; temperature 0 always picks the
    likeliest token.

    A completion depends only on its prompt and its seed, not on the rest of the batch. ``poll`` is called
    before every token. ``kind``: how the model is called; by default, with CUDA graphs if it can be.
    """
    if kind is None:
        kind = GraphedModel if can_repeat(model) else CachedModel
    cached, device = kind(model, prompts), model.device
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
        # Without choosing rows by a mask, for which one would wait for the GPU.
        ended = torch.isin(drawn, end_tokens) & ~stopped[rows]
        lengths[rows] = torch.where(ended, at + 1, lengths[rows])
        finished[rows] |= ended
        stopped |= lengths <= at + 1
        if (staying := cached.remaining(stopped[rows])) is not None:
            if len(staying) == 0:
                break
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


class Sampler(ABC):
    """Samples from a copy of the weights in training."""

    differs = True
    """True if its probabilities differ from the trainer's: another engine, other rounding, or older
    weights."""
    makes_batches = False
    """True if it takes any number of prompts at once."""
    sent: Event | None = None
    """Set when a request was taken, by a sampler that works while this process goes on; None for any other.
    Clear it before waiting for it."""

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on, named as in transformers."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt; ``poll`` is called before and, if possible, meanwhile."""


class CopySampler(Sampler):
    """Sample from a bfloat16 copy of a float32 model, because casting all weights costs more than a token."""

    def __init__(self, model: Any, temperature: float, ends: set[int], device: torch.device) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        # Buffers stay in float32: positions need the full precision of the rotary frequencies.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.model.to(device)  # only now, because a GPU need not hold the copy in float32 too
        self.temperature, self.ends = temperature, ends

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on, named as in the model."""
        own = self.model.state_dict()
        for name, value in weights:  # one at a time: with adapters, each is merged when it is asked for
            own[name].copy_(value)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt; see ``generate``."""
        return generate(self.model, prompts, seeds, max_tokens, self.temperature, self.ends, poll)
