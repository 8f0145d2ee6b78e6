"""Compare runs of one configuration: from the same model, on the same problems, over several seeds."""

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

from handrail._util.errors import Paused
from handrail._util.files import write_whole
from handrail._util.interrupts import Interrupts
from handrail.eval.differences import against_first, half_width, verdict
from handrail.eval.jobs import Job, plan_jobs, require_finished_unchanged
from handrail.training.config import Config
from handrail.training.evaluate import wilson

AGAIN = "run the same command again to continue"
Report = Callable[[str, int, int, dict[str, Any]], None]


def compare(config: Config, output: Path, jobs: int | None, report: Report) -> dict[str, Any]:
    """Run the jobs that are not finished and write ``output/summary.json``; ``jobs`` as in ``run_all``."""
    planned = plan_jobs(config, output)
    require_finished_unchanged(planned)
    run_all([job for job in planned if job.summary is None], jobs, report)
    differences = against_first(rewards(planned))
    summary = {
        "config": config.model_dump(mode="json", exclude={"compare"}),
        "methods": aggregate(planned),
        "runs": [
            {"name": job.name, "seed": job.seed, "directory": str(job.directory.relative_to(output))}
            for job in planned
        ],
        "differences": [difference.as_json() for difference in differences],
        "verdict": [
            *verdict(differences, ended_by(planned), budget(config)),
            *without_verdict(planned),
        ],
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def run_all(
    todo: Sequence[Job],
    workers: int | None,
    report: Report = lambda label, step, steps, metrics: None,
    finished: Callable[[Job], None] = lambda job: None,
) -> None:
    """Run the jobs, ``workers`` at a time (default: one per GPU, else per CPU core).

    GPUs are assigned to workers in turn; if there are more workers than GPUs, workers share them.
    ``finished`` is called after each job.
    """
    if not todo:
        return
    cores = os.cpu_count() or 1
    devices = [] if all(job.config.model.device == "cpu" for job in todo) else visible_devices()
    workers = min(workers or len(devices) or cores, len(todo))
    context = context_for(devices)
    messages, places, stopping = context.Queue(), context.Queue(), context.Event()
    for place in range(workers):
        places.put(devices[place % len(devices)] if devices else None)
    settled = (max(1, cores // workers), places, messages, stopping)
    with (
        Interrupts("stopping every run with a checkpoint") as interrupts,
        ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=settled) as pool,
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
        raise Paused(f"the process of {job.label} was killed, perhaps out of memory; {AGAIN}") from error


def context_for(devices: Sequence[str]) -> Any:
    """Return how to start workers: as forks of one process that has done the imports, or one by one if they
    use GPUs, because an import may touch a GPU, and a fork cannot use it then."""
    if devices:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["handrail.eval.compare", "handrail.training.loop"])
    return context


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named and cuda.is_available():
        return named.split(",")
    return [str(index) for index in range(cuda.device_count())]


def _init_worker(threads: int, places: Any, messages: Any, stopping: Any) -> None:
    """Assign a worker its share of the cores and its GPU, before anything uses one."""
    import torch

    torch.set_num_threads(threads)
    # A terminal signals the whole process group. The parent handles the signal and tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, args=(stopping,), daemon=True).start()
    if (device := places.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    messages.cancel_join_thread()  # a stopping worker must not wait for its last messages to be read
    _Worker.messages, _Worker.stopping = messages, stopping


def _follow_parent(stopping: Any) -> None:
    """Request a stop when the parent does, and exit if the parent dies: nobody would see an orphan's runs."""
    parent = multiprocessing.parent_process()
    while parent and not multiprocessing.connection.wait([parent.sentinel], timeout=0.5):
        if stopping.is_set():
            Interrupts.ask("the comparison's end")
    os._exit(1)


class _Worker:
    """State that a worker's runs share."""

    messages: Any
    stopping: Any


def _run(job: Job) -> None:
    from transformers.utils.logging import disable_progress_bar

    from handrail.training.loop import train

    if _Worker.stopping.is_set():  # the pool hands out jobs ahead of time, even while stopping
        raise Paused("not started")
    disable_progress_bar()
    train(
        job.config,
        job.directory,
        resume=(job.directory / "metrics.jsonl").exists(),
        progress=lambda step, steps, metrics, _: _Worker.messages.put((job.label, step, steps, metrics)),
    )


def _forward(messages: Any, report: Report) -> None:
    while True:
        try:
            report(*messages.get_nowait())
        except Empty:
            return


class HasSummary(Protocol):
    """A run of a comparison, planned or read from its directory."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> dict[str, Any] | None: ...


def has_verdict(run: dict[str, Any], held_out: str) -> bool:
    """True if the summary ``run`` knows the accuracy on a held-out set before and after training."""
    return all("mean" in run["eval"][held_out][at] for at in ("start", "end"))


def without_verdict(all_jobs: Sequence[HasSummary]) -> list[str]:
    """Say of which held-out sets the figures are missing, because the verifier reached no verdict on them."""
    return [
        f"{job.name}, seed {run['seed']}: the verifier reached no verdict on {held_out}, so {job.name} has "
        "no accuracy there; fix the verifier, and measure the model with handrail eval."
        for job in all_jobs
        if (run := job.summary)
        for held_out in run["eval"]
        if not has_verdict(run, held_out)
    ]


def aggregate(all_jobs: Sequence[HasSummary]) -> dict[str, Any]:
    """Compute the figures of each run over its seeds, without held-out sets that one has no verdict on."""
    out = {}
    for name in dict.fromkeys(job.name for job in all_jobs):
        runs = [job.summary for job in all_jobs if job.name == name]
        summaries = [run for run in runs if run]
        sets = [each for each in summaries[0]["eval"] if all(has_verdict(run, each) for run in summaries)]
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
    """Map run -> held-out set -> seed -> problem -> its share of correct completions after training."""
    out: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for job in all_jobs:
        sets = out.setdefault(job.name, {})
        for name in job.config.eval.sets:
            known = {
                problem: share for problem, share in job.final_accuracies[name].items() if share is not None
            }
            if known:
                sets.setdefault(name, {})[job.seed] = known
    return out


def ended_by(all_jobs: list[Job]) -> dict[str, set[str]]:
    """Map each run to what ended it, over its seeds: ``steps``, or a budget of ``tokens`` or ``seconds``."""
    out: dict[str, set[str]] = {}
    for job in all_jobs:
        out.setdefault(job.name, set()).add((job.summary or {})["ended_by"])
    return out


def budget(config: Config) -> str | None:
    """Return the unit of the budget that ends the runs, or None without a budget."""
    return "tokens" if config.train.token_budget else "seconds" if config.train.seconds_budget else None


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values to four decimals; None if no value is known."""
    known = [value for value in values if value is not None]
    return round(mean(known), 4) if known else None


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean accuracy after training with a 95 % interval.

    At each end, the interval is the wider of Student's over the seeds and Wilson's over one seed's problems.
    ``n`` is the number of graded answers, ``per_seed`` holds the accuracy of each seed, and ``diversity``
    holds means.
    """
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
