"""What to change about each bottleneck, and the run that has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.scale.assumptions import Assumptions
from benchmarks.scale.setup import Setup, fits

Changed = tuple[str, Setup, Assumptions]


def shorter(setup: Setup, a: Assumptions) -> Changed:
    half = setup.lengths.longest // 2
    cut = setup.lengths.survival[half]
    text = f"`rollout.max_tokens = {half}`, which cuts {cut:.0%} of completions"
    return text, replace(setup, lengths=replace(setup.lengths, longest=half)), a


def larger_batches(setup: Setup, a: Assumptions) -> Changed:
    return f"`rollout.batch_size = {2 * setup.batch}`", replace(setup, batch=2 * setup.batch), a


def one_request(setup: Setup, a: Assumptions) -> Changed:
    return "samplers that answer all their workers in one batch (to build)", replace(setup, merged=True), a


def fused_update(setup: Setup, a: Assumptions) -> Changed:
    text = "`model.compile` with FSDP2 (to build)" if setup.fsdp else "`model.compile = true`"
    text += ", taken to halve all but matrix products"
    return text, setup, replace(a, width=a.width / 2)


def larger_passes(setup: Setup, a: Assumptions) -> Changed:
    for factor in (4, 2):
        larger = replace(setup, micro_batch=factor * setup.micro_batch)
        text = f"`train.micro_batch_tokens = {larger.micro_batch}`"
        if fits(larger, a):
            return text, larger, a
        larger = replace(larger, checkpointing=True)
        if fits(larger, a):
            return f"{text}, `model.gradient_checkpointing = true`", larger, a
    return "shards within a node instead of over all (to build)", setup, replace(a, network=a.nvlink)


CHANGES: dict[str, tuple[str, Callable[[Setup, Assumptions], Changed]]] = {
    "stragglers": ("the longest completions", shorter),
    "sample": ("sampling", larger_batches),
    "requests": ("samplers answer one worker at a time", one_request),
    "update": ("computing the update", fused_update),
    "exchange": ("gradients and shards between GPUs", larger_passes),
}
"""The parts that come first somewhere on the page: in words, and what changes them."""
