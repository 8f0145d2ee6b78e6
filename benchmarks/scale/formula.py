"""Seconds of a step by part, as closed formulas."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from benchmarks.scale.assumptions import Assumptions
from benchmarks.scale.models import Array
from benchmarks.scale.setup import Setup


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a step."""

    put: float
    """A worker gathers its weights and puts them into Ray's store."""
    network: float
    """The store sends them to the samplers' nodes."""
    load: float
    """Every sampler takes them."""
    sample: float
    """Sampling, if all completions had the mean length."""
    stragglers: float
    """What the longest completions add to it."""
    verify: float
    guide: float
    """Completions that the method asks for after the verdicts."""
    update: float
    exchange: float
    """Gradients and shards between the workers, as far as computation does not hide it."""


def decode_cost(setup: Setup, a: Assumptions) -> tuple[float, float, float]:
    """Seconds of one token of a batch: c₀ + rows · (c₁ + c₂ · tokens that the row sees)."""
    model, t = setup.model, setup.shards
    fixed = model.layers * (a.decode_layer + (a.parallel_latency if t > 1 else 0))
    fixed += 2 * model.multiplied / t / a.read / a.bandwidth
    row = 2 * model.multiplied / t / a.matmul / a.peak
    return fixed, row, model.kv_bytes / t / a.kv_bandwidth


def batches(completions: int, batch: int) -> list[int]:
    """Sizes of the batches that completions are sampled in, one after another."""
    full, rest = divmod(completions, batch)
    return [batch] * full + ([rest] if rest else [])


def rows_kept(rows: int, running: Array) -> Array:
    """Rows that a batch still computes when ``running`` of them have not ended: half leave when half have
    ended."""
    kept, size = np.full(len(running), rows), rows
    while size > 1:
        size //= 2
        kept[running <= size] = size
    return kept


def decode_seconds(setup: Setup, a: Assumptions, rows: int, together: int = 1) -> float:
    """Expected seconds to sample ``rows`` completions at once, until the longest of all ends that
    ``together`` such batches have."""
    fixed, row, seen = decode_cost(setup, a)
    survival = setup.lengths.survival
    any_left = 1 - (1 - survival) ** (rows * together)
    at = setup.prompt + np.arange(len(survival))
    return float((any_left * (fixed + rows_kept(rows, rows * survival) * (row + seen * at))).sum())


def equal_seconds(setup: Setup, a: Assumptions, rows: int) -> float:
    """Seconds to sample ``rows`` completions at once that all have the mean length."""
    fixed, row, seen = decode_cost(setup, a)
    mean = setup.lengths.mean
    return mean * (fixed + rows * (row + seen * (setup.prompt + (mean - 1) / 2)))


def sampling_seconds(setup: Setup, a: Assumptions, rows: int) -> float:
    """Expected seconds until all engines have answered all requests, of ``rows`` completions each.

    With one batch, everybody waits for the longest completion of the step. With several, what one of them
    takes longer in one engine, another one takes in another engine.
    """
    asked, sizes = setup.requests()[0], batches(rows, setup.batch)
    alone = asked == len(sizes) == 1
    together = min(setup.engines, setup.problems) if alone else 1
    return asked * sum(decode_seconds(setup, a, size, together) for size in sizes)


def token_seconds(setup: Setup, a: Assumptions) -> float:
    """Seconds of a token's forward and backward pass."""
    model, again = setup.model, 4 / 3 if setup.checkpointing else 1
    speed = a.matmul * a.peak
    row = setup.prompt + setup.lengths.attended
    layers = (6 * model.layer_weights + 6 * model.layers * model.attention * row) / speed
    layers += a.width * model.layers * model.hidden
    return again * layers + model.vocabulary * (a.word + 8 * model.hidden / speed)


def link(setup: Setup, a: Assumptions) -> float:
    """Bytes per second between workers, per GPU."""
    return a.nvlink if setup.nodes == 1 else a.network


def update_seconds(setup: Setup, a: Assumptions, tokens: float) -> tuple[float, float]:
    """Seconds of the computation of an update in which the busiest process reads ``tokens``, and of what it
    waits for other processes' data beside."""
    model, n = setup.model, setup.workers
    passes = max(1, math.ceil(tokens / setup.micro_batch))
    seconds = passes * model.layers * a.micro_batch_layer + tokens * token_seconds(setup, a)
    optimizer = a.optimizer * model.weights / (n if setup.fsdp else 1)
    moved = 4 * model.weights * (n - 1) / n / link(setup, a)
    if setup.fsdp:  # weights twice and gradients once per pass, while layers before are computed
        return seconds + optimizer, max(0.0, 3 * moved * passes - seconds)
    return seconds + optimizer, 2 * moved


def tokens_read(setup: Setup) -> float:
    """Expected tokens that the process with most tokens reads in an update; equal prompts are read once,
    unless rows are padded.

    The most of n sums that are nearly normal is, after Blom, about their (n − 3/8) / (n + 1/4) quantile.
    """
    padded = setup.fsdp or setup.checkpointing
    prompts = setup.share / (1 if padded else setup.group)
    n = min(setup.workers, setup.problems)
    most = NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) * setup.lengths.deviation * math.sqrt(setup.share)
    return setup.share * setup.lengths.mean + most + prompts * setup.prompt


def transfer(setup: Setup, a: Assumptions) -> tuple[float, float, float]:
    """Seconds to put bfloat16 weights into the store, to send them to other nodes, and to load them."""
    p, n = setup.model.weights, setup.workers
    gather = 4 * p * (n - 1) / n / link(setup, a) if setup.fsdp else 0.0
    copy = 6 * p / setup.shards / a.bandwidth
    if not setup.samplers:
        return 0.0, 0.0, gather + copy
    others = min(setup.samplers, setup.nodes) - 1
    host, whole = 2 * p / a.host, 2 * p / a.store
    load = host * (2 if setup.shards > 1 else 1)  # several GPUs read a file that is written first
    # Each worker sends a part, so every node with a worker sends at the same time. A node receives all parts.
    senders = min(n, setup.nodes)
    return gather + 2 * host / n, max(others / senders, min(others, 1)) * whole, load + copy


def parts(setup: Setup, a: Assumptions) -> Parts:
    """Seconds of each part of a step."""
    put, network, load = transfer(setup, a)
    asked, rows = setup.requests()
    mean = asked * sum(equal_seconds(setup, a, size) for size in batches(rows, setup.batch))
    whole = sampling_seconds(setup, a, rows)
    verify = setup.share * a.verdict / setup.verifiers
    update, exchange = update_seconds(setup, a, tokens_read(setup))
    guide = sampling_seconds(setup, a, math.ceil(rows * setup.guided)) if setup.guided else 0.0
    return Parts(put, network, load, mean, whole - mean, verify, guide, update, exchange)


def step_seconds(setup: Setup, p: Parts) -> float:
    """Seconds of a step after the first ones.

    With samplers that work k steps ahead, the slowest of four loops decides: training, sampling, the network,
    and all together, which k + 1 steps share. Completions that the method asks for wait for newer weights,
    and so for the rollouts.
    """
    sampling = p.load + p.sample + p.stragglers
    training = p.put + p.verify + p.update + p.exchange
    k = setup.staleness
    if not k:
        return float(sum(asdict(p).values()))
    if p.guide:
        return p.put + max(p.network + sampling, p.verify) + p.guide + p.update + p.exchange
    return max(training, sampling, p.network, (training + p.network + sampling) / (k + 1))


def bottleneck(setup: Setup, p: Parts) -> str:
    """Name of the longest part of what decides the step; sampling in small requests is ``requests``."""
    deciding = dict(asdict(p))
    if setup.staleness and not p.guide:
        step = step_seconds(setup, p)
        loops = [("put", "verify", "update", "exchange"), ("load", "sample", "stragglers"), ("network",)]
        for loop in loops:
            if math.isclose(sum(deciding[name] for name in loop), step):
                deciding = {name: deciding[name] for name in loop}
                break
    first = max(deciding, key=lambda name: deciding[name])
    asked, rows = setup.requests()
    serial = first in ("sample", "stragglers") and asked > 1 and rows < setup.batch
    return "requests" if serial else first
