"""``python -m benchmarks.suite``: test the papers' claims on small models."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from handrail._util.progress import quiet, show
from handrail.cli import main

if TYPE_CHECKING:
    from benchmarks.suite.suite import Suite

app = typer.Typer()


@app.command()
def suite_command(
    output: Annotated[
        Path | None,
        typer.Option(help="Directory of results.jsonl (default: runs/suite, or runs/suite-quick)."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown page to write (default: evidence.md next to the results).")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Your own suite, laid out like benchmarks/suite/suite.toml.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a small part of it, without a search for settings.")
    ] = False,
    write_only: Annotated[
        bool, typer.Option("--write-only", help="Run nothing; write the page from the existing results.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of concurrent runs (default: one per GPU, else per CPU core)."),
    ] = None,
) -> None:
    """Test the papers' claims on several models, benchmarks, methods, reference styles and seeds.

    Write the answers to a page of Markdown. The same command continues a suite that was stopped.
    """
    quiet()
    from benchmarks.suite.suite import BUILTIN, load_suite

    what = load_suite(suite or BUILTIN, quick)
    output = output or Path("runs") / ("suite-quick" if quick else "suite")
    run(what, output, jobs, write_only)
    write_page(what, output, page or output / "evidence.md")


def run(what: Suite, output: Path, jobs: int | None, nothing: bool) -> None:
    """Make the runs that are not finished, unless ``nothing`` is to be run; measure the plans' weights."""
    from benchmarks.suite.suite import Result, current, planned, read_results, run_suite
    from benchmarks.suite.weights import weights_of

    file = output / "results.jsonl"
    finished = len(current(what, read_results(file)))
    show(f"{planned(what)} runs, {finished} of them finished already, into {file}")
    if nothing:
        return
    started = time.monotonic()

    def report(done: int, total: int, result: Result) -> None:
        left = (time.monotonic() - started) / (done - finished) * (total - done) / 60
        accuracy = result.mean(what.in_domain)
        show(
            f"{done}/{total} {result.cell.label}: in-domain {accuracy:.1%}, "
            f"{result.figures['seconds']:.0f} s; {left:.0f} min left"
        )

    run_suite(what, output, jobs, report)
    (output / "weights.json").write_text(json.dumps(weights_of(what), indent=1) + "\n", encoding="utf-8")


def write_page(what: Suite, output: Path, target: Path) -> None:
    """Write the page from the results in ``output``."""
    from benchmarks.suite.page import page
    from benchmarks.suite.suite import current, read_results

    results, file = output / "results.jsonl", output / "weights.json"
    weights = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    command = shlex.join(["python", "-m", "benchmarks.suite", *sys.argv[1:]])
    target.parent.mkdir(parents=True, exist_ok=True)
    place = os.path.relpath(results, target.parent)
    text = page(what, current(what, read_results(results)), weights, command, place)
    target.write_text(text, encoding="utf-8")
    show(f"page: {target}")


if __name__ == "__main__":
    main(app)
