"""Several runs from one configuration, side by side: the same start, the same problems, several seeds."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from statistics import mean, stdev
from typing import Any, Protocol

from scipy.stats import t as student
from torch import cuda

from handrail.config import Config, load_config, parse_config
from handrail.errors import UserError
from handrail.evaluate import wilson
from handrail.methods import build

Report = Callable[[str, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    name: str
    seed: int
    config: Config
    directory: Path

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        file = self.directory / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    @property
    def config_written(self) -> Config | None:
        file = self.directory / "config.toml"
        return load_config(file) if file.exists() else None


def jobs(config: Config, output: Path) -> list[Job]:
    """Every run with every seed. Raises UserError for a run that cannot be, or is another one's in the same directory."""
    if not config.compare.runs:
        raise UserError("the configuration has no [compare.runs], so there is nothing to compare")
    tree = config.model_dump(exclude={"compare"}, exclude_none=True)
    out: list[Job] = []
    for seed in config.compare.seeds:
        for name, changes in config.compare.runs.items():
            changed = parse_config(merged(merged(tree, changes), {"train": {"seed": seed}}), f"compare.runs.{name}")
            try:
                build(changed.method, changed.rollout)
            except UserError as error:
                raise UserError(f"compare.runs.{name}: {error}") from error
            job = Job(name, seed, changed, output / slug(name) / f"seed-{seed}")
            if any(other.directory == job.directory for other in out):
                raise UserError(f"compare: two runs would be written into {job.directory}; rename one, or list each seed once")
            if job.config_written not in (None, changed):
                raise UserError(f"{job.directory} holds a run of another configuration; choose another --output")
            out.append(job)
    return out


def choose(config: Config, names: list[str]) -> Config:
    """``config`` with these of its runs only. Raises UserError for a name that no run has."""
    for name in names:
        if name not in config.compare.runs:
            raise UserError(f"--runs: [compare.runs] has no {name!r}; there are: {', '.join(config.compare.runs)}")
    runs = {name: config.compare.runs[name] for name in names}
    return config.model_copy(update={"compare": config.compare.model_copy(update={"runs": runs})})


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with ``changes`` over it, tables merged key by key; naming another method drops the settings of the first."""
    out = dict(tree)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        other_method = both_tables and key == "method" and "name" in value
        out[key] = merged(out[key], value) if both_tables and not other_method else value
    return out


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def compare(config: Config, output: Path, workers: int | None, report: Report) -> dict[str, Any]:
    """Runs what is not finished yet and writes ``output/summary.json``.

    ``workers`` run at a time; by default one a core, or with a GPU one in all.
    """
    todo = [job for job in jobs(config, output) if job.summary is None]
    cores = os.cpu_count() or 1
    workers = min(workers or (cores if config.model.device == "cpu" or not cuda.is_available() else 1), max(1, len(todo)))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        messages = manager.Queue()
        threads = max(1, cores // workers)
        with ProcessPoolExecutor(workers, context, initializer=_limit_threads, initargs=(threads,)) as pool:
            pending: set[Future[None]] = {pool.submit(_run, job, messages) for job in todo}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _forward(messages, report)
                for future in done:
                    if error := future.exception():
                        pool.shutdown(cancel_futures=True)
                        raise error
    summary = {"config": config.model_dump(mode="json", exclude={"compare"}), "methods": aggregate(jobs(config, output))}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run(job: Job, messages: Any) -> None:
    from transformers.utils.logging import disable_progress_bar

    from handrail.train import train

    disable_progress_bar()
    train(
        job.config, job.directory, resume=job.directory.exists(),
        progress=lambda step, steps, metrics, seconds: messages.put((job.label, step, steps, metrics)),
    )  # fmt: skip


def _forward(messages: Any, report: Report) -> None:
    while True:
        try:
            report(*messages.get_nowait())
        except Empty:
            return


class Summarised(Protocol):
    """A run of a comparison, planned or read from its directory."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> dict[str, Any] | None: ...


def aggregate(all_jobs: Sequence[Summarised]) -> dict[str, Any]:
    """Each run's figures over its seeds."""
    out = {}
    for name in dict.fromkeys(job.name for job in all_jobs):
        runs = [job.summary for job in all_jobs if job.name == name]
        summaries = [run for run in runs if run]
        sets = summaries[0]["eval"]
        out[name] = {
            **{held_out: over_seeds([run["eval"][held_out] for run in summaries]) for held_out in sets},
            "all_wrong": {end: _mean([run["all_wrong"][end] for run in summaries]) for end in ("first", "last")},
            **{key: _mean([run.get(key) for run in summaries]) for key in ("rescued", "off_policy", "salvaged")},
            "steps_without_signal": _mean([run["steps_without_signal"] for run in summaries]),
            "seconds": _mean([run["seconds"] for run in summaries]),
            "seeds": [run["seed"] for run in summaries],
            "status": summaries[0]["status"],
        }
    return out


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(mean(known), 4) if known else None


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy after training with a 95 % interval: the wider, at each end, of Student's over the seeds and Wilson's
    over one seed's problems. ``n`` is the number of graded answers, ``per_seed`` each seed's accuracy, ``diversity`` the means."""
    ends = [run["end"]["mean"] for run in runs]
    middle = mean(ends)
    low, high = wilson(middle, runs[0]["end"]["n"])
    if len(ends) > 1:
        half = float(student.ppf(0.975, len(ends) - 1)) * stdev(ends) / len(ends) ** 0.5
        low, high = min(low, max(0.0, middle - half)), max(high, min(1.0, middle + half))
    return {
        "start": mean(run["start"]["mean"] for run in runs),
        "mean": middle,
        "low": low,
        "high": high,
        "n": sum(run["end"]["n"] for run in runs),
        "per_seed": ends,
        "diversity": {
            key.removeprefix("diversity/"): {end: _mean([run[end][key] for run in runs]) for end in ("start", "end")}
            for key in runs[0]["end"]
            if key.startswith("diversity/")
        },
    }
