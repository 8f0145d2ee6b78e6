"""Several runs from one configuration, side by side: the same start, the same problems, several seeds."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import Empty
from statistics import mean
from typing import Any, Protocol

from torch import cuda

from handrail._util.errors import Paused, UserError
from handrail._util.files import write_whole
from handrail._util.interrupts import Interrupts
from handrail.eval.differences import against_first, half_width, verdict
from handrail.eval.jobs import Job, jobs, require_finished_unchanged
from handrail.training.config import Config
from handrail.training.evaluate import wilson

AGAIN = "the same command goes on with it"
Report = Callable[[str, int, int, dict[str, Any]], None]


def compare(config: Config, output: Path, workers: int | None, report: Report) -> dict[str, Any]:
    """Runs what is not finished yet and writes ``output/summary.json``. ``workers`` run at a time, see ``run_all``."""
    planned = jobs(config, output)
    require_finished_unchanged(planned)
    run_all([job for job in planned if job.summary is None], workers, report)
    differences = against_first(rewards(planned))
    summary = {
        "config": config.model_dump(mode="json", exclude={"compare"}),
        "methods": aggregate(planned),
        "runs": [
            {"name": job.name, "seed": job.seed, "directory": str(job.directory.relative_to(output))}
            for job in planned
        ],
        "differences": [difference.as_json() for difference in differences],
        "verdict": verdict(differences, ended_by(planned), budget(config)),
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def run_all(
    todo: Sequence[Job],
    workers: int | None,
    report: Report = lambda label, step, steps, metrics: None,
    finished: Callable[[Job], None] = lambda job: None,
) -> None:
    """Runs them, ``workers`` at a time: by default one a core, or one a GPU if there are GPUs. ``finished`` is called after each.

    Workers take turns at the GPUs; more workers than GPUs share them.
    """
    if not todo:
        return
    cores = os.cpu_count() or 1
    devices = [] if all(job.config.model.device == "cpu" for job in todo) else visible_devices()
    workers = min(workers or len(devices) or cores, len(todo))
    context = multiprocessing.get_context("spawn")
    messages, places, stopping = context.Queue(), context.Queue(), context.Event()
    for place in range(workers):
        places.put(devices[place % len(devices)] if devices else None)
    settled = (max(1, cores // workers), places, messages, stopping)
    with (
        Interrupts("stopping every run with a checkpoint") as interrupts,
        ProcessPoolExecutor(workers, context, initializer=_settle, initargs=settled) as pool,
    ):
        pending: dict[Future[None], Job] = {pool.submit(_run, job): job for job in todo}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _forward(messages, report)
                if interrupts.asked:
                    raise Paused(f"stopped by {interrupts.asked}; {AGAIN}")
                for future in done:
                    _check(future, pending[future])
                    finished(pending.pop(future))
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def _check(future: Future[None], job: Job) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise Paused(f"the process of {job.label} was killed, perhaps for want of memory; {AGAIN}") from error


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (
        named.split(",")
        if named and cuda.is_available()
        else [str(index) for index in range(cuda.device_count())]
    )


def _settle(threads: int, places: Any, messages: Any, stopping: Any) -> None:
    """Gives a worker its share of the cores, and its GPU, before anything touches one."""
    import torch

    torch.set_num_threads(threads)
    # A terminal signals the whole family: the parent hears it and tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_obey, args=(stopping,), daemon=True).start()
    if (device := places.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    messages.cancel_join_thread()  # who stops does not wait until its last words are read
    _Worker.messages, _Worker.stopping = messages, stopping


def _obey(stopping: Any) -> None:
    """Passes on the parent's wish to stop, and ends with the parent: nobody would know of an orphan's runs."""
    parent = multiprocessing.parent_process()
    while parent and not multiprocessing.connection.wait([parent.sentinel], timeout=0.5):
        if stopping.is_set():
            Interrupts.ask("the comparison's end")
    os._exit(1)


class _Worker:
    """What a worker's runs have in common."""

    messages: Any
    stopping: Any


def _run(job: Job) -> None:
    from transformers.utils.logging import disable_progress_bar

    from handrail.training.loop import train

    if _Worker.stopping.is_set():  # the pool gives work out ahead
        raise Paused("not begun")
    disable_progress_bar()
    train(
        job.config, job.directory, resume=(job.directory / "metrics.jsonl").exists(),
        progress=lambda step, steps, metrics, seconds: _Worker.messages.put((job.label, step, steps, metrics)),
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
        for run in summaries:
            if missing := [
                held_out
                for held_out in sets
                if not all("mean" in run["eval"][held_out][at] for at in ("start", "end"))
            ]:
                raise UserError(
                    f"{name}, seed {run['seed']}: the verifier reached no verdict on {missing[0]}; mend it and run again"
                )
        out[name] = {
            **{held_out: over_seeds([run["eval"][held_out] for run in summaries]) for held_out in sets},
            "all_wrong": {
                end: mean_of_known([run["all_wrong"][end] for run in summaries]) for end in ("first", "last")
            },
            **{
                key: mean_of_known([run.get(key) for run in summaries])
                for key in ("guided", "off_policy", "salvaged")
            },
            "tokens_sampled": mean_of_known([run.get("tokens_sampled") for run in summaries]),
            "steps_without_signal": mean_of_known([run["steps_without_signal"] for run in summaries]),
            "seconds": mean_of_known([run["seconds"] for run in summaries]),
            "seeds": [run["seed"] for run in summaries],
            "status": summaries[0]["status"],
        }
    return out


def rewards(all_jobs: list[Job]) -> dict[str, dict[str, dict[int, dict[str, float]]]]:
    """Run -> held-out set -> seed -> problem -> its share of correct completions after training."""
    out: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for job in all_jobs:
        for name in job.config.eval.sets:
            out.setdefault(job.name, {}).setdefault(name, {})[job.seed] = {
                problem: share for problem, share in job.final_accuracies[name].items() if share is not None
            }
    return out


def ended_by(all_jobs: list[Job]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for job in all_jobs:
        out.setdefault(job.name, set()).add((job.summary or {})["ended_by"])
    return out


def budget(config: Config) -> str | None:
    return "tokens" if config.train.token_budget else "seconds" if config.train.seconds_budget else None


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """To four digits; None where nothing is known."""
    known = [value for value in values if value is not None]
    return round(mean(known), 4) if known else None


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy after training with a 95 % interval: the wider, at each end, of Student's over the seeds and Wilson's
    over one seed's problems. ``n`` is the number of graded answers, ``per_seed`` each seed's accuracy, ``diversity`` the means."""
    ends = [run["end"]["mean"] for run in runs]
    middle = mean(ends)
    low, high = wilson(middle, runs[0]["end"]["n"])
    if len(ends) > 1:
        half = half_width(ends, 0.95)
        low, high = min(low, max(0.0, middle - half)), max(high, min(1.0, middle + half))
    return {
        "start": mean(run["start"]["mean"] for run in runs),
        "mean": middle,
        "low": low,
        "high": high,
        "n": sum(run["end"]["n"] for run in runs),
        "per_seed": ends,
        "diversity": {
            key.removeprefix("diversity/"): {
                end: mean_of_known([run[end][key] for run in runs]) for end in ("start", "end")
            }
            for key in runs[0]["end"]
            if key.startswith("diversity/")
        },
    }
