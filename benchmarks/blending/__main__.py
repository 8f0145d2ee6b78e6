"""Imitate, blend, reinforce, against SFT and SORT: ``python -m benchmarks.blending``.

Trains on the suite's problems (benchmarks/suite/suite.toml) with seeds that chose no setting, and writes
docs/blending.md from docs/evidence/blending.jsonl. It continues where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.blending.page import LONGER, OURS, page
from benchmarks.suite.suite import (
    BUILTIN,
    Cell,
    Suite,
    job,
    line,
    load_suite,
    outcome,
    read_results,
)
from handrail._util.progress import show
from handrail.eval.compare import run_all
from handrail.eval.jobs import Job
from handrail.training.blend import blend

RESULTS = Path("docs/evidence/blending.jsonl")
PAGE = Path("docs/blending.md")
RUNS = Path("runs/blending")
MODELS = ("middle", "strong")
"""Of the suite's; one after the other, so that a benchmark that is stopped early is complete for one."""
IMITATED, REINFORCED = 150, 75
"""Steps of the two parts. What trains in one part takes as many steps as both together, and so does the
second part of LONGER, which then samples as many tokens as SORT."""
FIRST = "SFT, first part"
SHARES = {"SFT, then GRPO": 1.0, OURS: 0.7, LONGER: 0.7}
"""Share of the first part's model in what the second one starts from."""
RATES = {"SFT": {"clean": 5e-4, "foreign": 1e-3}, "SORT": {"clean": 5e-4, "foreign": 5e-4}}
"""Learning rates as chosen for docs/evidence.md; GRPO has 2e-4 after SFT."""


def suite() -> Suite:
    found = load_suite(BUILTIN)
    whole = {"train": {"steps": IMITATED + REINFORCED}}
    methods: dict[str, Any] = {FIRST: {"method": {"name": "sft"}, "train": {"steps": IMITATED}}}
    methods |= {"SFT": {"method": {"name": "sft"}, **whole}, "SORT": {"method": {"name": "sort"}, **whole}}
    last = {"method": {"name": "grpo"}, "train": {"steps": REINFORCED, "learning_rate": 2e-4}}
    methods |= {**dict.fromkeys(SHARES, last), LONGER: {"method": {"name": "grpo"}, **whole}}
    backbones = {name: found.backbones[name] for name in MODELS}
    return found.model_copy(update={"methods": methods, "backbones": backbones})


def cells(what: Suite) -> Iterator[Cell]:
    """The runs, first parts before second ones, all of a model before those of the next."""
    for backbone in what.backbones:
        for method in what.methods:
            for seed, style in product(what.seeds, what.styles):
                rate = 2e-4 if method in SHARES else RATES[method.partition(",")[0]][style]
                yield Cell("evidence", backbone, style, method, seed, rate)


def planned(what: Suite, cell: Cell) -> Job:
    """The job of a run. A second part starts from the blended model, which is written if need be."""
    made = job(what, cell, RUNS)
    if cell.method not in SHARES:
        return made
    first = job(what, replace(cell, method=FIRST, learning_rate=RATES["SFT"][cell.style]), RUNS)
    start = made.directory.with_name(f"{made.directory.name}-start")
    if not start.exists():
        blend(what.backbones[cell.backbone], str(first.directory / "model"), SHARES[cell.method], start)
    model = made.config.model.model_copy(update={"path": str(start)})
    return replace(made, config=made.config.model_copy(update={"model": model}))


def run(what: Suite, workers: int) -> None:
    """Make the runs that are not in RESULTS yet, and add them there."""
    done = {result.cell.label for result in read_results(RESULTS)}
    RUNS.mkdir(parents=True, exist_ok=True)
    for _, some in groupby(cells(what), lambda cell: (cell.backbone, cell.method in SHARES)):
        todo = {cell.label: cell for cell in some if cell.label not in done}

        def harvest(ended: Job, todo: Mapping[str, Cell] = todo) -> None:
            result = outcome(todo[ended.name], ended)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(line(result))
            learned, kept = result.mean(what.in_domain), result.mean(what.out_of_domain)
            show(f"{ended.name}: learned {100 * learned:.1f}, kept {100 * kept:.1f}")

        jobs = [planned(what, cell) for cell in todo.values()]
        for each in jobs:
            if each.summary:  # it ended just before the benchmark was stopped
                harvest(each)
        run_all([each for each in jobs if not each.summary], workers, finished=harvest)


def rendered() -> str:
    """Return the page of the results."""
    what = suite()
    results = read_results(RESULTS)
    # Second parts start elsewhere than the method does.
    start = {
        (each.cell.backbone, each.cell.style): each.start for each in results if each.cell.method == FIRST
    }
    results = [replace(each, start=start[each.cell.backbone, each.cell.style]) for each in results]
    shown = {name: made for name, made in what.methods.items() if name != FIRST}
    numbers = {"steps": IMITATED + REINFORCED, "imitated": IMITATED, "reinforced": REINFORCED}
    missing = len(list(cells(what))) - len(results)
    return page(what.model_copy(update={"methods": shown}), results, missing, **numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-only", action="store_true", help="only write the page from finished runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    if not options.write_only:
        run(suite(), options.jobs)
    PAGE.write_text(rendered(), encoding="utf-8")
