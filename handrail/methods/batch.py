"""Trajectories with credit as padded columns: the input of every engine's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from handrail.models.batching import Inputs, Layout, by_budget
from handrail.types.trajectory import Trajectory, default


@dataclass(frozen=True)
class Sample:
    """A trajectory with the scales of its columns and the coefficients of its entropy and KL terms."""

    trajectory: Trajectory
    advantage_scale: float = 0.0
    imitation_scale: float = 0.0
    linear_scale: float = 0.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0

    @property
    def is_live(self) -> bool:
        """True if any of the trajectory's tokens contributes to the gradient."""
        return self.trajectory.has_signal or self.entropy_coef != 0 or self.kl_coef != 0


@dataclass(frozen=True)
class TokenBatch:
    """Columns of B trajectories, right-padded with zeros to [B, T].

    ``mask`` is 1 on trained tokens, 0 on environment tokens and padding. Advantages and imitation weights are
    already divided by their normalizers, so the loss of an update is minus the plain sum over its tokens.
    """

    mask: Tensor
    author: Tensor  # int64, see Author
    columns: dict[str, Tensor]
    entropy_coef: Tensor  # divided by its normalizer
    kl_coef: Tensor  # divided by its normalizer

    def __getitem__(self, name: str) -> Tensor:
        """A column by name; its default if none of these trajectories has it, see ``Trajectory.column``."""
        found = self.columns.get(name)
        return torch.full_like(self.mask, default(name)) if found is None else found

    @property
    def advantage(self) -> Tensor:
        return self.columns["advantage"]

    @property
    def imitation_weight(self) -> Tensor:
        return self.columns["imitation_weight"]

    @property
    def sampling_logp(self) -> Tensor:
        """NaN if unknown."""
        return self.columns["sampling_logp"]

    @property
    def old_logp(self) -> Tensor:
        """NaN if unknown."""
        return self.columns["old_logp"]

    def to(self, device: torch.device) -> TokenBatch:
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return TokenBatch(
            self.mask.to(device),
            self.author.to(device),
            columns,
            self.entropy_coef.to(device),
            self.kl_coef.to(device),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Trajectories of one forward and backward pass; ``inputs`` stay on the CPU, see
    ``TransformersPolicy.forward``."""

    inputs: Inputs
    tokens: TokenBatch

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.inputs, self.tokens.to(device))


ALWAYS = ("advantage", "imitation_weight", "sampling_logp", "old_logp")
NOT_TRAINED = {"entropy", "step_score"}
"""Columns that no loss reads."""


def token_batch(samples: Sequence[Sample]) -> TokenBatch:
    """Scale and pad the columns of ``samples``."""
    trajectories = [sample.trajectory for sample in samples]
    scales = {
        "advantage": [sample.advantage_scale for sample in samples],
        "imitation_weight": [sample.imitation_scale for sample in samples],
        "linear_weight": [sample.linear_scale for sample in samples],
    }
    mask = pad([trajectory.trained.float() for trajectory in trajectories])
    columns = {}
    for name in {*ALWAYS, *(name for each in trajectories for name in each.columns)} - NOT_TRAINED:
        column = pad([trajectory.column(name) for trajectory in trajectories])
        columns[name] = column * torch.tensor(scales[name])[:, None] if name in scales else column
    return TokenBatch(
        mask,
        pad([trajectory.author for trajectory in trajectories]),
        columns,
        mask * torch.tensor([sample.entropy_coef for sample in samples])[:, None],
        mask * torch.tensor([sample.kl_coef for sample in samples])[:, None],
    )


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Right-pad rows with zeros to [len(rows), longest]."""
    return pad_sequence(list(rows), batch_first=True)


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    trajectories = [sample.trajectory for sample in samples]
    inputs = Inputs.of(
        [each.prompt_ids for each in trajectories],
        [each.token_ids for each in trajectories],
        [each.predicted for each in trajectories],
    )
    return MicroBatch(inputs, token_batch(samples))


def pack(samples: Sequence[Sample], budget: int, layout: Layout = "packed") -> Iterator[MicroBatch]:
    """Yield micro-batches of at most ``budget`` tokens, counted as in ``by_budget``."""
    prompts = [sample.trajectory.prompt_ids for sample in samples]
    for part in by_budget(prompts, [len(sample.trajectory) for sample in samples], budget, layout):
        yield micro_batch([samples[index] for index in part])
