"""Sampling from a transformers model. Every distinct prompt is read once, and completions leave the batch when they end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from handrail.models.batching import Inputs

LEAVE_TOGETHER = 8
"""Ended completions leave once they are an eighth of the batch: to leave costs a copy of the others' cache."""


@dataclass(frozen=True)
class Drawn:
    """One completion: its tokens, the end token included, with the log-probability of each and the entropy it was drawn from."""

    tokens: list[int]
    logp: list[float]
    entropy: list[float]
    finished: bool


def positions(mask: Tensor) -> Tensor:
    """Each token's place in its row, whatever is padded before it: [B, L] as ``mask``."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Writes a token's keys and values into room kept for them; transformers' own layer copies all of them for every token."""

    ROOM = 64
    keys: Tensor
    values: Tensor
    stores: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        if before == 0:
            whole: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return whole
        new, after = (key_states, value_states), before + key_states.shape[-2]
        if self.stores is None or after > self.stores[0].shape[-2]:
            old = self.keys, self.values
            self.stores = [states.new_empty(*states.shape[:2], after + self.ROOM, states.shape[-1]) for states in new]
            for store, kept in zip(self.stores, old, strict=True):
                store[:, :, :before] = kept
        for store, states in zip(self.stores, new, strict=True):
            store[:, :, before:after] = states
        self.keys, self.values = (store[:, :, :after] for store in self.stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.stores = None


class Reader:
    """A model and its cache of what it has read, one row a sequence."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        """``logits`` [B, V] are those of the token behind each of the B prompts, of which equal ones are read together."""
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        inputs = Inputs.of(prompts, [()] * len(prompts)).to(model.device)
        self.mask = inputs.prompt_mask
        self.positions = positions(self.mask)
        self.logits = self._read(inputs.prompt)
        self.keep(inputs.prompt_of)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows, in their order; one may be taken several times."""
        self.cache.reorder_cache(rows)
        self.logits, self.mask, self.positions = self.logits[rows], self.mask[rows], self.positions[rows, -1:]

    def follow(self, tokens: Tensor) -> None:
        """Reads one more token of every row [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self._read(tokens.unsqueeze(1))

    def _read(self, ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return torch.as_tensor(out.logits)[:, -1]


class Share:
    """The random numbers of some rows of a batch that several processes share: those that one process would give these rows."""

    def __init__(self, batch: int, rows: range) -> None:
        """``rows`` are the places, among the ``batch`` rows, of those that this process draws."""
        self.batch, self.rows, self.taken = batch, rows, 0

    def uniform(self, device: torch.device) -> Tensor:
        """The next number, in [0, 1), of each of the rows."""
        self.taken += 1
        return torch.rand(self.batch, dtype=torch.float64, device=device)[self.rows.start :: self.rows.step]

    def catch_up(self, taken: int, device: torch.device) -> None:
        """Leaves the random state as it is after ``taken`` numbers a row."""
        while self.taken < taken:
            self.uniform(device)


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    temperature: float,
    ends: set[int],
    poll: Callable[[], None] = lambda: None,
    share: Share | None = None,
) -> list[Drawn]:
    """One completion of each prompt, at most ``max_tokens`` long; temperature 0 always takes the likeliest token.

    What is drawn depends on torch's random state and a prompt's place only, not on when others end. ``poll`` is called before every token.
    ``share``: the prompts are a share of a larger batch.
    """
    share = share or Share(len(prompts), range(len(prompts)))
    reader, device = Reader(model, prompts), model.device
    end_tokens = torch.tensor(sorted(ends), device=device)
    rows = torch.arange(len(prompts), device=device)  # the place of each that is still in the batch
    tokens, lengths = rows.new_zeros(len(prompts), max_tokens), rows.new_zeros(len(prompts))
    logp, entropy = torch.zeros(2, len(prompts), max_tokens, device=device)
    for at in range(max_tokens):
        poll()
        uniform = share.uniform(device)[rows]
        drawn, logp[rows, at], entropy[rows, at] = draw(reader.logits, uniform, temperature)
        tokens[rows, at] = drawn
        lengths[rows[torch.isin(drawn, end_tokens) & (lengths[rows] == 0)]] = at + 1
        staying = (lengths[rows] == 0).nonzero().squeeze(-1)
        if len(staying) == 0 or at + 1 == max_tokens:
            break
        if (len(rows) - len(staying)) * LEAVE_TOGETHER >= len(rows):
            rows, drawn = rows[staying], drawn[staying]
            reader.keep(staying)
        reader.follow(drawn)
    rows_of = zip(lengths.tolist(), tokens.tolist(), logp.tolist(), entropy.tolist(), strict=True)
    return [Drawn(drawn[: n or None], logs[: n or None], spread[: n or None], n > 0) for n, drawn, logs, spread in rows_of]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(token, its log-probability, the entropy) of each row of ``logits`` [B, V], by inversion of the distribution at ``uniform`` [B].

    One random number a row where the Gumbel trick takes V of them. Temperature 0 takes the likeliest, with log-probabilities at 1.
    """
    logits = logits.float() / (temperature or 1.0)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    summed = weights.cumsum(-1, dtype=torch.float64)  # in float32, a large vocabulary's rare tokens would round away
    total = summed[:, -1:]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        token = torch.searchsorted(summed, uniform.unsqueeze(-1) * total, right=True).clamp(max=logits.shape[-1] - 1)
    norm = total.log().float().squeeze(-1)
    entropy = norm - torch.linalg.vecdot(weights, logits.clamp(min=torch.finfo(torch.float32).min)) / total.float().squeeze(-1)
    return token.squeeze(-1), logits.gather(-1, token).squeeze(-1) - norm, entropy


class CopySampler:
    """Samples from a bfloat16 copy of a float32 model: to cast all weights anew for every token would cost more than the token."""

    def __init__(self, model: Any, temperature: float, ends: set[int], device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device).requires_grad_(False).eval()
        for parameter in self.model.parameters():  # not the buffers: positions need all digits of the rotary frequencies
            parameter.data = parameter.data.bfloat16()
        self.temperature, self.ends = temperature, ends

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Goes on with these weights, by their names."""
        self.model.load_state_dict(dict(weights), strict=False)  # tied ones come once

    def draw(self, prompts: Sequence[list[int]], max_tokens: int, poll: Callable[[], None], share: Share | None = None) -> list[Drawn]:
        """One completion of each prompt, see ``decode``."""
        return decode(self.model, prompts, max_tokens, self.temperature, self.ends, poll, share)
