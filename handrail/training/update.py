"""One optimiser update: credited groups → live rows → micro-batches → gradient → step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from handrail.methods import losses
from handrail.methods.base import Method
from handrail.methods.normalizers import Counts
from handrail.models.trainable import LearningPolicy
from handrail.training.batch import MicroBatch, Row, micro_batch, pack
from handrail.training.config import TrainConfig
from handrail.types import Group, Origin, Trajectory

APART_EVERY = 10
"""Every how many steps rows are taken apart by who wrote them: prompts are then read again, and a second gradient is kept."""


@dataclass(frozen=True)
class Outcome:
    """What an update did: loss and gradient norms over all processes (none if nothing had a gradient), and this process's tokens."""

    figures: dict[str, float]
    tokens_trained: int
    tokens_off_policy: int  # of those trained, the ones that the policy did not sample
    tokens_dropped: int

    @property
    def skipped(self) -> bool:
        """Whether a loss or gradient was not finite, so that nothing was updated."""
        return "update/skipped" in self.figures


class Update:
    """Callable with the groups of one update."""

    def __init__(self, method: Method, policy: LearningPolicy, accelerator: Accelerator, optimizer: Any, config: TrainConfig) -> None:
        self.method, self.policy, self.accelerator, self.optimizer, self.config = method, policy, accelerator, optimizer, config
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def __call__(self, groups: Sequence[Group], apart: bool = False) -> Outcome:
        """``apart``: rows go through the model by who wrote them, for the gradient norm of each kind."""
        rows = self.rows(groups)
        live = [row for row in rows if row.is_live]
        figures: dict[str, float] = {}
        together = by_origin(live) if apart else {"all": live}
        parts = {origin: list(pack(part, self.config.micro_batch_tokens, self.policy.shares_prompts)) for origin, part in together.items()}
        passes = {origin: int(max(self.gathered(len(batches)))) for origin, batches in parts.items()}
        active = [origin for origin in parts if passes[origin]]
        before: list[torch.Tensor] = []
        for origin in active:
            loss = self.backward(parts[origin], passes[origin])
            figures["loss"] = figures.get("loss", 0.0) + loss
            if apart:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                figures[f"grad_norm/{origin}"] = distance(gradients, before)
                # Kept on the CPU: for a metric alone, a GPU should not have to hold a second gradient.
                before = [gradient.to("cpu", copy=True) for gradient in gradients] if origin != active[-1] else []
        if active:
            figures["grad_norm/all"] = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.grad_clip))
            if math.isfinite(figures["grad_norm/all"]) and math.isfinite(figures["loss"]):
                self.optimizer.step()
                self.policy.changed()
            else:  # one bad batch must not end in a model of NaN
                figures = {"update/skipped": 1.0}
            self.optimizer.zero_grad()
        trained = sum(len(row.trajectory) for row in live)
        off_policy = sum(origin is not Origin.POLICY for row in live for origin in row.trajectory.origin)
        return Outcome(figures, trained, off_policy, sum(len(row.trajectory) for row in rows) - trained)

    def rows(self, groups: Sequence[Group]) -> list[Row]:
        """Every trajectory with its normalisers, which count the rows that will be dropped."""
        counts = Counts.of(groups, self.total)
        rows = []
        for group in groups:
            for place, member in enumerate(group.members):
                in_group = place < len(group.trajectories)
                bonus, kl = (self.method.entropy_bonus, self.method.kl) if in_group else (0.0, 0.0)
                credit_scale = self.method.credit_scale(member, counts) if any(member.credit) or bonus or kl else 0.0
                weight_scale = self.method.weight_scale(member, counts) if any(member.weight) else 0.0
                rows.append(Row(member, credit_scale, weight_scale, bonus * credit_scale, kl * credit_scale))
        return rows

    def backward(self, batches: list[MicroBatch], passes: int) -> float:
        """Adds the batches' gradient, over all processes, in as many passes on each; the last one sums the gradients."""
        batches = batches + [micro_batch([nothing(self.policy)])] * (passes - len(batches))
        total = 0.0
        for index, batch in enumerate(batches):
            synchronise = nullcontext() if index == passes - 1 else self.accelerator.no_sync(self.policy.model)
            with synchronise:
                loss = self.loss(batch.to(self.accelerator.device))
                self.accelerator.backward(loss * self.accelerator.num_processes)  # which averages over processes
            total += loss.item()
        return sum(self.gathered(total))

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        logp, entropy = self.policy.forward(batch.inputs, with_entropy=self.method.entropy_bonus != 0)
        streams = batch.streams
        if self.policy.correction:
            weight = losses.correction(logp.detach(), streams, self.policy.correction)
            streams = replace(streams, credit=streams.credit * weight)
        per_token = self.method.surrogate(logp, streams)
        if entropy is not None:
            per_token = per_token + streams.bonus * entropy
        if self.method.kl:
            per_token = per_token - losses.divergence(logp, self.policy.frozen(batch.inputs), streams)
        return -torch.where(streams.mask > 0, per_token, 0.0).sum()

    def total(self, local: list[int]) -> list[int]:
        """Sums over the processes, element by element."""
        if self.accelerator.num_processes == 1:
            return local
        tensor = torch.tensor(local, device=self.accelerator.device)
        return [int(value) for value in self.accelerator.reduce(tensor, "sum").tolist()]

    def gathered(self, value: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [value]
        return list(self.accelerator.gather(torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)).tolist())


def taken_apart(step: int) -> bool:
    return (step - 1) % APART_EVERY == 0


def by_origin(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by who wrote their tokens, always the same keys in the same order."""
    parts: dict[str, list[Row]] = {"policy": [], "guided": [], "repaired": []}
    for row in rows:
        sampled = [origin is Origin.POLICY for origin in row.trajectory.origin]
        parts["policy" if all(sampled) else "repaired" if any(sampled) else "guided"].append(row)
    return parts


def nothing(policy: LearningPolicy) -> Row:
    """A row without any credit, for a process that has run out of work."""
    end = policy.tokenizer.eos_token_id
    return Row(Trajectory.reference([end], [end], ""))


def distance(gradients: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """The norm of ``gradients``, less those of ``before`` if there are any, one tensor at a time."""
    earlier = before or [torch.zeros(())] * len(gradients)
    return math.sqrt(sum(float((now - then.to(now.device)).norm()) ** 2 for now, then in zip(gradients, earlier, strict=True)))
