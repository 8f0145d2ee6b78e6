"""What the formulas assume, and where each number is from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.scale.models import MEASURED

GPU = Path(__file__).parents[2] / "docs/gpu"
VERIFIER = Path(__file__).with_name("verifier.json")
MATRIX_PRODUCTS = 0.076
"""Seconds of matrix products in the backward pass of 14,560 tokens, from a profile (benchmarks/notes.md)."""


def number(unit: str, source: str, text: str) -> Any:
    return field(metadata={"unit": unit, "source": source, "text": text})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Costs of the parts of a step, in seconds, bytes and operations."""

    peak: float = number("operations/s", "maker", "bfloat16, dense")
    bandwidth: float = number("bytes/s", "maker", "memory of an H200")
    memory: float = number("bytes", "maker", "memory of an H200")
    nvlink: float = number("bytes/s", "maker, 70 % of it", "between the GPUs of a node, per GPU and direction")
    network: float = number("bytes/s", "assumed", "between nodes, per GPU: 400 Gbit/s, 70 % of it")
    matmul: float = number("of peak", "benchmarks/notes.md", "speed of matrix products")
    read: float = number("of bandwidth", "assumed", "speed of reading weights for a token")
    decode_layer: float = number("s", "sampling.json", "per layer and token of a batch, beside reading weights")
    kv_bandwidth: float = number("bytes/s", "sampling.json", "keys and values, with all else that rows add")
    parallel_latency: float = number(
        "s", "assumed", "per layer and token, if GPUs share a copy of the weights (tensor parallelism)"
    )
    micro_batch_layer: float = number("s", "update.json", "per layer and micro-batch")
    width: float = number("s", "update.json", "per token, layer and hidden unit, beside matrix products")
    word: float = number("s", "output-layer.json", "per token and word of the vocabulary, beside products")
    optimizer: float = number("s", "update.json", "per weight, with clipping and packing")
    activation: float = number("bytes", "update.json", "per token, layer and hidden unit")
    verdict: float = number("s", "verifier.json", "one verdict of `math` on one CPU core")
    host: float = number("bytes/s", "assumed", "GPU to CPU memory or back, and into Ray's store, per process")
    store: float = number(
        "bytes/s", "assumed", "Ray's store between nodes; one node sends to the others one after another"
    )


def fitted() -> Assumptions:
    """The assumptions, fitted to the measurements of the model ``MEASURED``."""
    peak, bandwidth, read, model = 989e12, 4.8e12, 0.8, MEASURED
    sampling, update, output = (
        json.loads((GPU / f"{name}.json").read_text()) for name in ("sampling", "update", "output-layer")
    )
    # One step of decoding takes fixed + rows · row; 256 tokens after prompts of 64 see 192 on average.
    (few, many) = [(row["batch"], row["batch"] / row["tokens_per_second"]) for row in sampling["rows"]]
    row = (many[1] - few[1]) / (many[0] - few[0])
    fixed = few[1] - few[0] * row
    # A backward pass takes fixed + tokens · token; the output layer computes its logits twice (8 for 6).
    short, long = [row for row in update["rows"] if row["kind"] == "full"]
    tokens = long["tokens"] - short["tokens"]
    token = (long["seconds"]["backward"] - short["seconds"]["backward"]) / tokens
    words = 8 * model.vocabulary * model.hidden
    matmul = (6 * model.layer_weights + words) * long["tokens"] / MATRIX_PRODUCTS / peak
    outputs = output["by_chunk"]["67108864"]["seconds"] / output["positions"]
    layers = token - outputs - (6 * model.layer_weights + attention(512)) / matmul / peak
    optimizer = sum(each["seconds"]["update"] - each["seconds"]["backward"] for each in (short, long)) / 2
    return Assumptions(
        peak=peak,
        bandwidth=bandwidth,
        memory=141e9,
        nvlink=0.7 * 450e9,
        network=0.7 * 50e9,
        matmul=matmul,
        read=read,
        decode_layer=(fixed - 2 * model.multiplied / read / bandwidth) / model.layers,
        kv_bandwidth=192 * model.kv_bytes / (row - 2 * model.multiplied / matmul / peak),
        parallel_latency=40e-6,
        micro_batch_layer=(short["seconds"]["backward"] - short["tokens"] * token) / model.layers,
        width=layers / (model.layers * model.hidden),
        word=(outputs - words / matmul / peak) / model.vocabulary,
        optimizer=optimizer / model.weights,
        activation=(long["gib"]["update"] - short["gib"]["update"])
        * 2**30
        / tokens
        / (model.layers * model.hidden),
        verdict=json.loads(VERIFIER.read_text())["seconds"],
        host=5e9,
        store=3e9,
    )


def attention(row: float) -> float:
    """Operations of causal attention per token of ``MEASURED``, forward and backward, in rows of a length."""
    return 6 * MEASURED.layers * MEASURED.attention * row


def table(assumptions: Assumptions) -> str:
    """The assumptions as a table of the page."""
    lines = ["| assumption | value | source |", "|---|---|---|"]
    for each in fields(assumptions):
        about = each.metadata
        value = f"{getattr(assumptions, each.name):.3g} {about['unit']}"
        lines.append(f"| {about['text']} | {value} | {about['source']} |")
    return "\n".join(lines)
