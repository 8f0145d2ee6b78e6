"""Sampling with CUDA graphs: a token takes a thousand kernels, which take longer to launch than to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from handrail._util.memory import out_of_memory
from handrail.models import attention
from handrail.models.cached import CachedModel

log = logging.getLogger("handrail")

REFUSED: WeakSet[nn.Module] = WeakSet()
"""Models that CUDA could not capture."""


def can_repeat(model: Any) -> bool:
    """True if a step of ``model`` can be a CUDA graph: it is on a GPU and every layer sees all tokens."""
    if model.device.type != "cuda" or model in REFUSED:
        return False
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    ours = model.config._attn_implementation == attention.NAME
    return ours and all(type(layer) is DynamicLayer for layer in layers)


class FixedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """KV cache whose size changes only in ``grow``; a new token is written to ``slot`` [1]."""

    keys: Tensor
    values: Tensor
    slot: Tensor | None = None

    def grow(self, room: int, slot: Tensor) -> None:
        # Zeros, because attention multiplies even what is masked by 0.
        self.keys, self.values = (pad(states, (0, 0, 0, room)) for states in (self.keys, self.values))
        self.slot = slot

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.slot is None:  # the prompts
            whole: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return whole
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            store.index_copy_(2, self.slot, states)
        return self.keys, self.values


class GraphedModel(CachedModel):
    """A cached model whose step is repeated as a CUDA graph until its shapes change.

    Shapes change seldom, because some attention kernels are rebuilt for each: the cache grows by ``ROOM``
    tokens, and rows leave when half of them have ended.
    """

    ROOM = 128
    layer = FixedCacheLayer
    left = 0  # free places in the cache
    step: Callable[[], Tensor] | None = None

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.step, self.tokens = None, rows.new_empty(len(rows), 1)

    def remaining(self, stopped: Tensor) -> Tensor | None:
        """Return half of the rows as soon as half have ended, so that few numbers of rows occur."""
        half = len(stopped) // 2
        staying = int((~stopped).sum())
        if staying > half:
            return None
        return stopped.sort(stable=True).indices[: half if staying else 0]

    def follow(self, tokens: Tensor) -> None:
        if self.left == 0:
            self._grow()
        self.left -= 1
        self.tokens.copy_(tokens.unsqueeze(1))
        if self.step is None:  # PyTorch sets up some kernels when they first run, and cannot in a graph
            self.logits = self._step()
            self.step = self._repeated()
        else:
            self.logits = self.step()

    def _grow(self) -> None:
        width = self.mask.shape[1]
        self.left = self.ROOM - width % self.ROOM
        self.mask = pad(self.mask, (0, self.left))
        self.slot = torch.tensor([width], device=self.mask.device)
        for layer in self.cache.layers:
            layer.grow(self.left, self.slot)
        self.step = None

    def _step(self) -> Tensor:
        self.positions.add_(1)
        self.mask.index_fill_(1, self.slot, 1)
        with attention.repeating():
            logits = self._read(self.tokens, self.mask[:, None, None].bool())
        self.slot.add_(1)
        return logits

    def _repeated(self) -> Callable[[], Tensor]:
        """Return ``_step`` as a CUDA graph, or itself if there is no GPU or the model cannot be captured."""
        if self.model.device.type != "cuda" or self.model in REFUSED:
            return self._step
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._step()
        except RuntimeError as error:
            if not out_of_memory(error):  # later, fewer or shorter rows may fit
                REFUSED.add(self.model)
            log.warning("sampling without CUDA graphs, which takes longer: %s", str(error).splitlines()[0])
            return self._step

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
