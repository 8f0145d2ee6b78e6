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

    peak: float = number("operations/s", "maker", "an H200's peak, dense bfloat16")
    bandwidth: float = number("bytes/s", "maker", "reading an H200's memory")
    memory: float = number("bytes", "maker", "an H200's memory")
    nvlink: float = number("bytes/s", "maker, 70 % of it", "between GPUs of a node, per GPU and direction")
    network: float = number("bytes/s", "assumed", "between nodes, per GPU: 400 Gbit/s, 70 % of it")
    matmul: float = number("of peak", "notes.md", "matrix products")
    read: float = number("of its speed", "assumed", "sampling: reading the weights")
    decode_layer: float = number("s", "sampling.json", "sampling: a layer, once per token of a batch")
    kv_bandwidth: float = number(
        "bytes/s", "sampling.json", "sampling: a row's keys and values, with all else that a row adds"
    )
    parallel_latency: float = number("s", "assumed", "sampling: a layer, if several GPUs share it")
    drawing: float = number("bytes", "sampling.json", "sampling: memory of a row, per word of the vocabulary")
    micro_batch_layer: float = number("s", "update-h200.json", "update: a layer, once per micro-batch")
    width: float = number(
        "s", "update-h200.json", "update: a token, per layer and hidden unit, beside products"
    )
    word: float = number(
        "s", "output-layer.json", "update: a token, per word of the vocabulary, beside products"
    )
    optimizer: float = number("s", "update-h200.json", "update: a weight, with clipping and packing")
    activation: float = number(
        "bytes", "update-h200.json", "update: memory of a token, per layer and hidden unit"
    )
    verdict: float = number("s", "verifier.json", "one verdict of `math` on one CPU core")
    host: float = number("bytes/s", "assumed", "a process: from GPU to CPU, back, or into Ray's store")
    store: float = number("bytes/s", "assumed", "Ray's store, between nodes, one node after another")


def fitted() -> Assumptions:
    """The assumptions, fitted to the measurements of the model ``MEASURED``."""
    assumed = {
        "peak": 989e12,
        "bandwidth": 4.8e12,
        "memory": 141e9,
        "nvlink": 0.7 * 450e9,
        "network": 0.7 * 50e9,
        "read": 0.8,
        "parallel_latency": 40e-6,
        "host": 5e9,
        "store": 3e9,
    }
    verdict = json.loads(VERIFIER.read_text())["seconds"]
    update = fitted_update(assumed["peak"])
    speed = update["matmul"] * assumed["peak"]
    sampling = fitted_sampling(speed, assumed["read"] * assumed["bandwidth"])
    return Assumptions(**assumed, **update, **sampling, verdict=verdict)


def measured(name: str) -> Any:
    return json.loads((GPU / f"{name}.json").read_text())


def fitted_sampling(speed: float, reading: float) -> dict[str, float]:
    """A step of decoding takes fixed + rows · row seconds and as many bytes.

    ``speed``: operations per second of matrix products. ``reading``: bytes per second of weights.
    """
    model, (few, many) = MEASURED, measured("sampling")["rows"]
    rows = many["batch"] - few["batch"]
    few_seconds, many_seconds = (each["batch"] / each["tokens_per_second"] for each in (few, many))
    row = (many_seconds - few_seconds) / rows
    fixed = few_seconds - few["batch"] * row - 2 * model.multiplied / reading
    drawing = (many["gib"] - few["gib"]) * 2**30 / rows - 320 * model.kv_bytes  # at its end
    return {
        "decode_layer": fixed / model.layers,
        # Tokens 65 to 320 of a row, 192 in the mean, were in its keys and values.
        "kv_bandwidth": 192 * model.kv_bytes / (row - 2 * model.multiplied / speed),
        "drawing": drawing / model.vocabulary,
    }


def fitted_update(peak: float) -> dict[str, float]:
    """A backward pass takes fixed + tokens · token seconds; the output layer computes its logits twice, so
    that a token takes 8 operations for each of its weights instead of 6."""
    model, output = MEASURED, measured("output-layer")
    short, long = [row for row in measured("update-h200")["rows"] if row["kind"] == "full"]
    tokens = long["tokens"] - short["tokens"]
    backward, update = ([each["seconds"][part] for each in (short, long)] for part in ("backward", "update"))
    token = (backward[1] - backward[0]) / tokens
    outer, inner = 8 * model.vocabulary * model.hidden, 6 * model.layer_weights
    speed = (inner + outer) * long["tokens"] / MATRIX_PRODUCTS
    outputs = output["by_chunk"]["67108864"]["seconds"] / output["positions"]
    causal = 6 * model.layers * model.attention * 512  # in rows of 512 tokens
    units = model.layers * model.hidden
    return {
        "matmul": speed / peak,
        "micro_batch_layer": (backward[0] - short["tokens"] * token) / model.layers,
        "width": (token - outputs - (inner + causal) / speed) / units,
        "word": (outputs - outer / speed) / model.vocabulary,
        "optimizer": (sum(update) - sum(backward)) / 2 / model.weights,
        "activation": (long["gib"]["update"] - short["gib"]["update"]) * 2**30 / tokens / units,
    }


def table(assumptions: Assumptions) -> str:
    """The assumptions as a table of the page."""
    lines = ["| assumption | value | source |", "|---|---|---|"]
    for each in fields(assumptions):
        about = each.metadata
        value = f"{getattr(assumptions, each.name):.3g} {about['unit']}"
        lines.append(f"| {about['text']} | {value} | {about['source']} |")
    return "\n".join(lines)
