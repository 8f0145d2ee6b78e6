"""Padding rows of tokens to tensors, and splitting rows into batches by a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Inputs:
    """Model inputs: right-padded completions [B, T] and their U distinct left-padded prompts [U, P].

    ``targets`` [B, T] are the tokens to predict at each position of the completions.
    """

    prompt: Tensor
    prompt_mask: Tensor
    prompt_of: Tensor  # [B], index of the prompt of each completion
    completion: Tensor
    completion_mask: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int] | Tensor],
        targets: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> Inputs:
        """``targets``: by default, the completions themselves."""
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        prompt, prompt_mask = pad([*distinct], side="left")
        completion, completion_mask = pad(completions)
        return cls(
            prompt,
            prompt_mask,
            torch.tensor([distinct[tuple(prompt)] for prompt in prompts]),
            completion,
            completion_mask,
            completion if targets is None else pad(targets)[0],
        )

    @property
    def share_prompts(self) -> bool:
        return len(self.prompt) < len(self.prompt_of)

    @property
    def whole_mask(self) -> Tensor:
        """Mask of prompt and completion, [B, P + T]."""
        return torch.cat([self.prompt_mask[self.prompt_of], self.completion_mask], 1)

    @property
    def whole(self) -> Tensor:
        """Tokens of prompt and completion, [B, P + T]."""
        return torch.cat([self.prompt[self.prompt_of], self.completion], 1)

    def to(self, device: torch.device) -> Inputs:
        return Inputs(**{name: value.to(device) for name, value in vars(self).items()})


def pad(rows: Sequence[Sequence[int] | Tensor], side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows with 0 on one ``side``; return (tokens, mask), int64 [len(rows), longest] each."""
    tokens = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in tokens]
    return (
        pad_sequence(tokens, batch_first=True, padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )


Layout = Literal["packed", "shared", "padded"]
"""How a model reads rows: without padding, with every prompt once; padded, with every prompt once; or padded
in full."""


GATHERED = 4
"""Places in the rows that attention gathers, padded to the longest, that count as one token of packed rows.
Such a place keeps queries, keys, values and an output: in the shapes of Qwen2.5-0.5B and Qwen3-0.6B, 0.07 and
0.18 of what a token keeps. So rows of any lengths take at most half as much memory again as equal ones."""


def by_budget(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, layout: Layout = "packed"
) -> list[list[int]]:
    """Split rows into batches of at most ``budget`` tokens, padding included, or of a single row; return
    indices. Packed rows have no padding, but attention pads them and repeats prompts, see ``GATHERED``.

    ``prompts`` and ``lengths``: the prompt and the completion length of each row. Rows of a prompt that is
    read once stay together. Batches consist of rows of similar length.
    """
    number: dict[tuple[int, ...], int] = {}
    group = [
        place if layout == "padded" else number.setdefault(tuple(prompt), len(number))
        for place, prompt in enumerate(prompts)
    ]
    longest: dict[int, int] = {}
    for key, prompt, length in zip(group, prompts, lengths, strict=True):
        longest[key] = max(longest.get(key, 0), len(prompt) + length)
    parts: list[list[int]] = []
    size = Size(layout)
    for index in sorted(
        range(len(group)), key=lambda i: (longest[group[i]], group[i], lengths[i]), reverse=True
    ):
        row = (group[index], len(prompts[index]), lengths[index])
        if not parts or size.add(*row) > budget:
            parts.append([])
            size = Size(layout)
            size.add(*row)
        parts[-1].append(index)
    return parts


class Size:
    """Number of tokens of a batch, padding included, while rows are added, or what takes as much memory."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.rows, self.tokens, self.prompt, self.completion = layout, 0, 0, 0, 0
        self.longest = 0
        self.read: set[int] = set()

    def add(self, group: int, prompt: int, completion: int) -> int:
        """Add a row, given the number of its prompt and both lengths; return the new size."""
        self.tokens += completion + (0 if group in self.read else prompt)
        self.read.add(group)
        self.rows += 1
        self.prompt, self.completion = max(self.prompt, prompt), max(self.completion, completion)
        self.longest = max(self.longest, prompt + completion)
        if self.layout == "packed":
            return max(self.tokens, self.rows * self.longest // GATHERED)
        return len(self.read) * self.prompt + self.rows * self.completion
