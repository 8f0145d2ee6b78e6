"""The tables of docs/scale.md, and that of memory in docs/models.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.scale import assumptions
from benchmarks.scale.assumptions import Assumptions
from benchmarks.scale.changes import CHANGES
from benchmarks.scale.formula import bottleneck, parts, step_seconds
from benchmarks.scale.models import MODELS, ONE_GPU, Model
from benchmarks.scale.setup import (
    RESERVED,
    Setup,
    activation_bytes,
    fitting,
    sampling_bytes,
    start_bytes,
    training_bytes,
)
from benchmarks.scale.simulate import simulated_seconds

SIZES = (8, 64, 1024)
"""Numbers of GPUs."""


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# Which setups


def fastest(setups: Sequence[Setup], a: Assumptions) -> list[Setup]:
    """The one with the shortest step among those that fit, if any does."""
    found = [fitted for setup in setups if (fitted := fitting(setup, a))]
    return sorted(found, key=lambda setup: step_seconds(setup, parts(setup, a)))[:1]


def setups(model: Model, gpus: int, a: Assumptions) -> list[Setup]:
    """The fastest run of either kind: without samplers, and with samplers of one or more GPUs of a node."""
    apart = [
        Setup(model, gpus, samplers=number, staleness=1, shards=shared)
        for number in (gpus // 4, gpus // 2, 3 * gpus // 4)
        for shared in (1, 2, 4, 8)
        if number % shared == 0
    ]
    return fastest([Setup(model, gpus)], a) + fastest(apart, a)


def named(setup: Setup) -> str:
    """How a setup is started."""
    words = ["torchrun"]
    if setup.samplers:
        samplers = f"{setup.engines} sampler{'s' * (setup.engines > 1)}"
        samplers += f" of {setup.shards} GPUs" if setup.shards > 1 else ""
        words = [f"Ray, {setup.workers} workers, {samplers}, staleness {setup.staleness}"]
    words += ["FSDP2"] * setup.fsdp + ["checkpointing"] * setup.checkpointing
    return ", ".join(words + [f"batches of {setup.batch}"] * (setup.batch < 256))


# The tables


def steps(a: Assumptions) -> str:
    head = (
        "GPUs | model | run | weights | sample | longest | verify | update | exchange | step | simulated | "
        "difference | first bottleneck | what to change | step then"
    )
    rows = []
    for gpus in SIZES:
        for model in MODELS:
            chosen = setups(model, gpus, a)
            rows += [step_row(setup, a) for setup in chosen]
            if not chosen:
                rows.append([f"{gpus:,}", model.name, "no run fits the memory", *[""] * 9, "memory"])
                rows[-1] += ["more GPUs", ""]
    return table(head, rows)


def step_row(setup: Setup, a: Assumptions) -> list[str]:
    p = parts(setup, a)
    step, simulated = step_seconds(setup, p), simulated_seconds(setup, a)
    first, change = CHANGES[bottleneck(setup, p)]
    text, changed, then = change(setup, a)
    cells = [p.put + p.network + p.load, p.sample, p.stragglers, p.verify, p.update, p.exchange]
    return [
        f"{setup.gpus:,}",
        setup.model.name,
        named(setup),
        *map(seconds, cells),
        f"**{seconds(step)}**",
        seconds(simulated),
        f"{simulated / step - 1:+.1%}",
        first,
        text,
        seconds(step_seconds(changed, parts(changed, then))),
    ]


def asking(a: Assumptions) -> str:
    """Runs of a method that asks for completions after the verdicts."""
    rows = []
    for text, samplers, staleness in (("torchrun", 0, 0), ("4 + 4", 4, 0), ("4 + 4, one step ahead", 4, 1)):
        row = [text]
        for guided in (0.0, 0.25):
            setup = Setup(MODELS[0], 8, samplers=samplers, staleness=staleness, guided=guided)
            row += [seconds(step_seconds(setup, parts(setup, a))), seconds(simulated_seconds(setup, a))]
        rows.append(row)
    return table("8 GPUs, 1.5B | GRPO | simulated | asks for a quarter again | simulated", rows)


def memory(a: Assumptions) -> str:
    """Gigabytes on the fullest GPU, with recomputed activations and small batches."""

    def cell(needed: float) -> str:
        return f"{needed / 1e9:.0f}" if needed <= RESERVED * a.memory else f"**{needed / 1e9:.0f}**"

    rows = []
    for model in MODELS:
        small = partial(Setup, model, checkpointing=True, batch=16)
        alone = [small(8), small(8, fsdp=True), small(64, fsdp=True), small(1, lora=True)]
        apart = [small(8 + gpus, fsdp=True, samplers=8) for gpus in (8, 64)]
        samplers = [small(16, samplers=8, shards=shared) for shared in (1, 2, 8)]
        needed = [max(training_bytes(setup, a), sampling_bytes(setup, a)) for setup in alone]
        needed += [training_bytes(setup, a) for setup in apart]
        needed += [sampling_bytes(setup, a) for setup in samplers]
        rows.append([model.name, *map(cell, needed)])
    head = (
        "model | whole models | FSDP2, 8 GPUs | FSDP2, 64 | `[lora]` | beside samplers: FSDP2, 8 | "
        "FSDP2, 64 | a sampler on one GPU | on 2 | on 8"
    )
    return table(head, rows)


def kept(a: Assumptions) -> str:
    """Gigabytes of each part of what one GPU keeps in an update of all weights."""
    rows = []
    for model in ONE_GPU:
        p, one = model.weights, Setup(model, 1, start=True)
        parts = [4 * p, 4 * p, 8 * p, 2 * p, start_bytes(one), activation_bytes(one, a)]
        parts.append(activation_bytes(replace(one, checkpointing=True), a))
        rows.append([model.name, *(f"{part / 1e9:.1f}" for part in parts)])
    head = (
        "weights | gradient | moments | copy to sample from | with `kl`: model before training | activations"
    )
    return table(f"model | {head} | recomputed", rows)


def fit(a: Assumptions) -> str:
    """Gigabytes that a run on one GPU needs in all, plain and with recomputed activations."""
    rows = []
    for model in ONE_GPU:
        plain = Setup(model, 1, batch=16)
        kinds = (plain, replace(plain, start=True), replace(plain, lora=True))
        both = [replace(kind, checkpointing=again) for kind in kinds for again in (False, True)]
        needed = [max(training_bytes(setup, a), sampling_bytes(setup, a)) for setup in both]
        rows.append([model.name, *(f"{each / 1e9:.0f}" for each in needed)])
    head = "all weights | recomputed | with `kl` | recomputed | `[lora]`, with or without `kl` | recomputed"
    return table(f"model | {head}", rows)


def pages(a: Assumptions) -> dict[str, dict[str, str]]:
    """The blocks of every page that this module writes."""
    return {"scale.md": blocks(a), "models.md": {"kept": kept(a), "fit": fit(a)}}


def blocks(a: Assumptions) -> dict[str, str]:
    """The parts of docs/scale.md that are written by this module, by name."""
    return {"assumptions": assumptions.table(a), "memory": memory(a), "steps": steps(a), "asking": asking(a)}


def filled(page: str, found: dict[str, str]) -> str:
    """The page with every block between its markers."""
    for name, text in found.items():
        begin, end = f"<!-- {name}: python -m benchmarks.scale -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}"
    return page
