"""Training under Ray Train: the loop of ``train`` in every worker, with progress on the driver."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from handrail.engines.ray import Post, run_on_ray
from handrail.engines.ray_samplers import RaySamplers, start_samplers
from handrail.models.loading import absolute
from handrail.training.callbacks import Progress
from handrail.training.config import Config
from handrail.training.loop import train
from handrail.training.resources import Forecast
from handrail.training.run_directory import RunDirectory

log = logging.getLogger("handrail")

LOCK_SECONDS = 60.0
"""Seconds for a lost worker, or those of a killed driver, to let go of the run directory."""


def train_on_ray(
    config: Config,
    directory: Path,
    workers: tuple[int, int] | None,
    resume: bool,
    progress: Progress,
    say: Callable[[str], None],
    samplers: int = 0,
) -> dict[str, Any]:
    """Train as ``train`` does, in processes of Ray, and return the summary.

    ``workers``: the least and the largest number of processes. ``samplers``: number of further processes that
    only sample; without them, every worker samples by itself.
    ``say`` is called with lines for the user. Raises what ``train`` and ``run_on_ray`` raise.
    """
    RunDirectory.claim(directory, config, resume)

    def receive(kind: str, *values: Any) -> None:
        if kind == "step":
            progress(*values)
        elif kind == "restart":
            say("a worker was lost or added; all start again from the newest checkpoint")
        else:
            say(values[0])

    work = partial(work_in, config, directory.absolute(), resume, read_summary(directory))
    use_gpus = config.model.device != "cpu"
    start, units = partial(samplers_for, config), config.sampler.tensor_parallel
    return dict(run_on_ray(work, directory, workers, use_gpus, receive, samplers, start, units))


def samplers_for(config: Config, number: int, on_gpus: bool) -> list[Any]:
    # A sampler may have another working directory.
    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    return start_samplers(number, on_gpus, model, config.rollout, config.data, config.sampler)


def work_in(
    config: Config,
    directory: Path,
    resume: bool,
    earlier: str,
    post: Post,
    starts: int,
    samplers: Sequence[Any],
) -> dict[str, Any]:
    """Train in this worker. What a lost worker has left in the directory is resumed.

    ``earlier``: the summary in the directory when the run was started.
    """
    written = read_summary(directory)
    if starts > 1 and written not in ("", earlier):  # the run was complete, only its worker did not say so
        return dict(json.loads(written))
    forecast = Forecast(config)

    def report(step: int, steps: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        post("step", step, steps, metrics, seconds)
        if said := forecast(step, steps, metrics, seconds):
            post("say", said)

    forward = Forwarding(post)
    log.addHandler(forward)
    try:
        if torch.distributed.get_rank() == 0:
            wait_until_free(directory)
        again = resume or (directory / "metrics.jsonl").exists()
        apart = partial(RaySamplers, samplers, start=starts) if samplers else None
        return train(config, directory, resume=again, progress=report, sampler=apart)
    finally:
        log.removeHandler(forward)


def read_summary(directory: Path) -> str:
    """Text of the summary in a run directory; empty without one."""
    file = directory / "summary.json"
    return file.read_text() if file.exists() else ""


def wait_until_free(directory: Path) -> None:
    """Wait until no process holds the lock of a run directory; ``train`` refuses one that stays locked."""
    with suppress(Timeout), FileLock(directory / ".lock", timeout=LOCK_SECONDS):
        pass


class Forwarding(logging.Handler):
    """Sends warnings to the driver."""

    def __init__(self, post: Post) -> None:
        super().__init__(logging.WARNING)
        self.post = post

    def emit(self, record: logging.LogRecord) -> None:
        self.post("say", f"warning: {record.getMessage()}")
