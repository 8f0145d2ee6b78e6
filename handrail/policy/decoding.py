"""Sampling from a transformers model. Every distinct prompt is read once, and completions leave the batch when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from handrail.batch import Inputs

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


class Reader:
    """A model and its cache of what it has read, one row a sequence."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        """``logits`` [B, V] are those of the token behind each of the B prompts, of which equal ones are read together."""
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
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


@torch.inference_mode()
def decode(model: Any, prompts: Sequence[list[int]], max_tokens: int, temperature: float, ends: set[int]) -> list[Drawn]:
    """One completion of each prompt, at most ``max_tokens`` long; temperature 0 always takes the likeliest token.

    What is drawn depends on torch's random state and a prompt's place only, not on when others end.
    """
    reader, device = Reader(model, prompts), model.device
    end_tokens = torch.tensor(sorted(ends), device=device)
    rows = torch.arange(len(prompts), device=device)  # the place of each that is still in the batch
    tokens, lengths = rows.new_zeros(len(prompts), max_tokens), rows.new_zeros(len(prompts))
    logp, entropy = torch.zeros(2, len(prompts), max_tokens, device=device)
    for at in range(max_tokens):
        uniform = torch.rand(len(prompts), dtype=torch.float64, device=device)[rows]
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
