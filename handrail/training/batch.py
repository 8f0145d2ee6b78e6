"""Groups → live rows → micro-batches of token streams, with normalisers exact over the whole update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handrail.methods.losses import Streams
from handrail.types import Group, Trajectory


@dataclass(frozen=True)
class Counts:
    """What normalisers divide by: totals of one optimiser update, over all its micro-batches and all processes.

    Rows dropped later for having no credit are counted: dropping must not change the gradient.
    """

    problems: int
    trajectories: int
    tokens: int
    demonstrated: int  # problems with a demonstration
    demonstrations: int
    demonstration_tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group], total: Callable[[list[int]], list[int]] = lambda local: local) -> Counts:
        """``total`` sums a list of integers over the processes."""
        local = [
            len(groups),
            sum(len(group.trajectories) for group in groups),
            sum(len(member) for group in groups for member in group.trajectories),
            sum(bool(group.demonstrations) for group in groups),
            sum(len(group.demonstrations) for group in groups),
            sum(len(member) for group in groups for member in group.demonstrations),
        ]
        return cls(*total(local))


@dataclass(frozen=True)
class Row:
    """A trajectory with the scales of its credit, weight, entropy bonus and divergence."""

    trajectory: Trajectory
    credit_scale: float = 0.0
    weight_scale: float = 0.0
    bonus: float = 0.0
    kl: float = 0.0

    @property
    def is_live(self) -> bool:
        """Whether any of its tokens has a gradient."""
        return self.trajectory.has_signal or self.bonus != 0 or self.kl != 0


@dataclass(frozen=True)
class Inputs:
    """What a model reads: completions [B, T] padded right, and their U distinct prompts [U, P] padded left."""

    prompt: Tensor
    prompt_mask: Tensor
    prompt_of: Tensor  # [B], which of the prompts each completion follows
    completion: Tensor
    completion_mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Inputs:
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        before, after = max(map(len, prompts)), max(map(len, completions))
        return cls(
            pad([*distinct], before, left=True, dtype=torch.long),
            pad([[1] * len(prompt) for prompt in distinct], before, left=True, dtype=torch.long),
            torch.tensor([distinct[tuple(prompt)] for prompt in prompts]),
            pad(completions, after, dtype=torch.long),
            pad([[1] * len(completion) for completion in completions], after, dtype=torch.long),
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


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together; the streams are [B, T] like the completions."""

    inputs: Inputs
    streams: Streams

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.inputs.to(device), Streams(**{name: value.to(device) for name, value in vars(self.streams).items()}))


def pad(rows: Sequence[Sequence[float]], width: int, left: bool = False, fill: float = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), width], each row at the right (``left`` padding) or at the left."""
    out = torch.full((len(rows), width), fill, dtype=dtype)
    for line, row in zip(out, rows, strict=True):
        if row:
            line[slice(-len(row), None) if left else slice(len(row))] = torch.tensor(row, dtype=dtype)
    return out


def by_budget(prompts: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, shared: bool = True) -> list[list[int]]:
    """Indices of rows in groups of at most ``budget`` tokens with their padding, one row at least.

    ``prompts`` and the ``lengths`` of completions are those of each row. Rows of one prompt stay together, since a prompt is read once
    for all of them where prompts can be ``shared``; beside them stand rows of like lengths.
    """
    number: dict[tuple[int, ...], int] = {}
    group = [number.setdefault(tuple(prompt), len(number)) if shared else place for place, prompt in enumerate(prompts)]
    longest: dict[int, int] = {}
    for key, prompt, length in zip(group, prompts, lengths, strict=True):
        longest[key] = max(longest.get(key, 0), len(prompt) + length)
    parts: list[list[int]] = []
    read: set[int] = set()
    before = after = 0
    for index in sorted(range(len(group)), key=lambda i: (longest[group[i]], group[i], lengths[i]), reverse=True):
        read, before, after = read | {group[index]}, max(before, len(prompts[index])), max(after, lengths[index])
        if parts and len(read) * before + (len(parts[-1]) + 1) * after <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
            read, before, after = {group[index]}, len(prompts[index]), lengths[index]
    return parts


def pack(rows: Sequence[Row], budget: int, shared: bool = True) -> Iterator[MicroBatch]:
    """Micro-batches of at most ``budget`` padded tokens."""
    for part in by_budget([row.trajectory.prompt for row in rows], [len(row.trajectory) for row in rows], budget, shared):
        yield micro_batch([rows[index] for index in part])


def micro_batch(rows: Sequence[Row]) -> MicroBatch:
    trajectories = [row.trajectory for row in rows]
    inputs = Inputs.of([t.prompt for t in trajectories], [t.completion for t in trajectories])
    width = inputs.completion.shape[1]
    nan = float("nan")

    def scaled(values: Iterable[list[float]], scales: Iterable[float]) -> Tensor:
        return pad([[value * scale for value in row] for row, scale in zip(values, scales, strict=True)], width)

    streams = Streams(
        mask=pad([[1.0] * len(t) for t in trajectories], width),
        credit=scaled((t.credit for t in trajectories), (row.credit_scale for row in rows)),
        weight=scaled((t.weight for t in trajectories), (row.weight_scale for row in rows)),
        bonus=pad([[row.bonus] * len(row.trajectory) for row in rows], width),
        kl=pad([[row.kl] * len(row.trajectory) for row in rows], width),
        behaviour=pad([[nan if b is None else b for b in t.behaviour] for t in trajectories], width),
        old=pad([[nan if b is None else b for b in t.anchor] for t in trajectories], width),
        origin=pad([list(map(int, t.origin)) for t in trajectories], width, dtype=torch.long),
    )
    return MicroBatch(inputs, streams)
