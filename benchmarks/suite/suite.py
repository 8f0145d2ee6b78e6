"""Run backbones × reference styles × methods × seeds, with the same search for every method's learning
rate."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from handrail._util.errors import UserError
from handrail._util.files import locked, write_whole
from handrail._util.names import slug
from handrail._util.section import Section, explain
from handrail.eval.compare import mean_of_known, run_all
from handrail.eval.jobs import Job, merged, runnable
from handrail.models.builtin import locate
from handrail.training.config import Config

BUILTIN = Path(__file__).with_name("suite.toml")


class Suite(Section):
    """The runs of a suite, as read from a file.

    In ``base`` and ``methods``, {style} and {problems} are replaced by those of each run.
    """

    backbones: dict[str, str] = Field(min_length=1)
    """Name -> model path, weakest first."""
    styles: list[str] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> the settings of ``base`` that it changes."""
    seeds: list[int] = Field(min_length=1)
    problems: int
    """The seed of the training problems of the final runs, whose results are the evidence."""
    search_backbone: str
    search_seed: int
    search_problems: int
    learning_rates: list[float] = Field(min_length=1)
    """Learning rates to try for every method and style, on the search's backbone, seed and problems. With
    only one, there is no search."""
    in_domain: list[str] = Field(min_length=1)
    out_of_domain: list[str] = []
    """Names of ``base.eval.sets``. None of their problems is trained on; for ``out_of_domain``, no problem of
    the same kind."""
    base: dict[str, Any]

    @model_validator(mode="after")
    def _named(self) -> Suite:
        if self.search_backbone not in self.backbones:
            raise ValueError(
                f"search_backbone {self.search_backbone!r} is none of the backbones: "
                f"{', '.join(self.backbones)}"
            )
        sets = self.base.get("eval", {}).get("sets", {})
        for name in [*self.in_domain, *self.out_of_domain]:
            if name not in sets:
                raise ValueError(f"{name!r} is none of base.eval.sets: {', '.join(sets)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run."""

    phase: Literal["search", "evidence"]
    backbone: str
    style: str
    method: str
    seed: int
    learning_rate: float

    @property
    def label(self) -> str:
        rate = f", learning rate {self.learning_rate:g}" if self.phase == "search" else ""
        return f"{self.phase}: {self.backbone}, {self.style}, {self.method}, seed {self.seed}{rate}"


@dataclass(frozen=True)
class Result:
    """The results of a run: held-out accuracy before, the reward of every held-out problem after, and other
    figures of its summary."""

    cell: Cell
    settings: str
    """Checksum of the run's configuration."""
    start: dict[str, float]
    rewards: Mapping[str, Sequence[float | None]]
    """Held-out set -> the share of correct completions of each of its problems, in their order; None without
    a verdict."""
    figures: dict[str, Any]

    def mean(self, sets: Sequence[str]) -> float:
        """Accuracy after training, the mean over ``sets``."""
        return fmean(fmean(share for share in self.rewards[name] if share is not None) for name in sets)


def load_suite(path: Path = BUILTIN, quick: bool = False) -> Suite:
    """Load the suite of a file; with ``quick``, apply the changes in its ``[quick]``, whose ``systems`` are
    further methods.

    Raises UserError if the file does not describe a suite.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    changes = tree.pop("quick", {})
    if quick:
        for table in ("backbones", "methods"):
            names = changes.pop(table, [*tree[table]])
            tree[table] = {name: made for name, made in tree[table].items() if name in names}
        tree["methods"] |= changes.pop("systems", {})
        tree = merged(tree, changes)
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Suite)}") from error


def search_cells(suite: Suite) -> Iterator[Cell]:
    for style in suite.styles:
        for method in suite.methods:
            for rate in suite.learning_rates:
                yield Cell("search", suite.search_backbone, style, method, suite.search_seed, rate)


def evidence_cells(suite: Suite, chosen: Mapping[tuple[str, str], float]) -> Iterator[Cell]:
    """The final runs, ordered by seed, so that a suite that is stopped early has complete seeds."""
    for seed in suite.seeds:
        for backbone in suite.backbones:
            for style in suite.styles:
                for method in suite.methods:
                    if (style, method) in chosen:
                        yield Cell("evidence", backbone, style, method, seed, chosen[style, method])


def planned(suite: Suite) -> int:
    """The number of all runs."""
    settings = len(suite.styles) * len(suite.methods)
    return settings * len(suite.seeds) * len(suite.backbones) + (
        settings * len(suite.learning_rates) if len(suite.learning_rates) > 1 else 0
    )


def chosen_rates(suite: Suite, results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Return, for every style and method, the learning rate with the best mean over all benchmarks; of
    equals, the lower one."""
    if len(suite.learning_rates) == 1:
        return {
            (style, method): suite.learning_rates[0] for style in suite.styles for method in suite.methods
        }
    best: dict[tuple[str, str], Result] = {}
    for result in sorted(results, key=lambda result: result.cell.learning_rate):
        key = result.cell.style, result.cell.method
        sets = [*suite.in_domain, *suite.out_of_domain]
        if result.cell.phase == "search" and (key not in best or result.mean(sets) > best[key].mean(sets)):
            best[key] = result
    return {key: result.cell.learning_rate for key, result in best.items()}


def job(suite: Suite, cell: Cell, root: Path) -> Job:
    """Return the configuration of a cell's run. Raises UserError if it is not valid."""
    problems = suite.search_problems if cell.phase == "search" else suite.problems
    base = filled(suite.base, {"{style}": cell.style, "{problems}": str(problems)})
    own = {
        "model": {"path": suite.backbones[cell.backbone]},
        "train": {"seed": cell.seed, "learning_rate": cell.learning_rate},
    }
    config = runnable(
        merged(merged(base, suite.methods[cell.method]), own), f"the suite's methods.{cell.method}"
    )
    return Job(cell.label, cell.seed, config, root / slug(cell.label))


def filled(tree: Any, marks: Mapping[str, str]) -> Any:
    """Return ``tree`` with all marks in all strings replaced."""
    if isinstance(tree, Mapping):
        return {key: filled(value, marks) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, marks) for value in tree]
    for mark, value in marks.items():
        tree = tree.replace(mark, value) if isinstance(tree, str) else tree
    return tree


def checksum(config: Config) -> str:
    """Checksum of the settings that a run's configuration sets, and of its starting weights. A setting that
    is added to Handrail later does not invalidate results."""
    return hashlib.sha256(
        (config.model_dump_json(exclude_defaults=True) + weights_checksum(config.model.path)).encode()
    ).hexdigest()[:16]


@cache
def weights_checksum(path: str) -> str:
    files = sorted(Path(locate(path)).glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_suite(
    suite: Suite, output: Path, workers: int | None, report: Callable[[int, int, Result], None]
) -> None:
    """Run everything that ``output/results.jsonl`` does not contain yet, and append the results there.

    ``report`` is called with the number of finished runs, the number of all runs, and the last result. Raises
    UserError if the file contains results of other settings.
    """
    for cell in search_cells(suite):
        job(suite, cell, output)  # report any error in any of them before the first run
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.jsonl"
    results = {result.cell.label: result for result in read_results(file)}
    # a line that was cut off while it was written
    if file.exists() and not file.read_text(encoding="utf-8").endswith("\n"):
        write_whole(file, "".join(map(line, results.values())))
    total = planned(suite)

    def run(cells: Sequence[Cell]) -> None:
        jobs = {cell.label: job(suite, cell, output / "runs") for cell in cells}
        for label, each in jobs.items():
            if label in results and results[label].settings != checksum(each.config):
                raise UserError(f"{file} holds results of other settings ({label}); choose another --output")
        by_label = {cell.label: cell for cell in cells}

        def harvest(done: Job) -> None:
            result = results[done.name] = outcome(by_label[done.name], done)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(line(result))
            shutil.rmtree(done.directory)
            report(len(results), total, result)

        todo = [each for label, each in jobs.items() if label not in results]
        for each in todo:
            if each.config_written not in (None, each.config):  # of a suite that has been changed since
                shutil.rmtree(each.directory)
            elif each.summary:  # it ended just before the suite was stopped
                harvest(each)
        run_all([each for each in todo if each.name not in results], workers, finished=harvest)

    with locked(output):
        if len(suite.learning_rates) > 1:
            run(list(search_cells(suite)))
        run(list(evidence_cells(suite, chosen_rates(suite, list(results.values())))))


def current(suite: Suite, results: Sequence[Result]) -> list[Result]:
    """Return the results that belong to this suite: of a planned run, with the same configuration and
    weights."""
    there = {result.cell: result for result in results}

    def of(cells: Iterator[Cell]) -> list[Result]:
        return [
            there[cell]
            for cell in cells
            if cell in there and there[cell].settings == checksum(job(suite, cell, Path()).config)
        ]

    searched = of(search_cells(suite)) if len(suite.learning_rates) > 1 else []
    return searched + of(evidence_cells(suite, chosen_rates(suite, searched)))


def outcome(cell: Cell, done: Job) -> Result:
    """Return what is kept of a finished run; its directory may be deleted afterwards."""
    summary = done.summary
    assert summary is not None
    lines = [
        json.loads(line)
        for line in (done.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    ]
    late = lines[-max(1, len(lines) // 10) :]
    names = {key for line in late for key in line if key.startswith("diversity/")}
    diversity = {
        name.removeprefix("diversity/"): mean_of_known([line.get(name) for line in late])
        for name in sorted(names)
    }
    keys = ("all_wrong", "guided", "off_policy", "salvaged", "tokens_sampled", "seconds")
    start = {name: ends["start"]["mean"] for name, ends in summary["eval"].items()}
    figures = {key: summary[key] for key in keys} | {"diversity": diversity}
    rewards = {name: list(each.values()) for name, each in done.final_accuracies.items()}
    return Result(cell, checksum(done.config), start, rewards, figures)


def line(result: Result) -> str:
    return json.dumps(asdict(result)) + "\n"


def read_results(file: Path) -> list[Result]:
    """Read the results. A last line that was cut off when the suite was stopped is ignored. Raises UserError
    if another line is not a result."""
    if not file.exists():
        return []
    results = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            row = json.loads(text)
            results.append(Result(**{**row, "cell": Cell(**row["cell"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file}, line {number}: this is no result of a suite; choose another --output"
            ) from error
    return results
