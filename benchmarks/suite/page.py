"""Write the results of a suite as a Markdown page of claims, answers and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from benchmarks.suite.claims import Claim, Evidence, Row, claims
from benchmarks.suite.suite import Result, Suite, chosen_rates, planned
from handrail.eval.compare import over_seeds

Cells = list[str]


def page(suite: Suite, results: Sequence[Result], weights: Mapping[str, Any], command: str, file: str) -> str:
    """Return the page. ``weights`` are the results of ``structure_found`` by backbone and style; ``command``
    is the command that writes this page from the results in ``file``."""
    evidence = Evidence(suite, results)
    made = [claim for claim in claims(evidence) if claim.rows]
    return template(Path(__file__).parent).render(
        command=command,
        results=file,
        missing=planned(suite) - len(results),
        seeds=" and ".join(
            [", ".join(map(str, suite.seeds[:-1])), str(suite.seeds[-1])]
            if len(suite.seeds) > 1
            else map(str, suite.seeds)
        ),
        overview=[
            [claim.says, f"**{claim.average.answer}**" if claim.average else "", claim.answer]
            for claim in made
        ],
        claims=[{"says": claim.says, "how": claim.how, "rows": rows_of(claim)} for claim in made],
        glance=glance(evidence) if suite.out_of_domain else None,
        weights=weights_table(weights) if weights else None,
        accuracies=[
            {"title": f"{backbone}, {style} references", **accuracies(evidence, backbone, style)}
            for backbone, style in evidence.settings
            if any(evidence.runs(backbone, style, method) for method in suite.methods)
        ],
        search=search_table(suite, results) if len(suite.learning_rates) > 1 else None,
    )


def template(directory: Path) -> Template:
    """The page's template in a benchmark's directory."""
    environment = Environment(
        loader=FileSystemLoader(directory), trim_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    return environment.get_template("page.md.jinja")


def rows_of(claim: Claim) -> list[Cells]:
    return [claim_row(row) for row in [*claim.rows, *([claim.average] if claim.average else [])]]


def claim_row(row: Row) -> Cells:
    found = row.difference
    known = (
        f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        if abs(found.low) < float("inf")
        else "[one seed: unknown]"
    )
    return [
        row.setting,
        f"{100 * found.mean:+.1f} {known}",
        ", ".join(f"{100 * each:+.1f}" for each in found.per_seed),
        row.answer,
    ]


def weights_table(weights: Mapping[str, Any]) -> dict[str, Any]:
    names = list(next(iter(weights.values())))
    rows = [
        [setting, *("{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found[name]) for name in names)]
        for setting, found in weights.items()
    ]
    return {"header": ["backbone, style", *names], "rows": rows}


def glance(evidence: Evidence) -> dict[str, Any]:
    """Table of what each method learned and kept: accuracy on each kind of benchmark, mean over all backbones
    and seeds."""
    suite = evidence.suite
    columns = [
        (f"{style}: {kind}", style, sets)
        for style in suite.styles
        for kind, sets in (("in-domain", suite.in_domain), ("out-of-domain", suite.out_of_domain))
    ]

    def row(name: str, methods: Sequence[str], accuracy: Callable[[Result, Sequence[str]], float]) -> Cells:
        cells = [name]
        for _, style, sets in columns:
            runs = [
                run
                for method in methods
                for place in suite.backbones
                for run in evidence.runs(place, style, method)
            ]
            cells.append(f"{100 * fmean(accuracy(run, sets) for run in runs):.1f}" if runs else "")
        return cells

    before = row(
        "*before training*", list(suite.methods), lambda run, sets: fmean(run.start[name] for name in sets)
    )
    rows = [row(method, [method], Result.mean) for method in suite.methods]
    return {"header": ["method", *(title for title, _, _ in columns)], "rows": [before, *rows]}


def accuracies(evidence: Evidence, backbone: str, style: str) -> dict[str, Any]:
    suite = evidence.suite
    blocks = [
        ("**in-domain**", suite.in_domain),
        *([("**out-of-domain**", suite.out_of_domain)] if suite.out_of_domain else []),
    ]
    header = [
        "method",
        *(name for title, sets in blocks for name in (title, *sets)),
        "all wrong, first → last",
    ]
    started = next(run for method in suite.methods for run in evidence.runs(backbone, style, method))
    first = [
        text
        for _, sets in blocks
        for text in (start(started, sets), *(start(started, [name]) for name in sets))
    ]
    rows = [["*before training*", *first, ""]]
    for method in suite.methods:
        if runs := evidence.runs(backbone, style, method):
            cells = [
                text
                for _, sets in blocks
                for text in (interval(runs, sets), *(after(runs, name) for name in sets))
            ]
            ends = [[run.figures["all_wrong"][end] for run in runs] for end in ("first", "last")]
            dead = (
                "no rollouts" if None in ends[0] else " → ".join(f"{100 * fmean(end):.0f} %" for end in ends)
            )
            rows.append([method, *cells, dead])
    return {"header": header, "rows": rows}


def start(run: Result, sets: Sequence[str]) -> str:
    return f"{100 * fmean(run.start[name] for name in sets):.1f}"


def after(runs: Sequence[Result], name: str) -> str:
    return f"{100 * fmean(run.mean([name]) for run in runs):.1f}"


def interval(runs: Sequence[Result], sets: Sequence[str]) -> str:
    n = sum(len(runs[0].rewards[name]) for name in sets)
    found = over_seeds([{"start": {"mean": 0.0}, "end": {"mean": run.mean(sets), "n": n}} for run in runs])
    return "{mean:.1f} [{low:.1f}, {high:.1f}]".format(
        **{key: 100 * found[key] for key in ("mean", "low", "high")}
    )


def search_table(suite: Suite, results: Sequence[Result]) -> dict[str, Any]:
    chosen, sets = chosen_rates(suite, results), [*suite.in_domain, *suite.out_of_domain]
    found = {
        (r.cell.style, r.cell.method, r.cell.learning_rate): r.mean(sets)
        for r in results
        if r.cell.phase == "search"
    }
    rows = []
    for style in suite.styles:
        for method in suite.methods:
            cells = []
            for rate in suite.learning_rates:
                share = found.get((style, method, rate))
                mark = "**" if chosen.get((style, method)) == rate else ""
                cells.append("" if share is None else f"{mark}{100 * share:.1f}{mark}")
            rows.append([f"{style}, {method}", *cells])
    header = ["style, method", *(f"{rate:g}" for rate in suite.learning_rates)]
    return {"where": f"{suite.search_backbone}, seed {suite.search_seed}", "header": header, "rows": rows}
