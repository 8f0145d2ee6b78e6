"""One optimizer update: groups with credit → live samples → micro-batches → gradient → step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from handrail.methods.base import Method
from handrail.methods.batch import MicroBatch, Sample, micro_batch, pack
from handrail.methods.losses import sampling_ratio, token_loss
from handrail.methods.scaling import scaled
from handrail.models.sharding import local
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import TrainConfig
from handrail.types.trajectory import Author, Group, Trajectory

AUTHORS_EVERY = 10
"""Log gradient norms per author every N steps. Such a step reads prompts again and keeps a second
gradient."""


@dataclass(frozen=True)
class Outcome:
    """Result of an update.

    ``figures``: loss and gradient norms over all processes; empty if nothing had a gradient. Token counts are
    this process's.
    """

    figures: dict[str, float]
    tokens_trained: int
    tokens_off_policy: int  # trained tokens that the policy did not sample
    tokens_dropped: int

    @property
    def skipped(self) -> bool:
        """True if nothing was updated because the loss or gradient was not finite."""
        return any(name.endswith("update/skipped") for name in self.figures)


class Update:
    """Callable that performs one update on the given groups."""

    def __init__(
        self,
        method: Method[Any],
        policy: TrainablePolicy,
        accelerator: Accelerator,
        optimizer: Any,
        config: TrainConfig,
    ) -> None:
        self.method, self.policy, self.accelerator = method, policy, accelerator
        self.optimizer, self.config = optimizer, config
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.ratios: list[torch.Tensor] = []
        """Importance weights of the present update's tokens, before their cap; NaN for those without one."""

    def __call__(self, groups: Sequence[Group], per_author: bool = False) -> Outcome:
        """``per_author``: True to measure gradient norms per author, which needs separate backward passes."""
        self.policy.join()
        samples = self.samples(groups)
        live = [sample for sample in samples if sample.is_live]
        figures: dict[str, float] = {}
        grouped = by_authors(live) if per_author else {"all": live}
        layout, budget = self.policy.layout, self.config.micro_batch_tokens
        parts = {author: list(pack(part, budget, layout)) for author, part in grouped.items()}
        passes = {author: int(max(self.gather(len(batches)))) for author, batches in parts.items()}
        if any(passes.values()):
            with self.policy.updating():
                figures = self.step({author: parts[author] for author in parts if passes[author]}, passes)
        trained = sum(sample.trajectory.trained_tokens for sample in live)
        sampled = sum(int((sample.trajectory.author == Author.POLICY).sum()) for sample in live)
        return Outcome(
            figures,
            trained,
            trained - sampled,
            sum(each.trajectory.trained_tokens for each in samples) - trained,
        )

    def step(self, parts: Mapping[str, list[MicroBatch]], passes: Mapping[str, int]) -> dict[str, float]:
        """Update the weights by the gradient of all parts; return the figures."""
        figures = {"loss": 0.0}
        before: list[torch.Tensor | None] = [None] * len(self.parameters)
        for author, batches in parts.items():
            figures["loss"] += self.backward(batches, passes[author])
            if author == "all":
                continue
            gradients = [None if p.grad is None else local(p.grad) for p in self.parameters]
            figures[f"grad_norm/{author}"] = self.whole_norm(distance(gradients, before))
            if author != [*parts][-1]:
                # On the CPU, because a metric should not cost the GPU the memory of a second gradient.
                before = [None if each is None else each.to("cpu", copy=True) for each in gradients]
        if self.policy.sampler_differs:
            figures |= self.importance()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.grad_clip)
        figures["grad_norm/all"] = float(norm)
        if math.isfinite(figures["grad_norm/all"]) and math.isfinite(figures["loss"]):
            self.policy.changed()
            self.optimizer.step()
        else:  # one bad batch must not turn the weights into NaN
            figures = {"update/skipped": 1.0}
        self.optimizer.zero_grad()
        return figures

    def whole_norm(self, norm: float) -> float:
        """Norm of a gradient, given the norm of this process's part of it."""
        return math.sqrt(sum(self.gather(norm**2))) if self.policy.shards else norm

    def samples(self, groups: Sequence[Group]) -> list[Sample]:
        """Scale every trajectory by its normalizers over all processes, see ``scaled``."""
        return scaled(self.method, groups, self.total)

    def backward(self, batches: list[MicroBatch], passes: int) -> float:
        """Add the batches' gradient and return their loss, over all processes.

        Every process makes the same number of passes; gradients are synchronized in the last one.
        """
        batches = batches + [micro_batch([empty_sample(self.policy)])] * (passes - len(batches))
        losses: list[torch.Tensor] = []  # read at the end, because reading one waits for the GPU
        for index, batch in enumerate(batches):
            synchronize = (
                nullcontext() if index == passes - 1 else self.accelerator.no_sync(self.policy.model)
            )
            with synchronize:
                loss = self.loss(batch.to(self.accelerator.device))
                # Synchronization averages over the processes; the loss is a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            losses.append(loss.detach())
        total = 0.0
        for value in torch.stack(losses).tolist():
            total += value
        return sum(self.gather(total))

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        logp, entropy = self.policy.forward(batch.inputs, with_entropy=self.method.entropy_bonus != 0)
        reference = self.policy.reference_logprobs(batch.inputs) if self.method.kl else None
        if self.policy.sampler_differs:
            ratios = sampling_ratio(logp.detach(), batch.tokens)
            self.ratios.append(ratios.masked_fill(batch.tokens.mask <= 0, math.nan).flatten())
        return token_loss(
            self.method, logp, batch.tokens, entropy, reference, self.policy.importance_weight_cap
        )

    def importance(self) -> dict[str, float]:
        """Figures of the importance weights of all processes; empty if no token has one."""
        ratios, self.ratios = torch.cat(self.ratios), []
        ratios = ratios[~ratios.isnan()].double()
        capped = (ratios >= self.policy.sampling.importance_weight_cap).sum()
        largest = max(self.gather(ratios.max().item() if len(ratios) else 0.0))
        n, total, above = (sum(self.gather(float(each))) for each in (len(ratios), ratios.sum(), capped))
        if not n:
            return {}
        return {"importance/mean": total / n, "importance/capped": above / n, "importance/max": largest}

    def total(self, local: list[int]) -> list[int]:
        """Sum over the processes, element by element."""
        if self.accelerator.num_processes == 1:
            return local
        tensor = torch.tensor(local, device=self.accelerator.device)
        return [int(value) for value in self.accelerator.reduce(tensor, "sum").tolist()]

    def gather(self, value: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [value]
        return list(
            self.accelerator.gather(
                torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
            ).tolist()
        )


def together(outcomes: Mapping[str, Outcome]) -> Outcome:
    """Join the outcomes of the models' updates; figures of other models than the policy begin with their
    name."""
    figures = {
        name if model == "policy" else f"{model}/{name}": value
        for model, outcome in outcomes.items()
        for name, value in outcome.figures.items()
    }
    return Outcome(
        figures,
        sum(each.tokens_trained for each in outcomes.values()),
        sum(each.tokens_off_policy for each in outcomes.values()),
        sum(each.tokens_dropped for each in outcomes.values()),
    )


def logs_authors(step: int) -> bool:
    """True if gradient norms per author are logged at ``step``."""
    return (step - 1) % AUTHORS_EVERY == 0


def by_authors(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Split samples by the authors of their tokens; the keys and their order never change."""
    parts: dict[str, list[Sample]] = {"policy": [], "guided": [], "repaired": []}
    for sample in samples:
        sampled = (sample.trajectory.author == Author.POLICY)[sample.trajectory.trained]
        parts["policy" if sampled.all() else "repaired" if sampled.any() else "guided"].append(sample)
    return parts


def empty_sample(policy: TrainablePolicy) -> Sample:
    """Make a sample without credit, for a process that has run out of work."""
    end = policy.tokenizer.eos_token_id
    return Sample(Trajectory.by(Author.REFERENCE, [end], [end]))


def distance(gradients: Sequence[torch.Tensor | None], before: Sequence[torch.Tensor | None]) -> float:
    """Norm of the difference between two gradients, one tensor at a time; None counts as zeros."""
    differences = (
        now if then is None else now - then.to(now.device)
        for now, then in zip(gradients, before, strict=True)
        if now is not None
    )
    return math.sqrt(sum(float(difference.norm()) ** 2 for difference in differences))
