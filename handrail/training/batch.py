"""Groups → live rows → micro-batches of token streams, with normalisers exact over the whole update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handrail.methods.losses import Streams
from handrail.models.batching import Inputs, by_budget, pad
from handrail.types import Trajectory


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
class MicroBatch:
    """Rows that go through the model together; the streams are [B, T] like the completions."""

    inputs: Inputs
    streams: Streams

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.inputs.to(device), Streams(**{name: value.to(device) for name, value in vars(self.streams).items()}))


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
