"""Shapes of models, and lengths of completions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Model:
    """A decoder of transformers: what decides its costs. Biases and norms are left out."""

    name: str
    layers: int
    hidden: int
    attention: int
    """Heads × head_dim of the queries."""
    kv: int
    """Heads × head_dim of the keys, and of the values."""
    intermediate: int
    vocabulary: int
    tied: bool = False
    """True if input and output embeddings are the same weights."""

    @property
    def layer_weights(self) -> int:
        """Number of weights of all layers."""
        per_layer = self.hidden * (2 * self.attention + 2 * self.kv + 3 * self.intermediate)
        return self.layers * per_layer

    @property
    def multiplied(self) -> int:
        """Number of weights that every token is multiplied by."""
        return self.layer_weights + self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.multiplied + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return 2 * 2 * self.layers * self.kv


MEASURED = Model("0.6B", 28, 1024, 2048, 1024, 3072, 151_936, tied=True)
"""Qwen3-0.6B's shape, which docs/gpu measures."""
MODELS = (
    Model("1.5B", 28, 1536, 1536, 256, 8960, 151_936, tied=True),
    Model("7B", 28, 3584, 3584, 512, 18_944, 152_064),
    Model("32B", 64, 5120, 5120, 1024, 27_648, 152_064),
    Model("70B", 80, 8192, 8192, 1024, 28_672, 128_256),
)
"""Shapes of Qwen2.5 (1.5B, 7B, 32B) and Llama 3.1 (70B)."""
ONE_GPU = (
    Model("0.5B", 24, 896, 896, 128, 4864, 151_936, tied=True),
    MODELS[0],
    Model("3B", 36, 2048, 2048, 256, 11_008, 151_936, tied=True),
    MODELS[1],
)
"""Shapes of Qwen2.5 that one GPU may train."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of completions: lognormal, cut off at ``longest`` tokens; all ``median`` if ``sigma`` is 0."""

    median: int = 800
    sigma: float = 0.8
    longest: int = 4096

    @cached_property
    def survival(self) -> Array:
        """Probability that a completion is longer than t tokens, for t = 0 … longest − 1."""
        times = np.arange(self.longest)
        if self.sigma == 0:
            return (times < self.median).astype(float)
        scaled = [math.log(t / self.median) / self.sigma / math.sqrt(2) for t in times[1:]]
        return np.array([1.0, *(math.erfc(x) / 2 for x in scaled)])

    @cached_property
    def mean(self) -> float:
        return float(self.survival.sum())

    @cached_property
    def attended(self) -> float:
        """Mean length of the completion that a token is in: longer ones have more tokens."""
        squares = float((self.survival * (2 * np.arange(self.longest) + 1)).sum())
        return squares / self.mean

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return math.sqrt(max(0.0, self.mean * (self.attended - self.mean)))

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Lengths in tokens, [``shape``]."""
        drawn = np.ceil(self.median * np.exp(self.sigma * random.standard_normal(shape)))
        return np.asarray(np.minimum(drawn, self.longest), dtype=np.float64)
