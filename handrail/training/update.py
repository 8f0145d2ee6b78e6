"""One optimizer update: credited groups → live samples → micro-batches → gradient → step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from handrail.methods.base import Method
from handrail.methods.batch import MicroBatch, Sample, micro_batch, pack
from handrail.methods.losses import token_loss
from handrail.methods.normalizers import Normalizers
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import TrainConfig
from handrail.types.trajectory import Author, Group, Trajectory

APART_EVERY = 10
"""Log gradient norms per writer every N steps: prompts are then read again, and a second gradient is kept."""


@dataclass(frozen=True)
class Outcome:
    """What an update did: loss and gradient norms over all processes (none if nothing had a gradient), and this process's tokens."""

    figures: dict[str, float]
    tokens_trained: int
    tokens_off_policy: int  # of those trained, the ones that the policy did not sample
    tokens_dropped: int

    @property
    def skipped(self) -> bool:
        """True if a loss or gradient was not finite, so that nothing was updated."""
        return "update/skipped" in self.figures


class Update:
    """Callable with the groups of one update."""

    def __init__(
        self,
        method: Method[Any],
        policy: TrainablePolicy,
        accelerator: Accelerator,
        optimizer: Any,
        config: TrainConfig,
    ) -> None:
        self.method, self.policy, self.accelerator, self.optimizer, self.config = (
            method,
            policy,
            accelerator,
            optimizer,
            config,
        )
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def __call__(self, groups: Sequence[Group], apart: bool = False) -> Outcome:
        """``apart``: samples go through the model by who wrote them, for the gradient norm of each kind."""
        samples = self.samples(groups)
        live = [sample for sample in samples if sample.is_live]
        figures: dict[str, float] = {}
        together = by_writers(live) if apart else {"all": live}
        shared, budget = self.policy.shares_prompts, self.config.micro_batch_tokens
        parts = {writer: list(pack(part, budget, shared)) for writer, part in together.items()}
        passes = {writer: int(max(self.gathered(len(batches)))) for writer, batches in parts.items()}
        active = [writer for writer in parts if passes[writer]]
        before: list[torch.Tensor] = []
        for writer in active:
            loss = self.backward(parts[writer], passes[writer])
            figures["loss"] = figures.get("loss", 0.0) + loss
            if apart:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                figures[f"grad_norm/{writer}"] = distance(gradients, before)
                # Kept on the CPU: for a metric alone, a GPU should not have to hold a second gradient.
                before = (
                    [gradient.to("cpu", copy=True) for gradient in gradients] if writer != active[-1] else []
                )
        if active:
            figures["grad_norm/all"] = float(
                self.accelerator.clip_grad_norm_(self.parameters, self.config.grad_clip)
            )
            if math.isfinite(figures["grad_norm/all"]) and math.isfinite(figures["loss"]):
                self.optimizer.step()
                self.policy.changed()
            else:  # one bad batch must not end in a model of NaN
                figures = {"update/skipped": 1.0}
            self.optimizer.zero_grad()
        trained = sum(sample.trajectory.trained_tokens for sample in live)
        sampled = sum(int((sample.trajectory.author == Author.POLICY).sum()) for sample in live)
        return Outcome(
            figures,
            trained,
            trained - sampled,
            sum(each.trajectory.trained_tokens for each in samples) - trained,
        )

    def samples(self, groups: Sequence[Group]) -> list[Sample]:
        """Every trajectory with its normalizers, which count those that will be dropped."""
        normalizers = Normalizers.of(groups, self.total)
        return [
            self.sample(member, normalizers)
            for group in groups
            for member in group.trajectories
            if member.trained_tokens
        ]

    def sample(self, member: Trajectory, normalizers: Normalizers) -> Sample:
        bonus, kl = (self.method.entropy_bonus, self.method.kl) if member.in_baseline else (0.0, 0.0)
        advantage = imitation = 0.0
        if member.column("advantage").any() or bonus or kl:
            advantage = self.method.advantage_scale(member, normalizers)
        if member.column("imitation_weight").any():
            imitation = self.method.imitation_scale(member, normalizers)
        return Sample(
            member, advantage, imitation, 1 / normalizers.problems, bonus * advantage, kl * advantage
        )

    def backward(self, batches: list[MicroBatch], passes: int) -> float:
        """Add the batches' gradient, over all processes, in as many passes on each; the last one sums the gradients."""
        batches = batches + [micro_batch([nothing(self.policy)])] * (passes - len(batches))
        total = 0.0
        for index, batch in enumerate(batches):
            synchronize = (
                nullcontext() if index == passes - 1 else self.accelerator.no_sync(self.policy.model)
            )
            with synchronize:
                loss = self.loss(batch.to(self.accelerator.device))
                self.accelerator.backward(
                    loss * self.accelerator.num_processes
                )  # which averages over processes
            total += loss.item()
        return sum(self.gathered(total))

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        logp, entropy = self.policy.forward(batch.inputs, with_entropy=self.method.entropy_bonus != 0)
        reference = self.policy.reference_logprobs(batch.inputs) if self.method.kl else None
        return token_loss(
            self.method, logp, batch.tokens, entropy, reference, self.policy.importance_weight_cap
        )

    def total(self, local: list[int]) -> list[int]:
        """Sums over the processes, element by element."""
        if self.accelerator.num_processes == 1:
            return local
        tensor = torch.tensor(local, device=self.accelerator.device)
        return [int(value) for value in self.accelerator.reduce(tensor, "sum").tolist()]

    def gathered(self, value: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [value]
        return list(
            self.accelerator.gather(
                torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
            ).tolist()
        )


def taken_apart(step: int) -> bool:
    return (step - 1) % APART_EVERY == 0


def by_writers(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by who wrote their tokens, always the same keys in the same order."""
    parts: dict[str, list[Sample]] = {"policy": [], "guided": [], "repaired": []}
    for sample in samples:
        sampled = (sample.trajectory.author == Author.POLICY)[sample.trajectory.trained]
        parts["policy" if sampled.all() else "repaired" if sampled.any() else "guided"].append(sample)
    return parts


def nothing(policy: TrainablePolicy) -> Sample:
    """A sample without any credit, for a process that has run out of work."""
    end = policy.tokenizer.eos_token_id
    return Sample(Trajectory.by(Author.REFERENCE, [end], [end]))


def distance(gradients: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """The norm of ``gradients``, less those of ``before`` if there are any, one tensor at a time."""
    earlier = before or [torch.zeros(())] * len(gradients)
    return math.sqrt(
        sum(
            float((now - then.to(now.device)).norm()) ** 2
            for now, then in zip(gradients, earlier, strict=True)
        )
    )
