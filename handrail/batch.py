"""Groups → live rows → micro-batches of token streams, with normalisers exact over the whole update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handrail.objective import Streams
from handrail.trajectory import Group, Trajectory


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
    """A trajectory with the scales of its credit, weight and entropy bonus."""

    trajectory: Trajectory
    credit_scale: float = 0.0
    weight_scale: float = 0.0
    bonus: float = 0.0

    @property
    def is_live(self) -> bool:
        """Whether any of its tokens has a gradient."""
        return self.trajectory.has_signal or self.bonus != 0

    @property
    def length(self) -> int:
        return len(self.trajectory.prompt) + len(self.trajectory)


@dataclass(frozen=True)
class MicroBatch:
    """``input_ids`` and ``attention_mask`` are [B, P+T]: prompts end, and completions begin, at column P."""

    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor  # [B, T], zero where padded
    streams: Streams

    def to(self, device: torch.device) -> MicroBatch:
        streams = Streams(**{name: value.to(device) for name, value in vars(self.streams).items()})
        return MicroBatch(self.input_ids.to(device), self.attention_mask.to(device), self.completion.to(device), streams)


def pad(rows: Sequence[Sequence[float]], width: int, left: bool = False, fill: float = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), width], each row at the right (``left`` padding) or at the left."""
    out = torch.full((len(rows), width), fill, dtype=dtype)
    for line, row in zip(out, rows, strict=True):
        if row:
            line[slice(-len(row), None) if left else slice(len(row))] = torch.tensor(row, dtype=dtype)
    return out


def collate(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids [B, P+T], attention_mask [B, P+T], completion [B, T]) with prompts padded left, completions right."""
    before, after = max(map(len, prompts)), max(map(len, completions))
    completion = pad(completions, after, dtype=torch.long)
    input_ids = torch.cat([pad(prompts, before, left=True, dtype=torch.long), completion], 1)
    ones = pad([[1] * len(p) for p in prompts], before, left=True, dtype=torch.long)
    return input_ids, torch.cat([ones, pad([[1] * len(c) for c in completions], after, dtype=torch.long)], 1), completion


def by_budget(lengths: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Indices in groups of like (prompt, completion) lengths, each at most ``budget`` tokens with its padding, one row at least."""
    parts: list[list[int]] = []
    widest = (0, 0)
    for index in sorted(range(len(lengths)), key=lambda i: (sum(lengths[i]), lengths[i]), reverse=True):
        wider = (max(widest[0], lengths[index][0]), max(widest[1], lengths[index][1]))
        if parts and sum(wider) * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(index)
            widest = wider
        else:
            parts.append([index])
            widest = lengths[index]
    return parts


def pack(rows: Sequence[Row], budget: int) -> Iterator[MicroBatch]:
    """Micro-batches of at most ``budget`` padded tokens."""
    lengths = [(len(row.trajectory.prompt), len(row.trajectory)) for row in rows]
    for part in by_budget(lengths, budget):
        yield micro_batch([rows[index] for index in part])


def micro_batch(rows: Sequence[Row]) -> MicroBatch:
    trajectories = [row.trajectory for row in rows]
    input_ids, attention_mask, completion = collate([t.prompt for t in trajectories], [t.completion for t in trajectories])
    width = completion.shape[1]
    nan = float("nan")

    def scaled(values: Iterable[list[float]], scales: Iterable[float]) -> Tensor:
        return pad([[value * scale for value in row] for row, scale in zip(values, scales, strict=True)], width)

    streams = Streams(
        mask=pad([[1.0] * len(t) for t in trajectories], width),
        credit=scaled((t.credit for t in trajectories), (row.credit_scale for row in rows)),
        weight=scaled((t.weight for t in trajectories), (row.weight_scale for row in rows)),
        bonus=pad([[row.bonus] * len(row.trajectory) for row in rows], width),
        behaviour=pad([[nan if b is None else b for b in t.behaviour] for t in trajectories], width),
        origin=pad([list(map(int, t.origin)) for t in trajectories], width, dtype=torch.long),
    )
    return MicroBatch(input_ids, attention_mask, completion, streams)
