"""Rows of tokens as padded tensors, and rows in groups of at most so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Inputs:
    """What a model reads: completions [B, T] padded right, and their U distinct prompts [U, P] padded left."""

    prompt: Tensor
    prompt_mask: Tensor
    prompt_of: Tensor  # [B], which of the prompts each completion follows
    completion: Tensor
    completion_mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int] | Tensor]) -> Inputs:
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        prompt, prompt_mask = padded([*distinct], side="left")
        completion, completion_mask = padded(completions)
        return cls(
            prompt,
            prompt_mask,
            torch.tensor([distinct[tuple(prompt)] for prompt in prompts]),
            completion,
            completion_mask,
        )

    @property
    def share_prompts(self) -> bool:
        return len(self.prompt) < len(self.prompt_of)

    @property
    def whole_mask(self) -> Tensor:
        """[B, P + T], prompt and completion."""
        return torch.cat([self.prompt_mask[self.prompt_of], self.completion_mask], 1)

    @property
    def whole(self) -> Tensor:
        """[B, P + T], prompt and completion."""
        return torch.cat([self.prompt[self.prompt_of], self.completion], 1)

    def to(self, device: torch.device) -> Inputs:
        return Inputs(**{name: value.to(device) for name, value in vars(self).items()})


def padded(rows: Sequence[Sequence[int] | Tensor], side: str = "right") -> tuple[Tensor, Tensor]:
    """(tokens, mask), int64 [len(rows), longest] each, padded with 0 on one ``side``."""
    tokens = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in tokens]
    return (
        pad_sequence(tokens, batch_first=True, padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )


def by_budget(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, shared: bool = True
) -> list[list[int]]:
    """Indices of rows in groups of at most ``budget`` tokens with their padding, one row at least.

    ``prompts`` and the ``lengths`` of completions are those of each row. Rows of one prompt stay together, since a prompt is read once
    for all of them where prompts can be ``shared``; beside them stand rows of like lengths.
    """
    number: dict[tuple[int, ...], int] = {}
    group = [
        number.setdefault(tuple(prompt), len(number)) if shared else place
        for place, prompt in enumerate(prompts)
    ]
    longest: dict[int, int] = {}
    for key, prompt, length in zip(group, prompts, lengths, strict=True):
        longest[key] = max(longest.get(key, 0), len(prompt) + length)
    parts: list[list[int]] = []
    read: set[int] = set()
    before = after = 0
    for index in sorted(
        range(len(group)), key=lambda i: (longest[group[i]], group[i], lengths[i]), reverse=True
    ):
        read, before, after = (
            read | {group[index]},
            max(before, len(prompts[index])),
            max(after, lengths[index]),
        )
        if parts and len(read) * before + (len(parts[-1]) + 1) * after <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
            read, before, after = {group[index]}, len(prompts[index]), lengths[index]
    return parts
