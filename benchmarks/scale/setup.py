"""How a run is spread over GPUs, and whether its GPUs' memory suffices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from benchmarks.scale.assumptions import Assumptions
from benchmarks.scale.models import Lengths, Model

RESERVED = 0.9
"""Share of a GPU's memory that a run may fill; the rest is for libraries and fragments."""


@dataclass(frozen=True)
class Setup:
    """A run: the model in bfloat16, float32 weights in training, GRPO, one update per step."""

    model: Model
    gpus: int
    lora: bool = False
    """True if only adapters are trained; the formulas of time are for all weights."""
    start: bool = False
    """True if the model before training is kept (``kl``); with adapters, it is the model without them."""
    samplers: int = 0
    """GPUs that only sample; the others train and, without samplers, sample too."""
    staleness: int = 0
    fsdp: bool = False
    checkpointing: bool = False
    """True if activations are recomputed (``model.gradient_checkpointing``)."""
    merged: bool = False
    """True if a sampler answers the requests of all its workers in one batch; today it answers one at a
    time."""
    shards: int = 1
    """GPUs that share the weights of one sampler (``sampler.tensor_parallel``, with vLLM)."""
    problems: int = 512
    group: int = 8
    prompt: int = 256
    lengths: Lengths = field(default_factory=Lengths)
    batch: int = 256
    """Most completions that a sampler samples at once (``rollout.batch_size``)."""
    micro_batch: int = 8192
    """``train.micro_batch_tokens``."""
    verifiers: int = 2
    """``verifier.workers`` of every process."""
    guided: float = 0.0
    """Completions that the method asks for after the verdicts, per rollout (repairs, hints)."""
    node: int = 8
    """GPUs per node."""

    @property
    def workers(self) -> int:
        return self.gpus - self.samplers

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.node)

    @property
    def engines(self) -> int:
        """Number of copies of the model that sample."""
        return (self.samplers or self.workers) // self.shards

    @property
    def share(self) -> int:
        """Completions of the process with most."""
        return math.ceil(self.problems / self.workers) * self.group

    def requests(self) -> tuple[int, int]:
        """Number of requests that the busiest engine answers one after another, and completions in each."""
        if not self.samplers:
            return 1, math.ceil(self.problems / self.engines) * self.group
        if self.merged:
            return 1, math.ceil(self.problems * self.group / self.engines)
        own = max(1, self.engines // self.workers)  # samplers of a worker
        asking = math.ceil(self.workers / self.engines)
        return min(asking, self.problems), math.ceil(self.share / own)

    def own(self, worker: int) -> range:
        """The samplers that answer a worker, as in ``RaySamplers``."""
        return range(worker % self.engines, self.engines, self.workers)


def training_bytes(setup: Setup, a: Assumptions) -> float:
    """Bytes on a GPU that trains, during an update."""
    model, n = setup.model, setup.workers
    p = model.weights
    activations = activation_bytes(setup, a)
    gathered = model.layer_weights / model.layers + p - model.layer_weights  # one layer, both embeddings
    if setup.lora:  # the adapters themselves are small
        return (2 * (p / n + gathered) if setup.fsdp and setup.samplers else 2 * p) + activations
    shared = 16 * p / n if setup.fsdp else 16 * p + (4 * p if n > 1 else 0)
    if setup.fsdp:
        shared += 8 * gathered  # with their gradients
    copy = 0 if setup.samplers else 2 * p
    return shared + copy + start_bytes(setup) + activations


def activation_bytes(setup: Setup, a: Assumptions) -> float:
    """Bytes of the activations of a micro-batch, or of the longest row if that has more tokens."""
    model = setup.model
    per_token = a.activation * model.hidden * (1 if setup.checkpointing else model.layers)
    per_token += 4 * model.hidden * model.layers * setup.checkpointing
    return per_token * max(setup.micro_batch, setup.prompt + setup.lengths.longest)


def start_bytes(setup: Setup) -> float:
    """Bytes of the model before training, in float32, on a GPU that trains all weights."""
    return 4.0 * setup.model.weights * setup.start / (setup.workers if setup.fsdp and setup.samplers else 1)


def sampling_bytes(setup: Setup, a: Assumptions) -> float:
    """Bytes on a GPU that samples, while it does."""
    model = setup.model
    p = model.weights
    rows = min(setup.batch, setup.requests()[1])
    tokens = setup.prompt + setup.lengths.longest
    cache = rows * (tokens * model.kv_bytes + a.drawing * model.vocabulary) / setup.shards
    if setup.samplers or setup.lora:
        return 2 * p / setup.shards + cache
    kept = 4 * p + 12 * p / setup.workers if setup.fsdp else 16 * p
    return kept + 2 * p + start_bytes(setup) + cache


def fits(setup: Setup, a: Assumptions) -> bool:
    """True if every GPU's memory suffices."""
    return max(training_bytes(setup, a), sampling_bytes(setup, a)) <= RESERVED * a.memory


def fitting(setup: Setup, a: Assumptions) -> Setup | None:
    """The first of these that fits: as it is, with FSDP2, with recomputed activations, with smaller batches
    of completions; None if none does."""
    for batch in (256, 64, 16):
        for fsdp in (False, True):
            for checkpointing in (False, True):
                tried = replace(setup, fsdp=fsdp, checkpointing=checkpointing, batch=batch)
                if (setup.workers > 1 or not fsdp) and fits(tried, a):
                    return tried
    return None
