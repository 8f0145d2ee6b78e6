"""Checkpoints: everything needed to resume a run exactly, in safetensors and JSON only."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from safetensors.torch import load_file, save_file

from handrail._util.errors import Paused, UserError
from handrail._util.files import damage, no_room, whole_directory, write_sums
from handrail._util.state import read_state, write_state
from handrail.methods.base import Method
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import TrainConfig

log = logging.getLogger("handrail")


def save(
    root: Path, step: int, config: TrainConfig, policy: TrainablePolicy, optimizer: Any, method: Method[Any]
) -> None:
    """Write ``root/step-NNNNNN`` atomically, then delete the checkpoints that ``config`` does not keep.

    Raises Paused if the disk is full, and UserError if a weight is not finite; earlier checkpoints then
    remain.
    """
    require_finite(root, step, policy)
    try:
        with whole_directory(root / f"step-{step:06d}") as aside:
            policy.save_state(aside / "model")
            entries = optimizer.state_dict()["state"].items()
            moments = {
                f"{index}.{name}": value.contiguous()
                for index, entry in entries
                for name, value in entry.items()
            }
            save_file(moments, aside / "optimizer.safetensors")
            terms = [term.state() for term in method.terms]
            write_state(aside / "state", {"step": step, "method": method.state(), "terms": terms})
            write_sums(aside)
    except Exception as error:
        if not no_room(error):
            raise
        raise Paused(no_room_for(root, step, policy)) from error
    prune(root, step, config)


def require_finite(root: Path, step: int, policy: TrainablePolicy) -> None:
    """Raise UserError if a trainable weight is not finite."""
    if not all(
        bool(parameter.isfinite().all()) for parameter in policy.model.parameters() if parameter.requires_grad
    ):
        raise UserError(
            f"a weight is not finite after step {step}, so the step is not kept; {restart_advice(root)}"
        )


def no_room_for(root: Path, step: int, policy: TrainablePolicy) -> str:
    free = shutil.disk_usage(root).free
    trained = (p for p in policy.model.parameters() if p.requires_grad)
    takes = 3 * sum(p.numel() * p.element_size() for p in trained)  # weights and Adam's two moments
    there = checkpoints(root)
    kept = f"{there[-1]} is whole" if there else "there is none before it"
    return (
        f"no room for the checkpoint of step {step}: it takes about {decimal(takes)}, and {root} has "
        f"{decimal(free)} left; {kept}; make room, then go on with --resume"
    )


def restart_advice(root: Path) -> str:
    """Advice for a run that cannot usefully continue."""
    there = checkpoints(root)
    keep = f' with model.path = "{there[-1] / "model"}", to keep what was learned' if there else ""
    return f"lower train.learning_rate in a new run{keep}"


def prune(root: Path, step: int, config: TrainConfig) -> None:
    """Delete all but the newest ``keep_last`` checkpoints up to ``step`` and those at multiples of
    ``keep_every``.

    Checkpoints after ``step`` are deleted too: the run resumed from an earlier one, so they are obsolete.
    """
    there = checkpoints(root)
    for old in [path for path in there if step_of(path) <= step][: -config.keep_last]:
        if not (config.keep_every and step_of(old) % config.keep_every == 0):
            shutil.rmtree(old)
    for later in [path for path in there if step_of(path) > step]:
        shutil.rmtree(later)


def checkpoints(root: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(
        (path for path in root.glob("step-*") if path.name.removeprefix("step-").isdigit()), key=step_of
    )


def step_of(path: Path) -> int:
    """Step after which the checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def newest_intact(root: Path, until: int, every: int) -> Path | None:
    """Find the newest intact checkpoint of a step up to ``until``; None if there never was one.

    Warns about every checkpoint that it skips. Raises UserError if none of the checkpoints can be used, or if
    none exists although one should have been written every ``every`` steps.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(root)):
        later = f"metrics.jsonl ends before it, at step {until}"
        what = damage(path) if step_of(path) <= until else later
        if not what:
            if skipped:
                log.warning("%s; going on from %s", "; ".join(skipped), path)
            return path
        skipped.append(f"{path} cannot be used: {what}")
    if skipped:
        raise UserError(f"{'; '.join(skipped)}; restore one from a copy, or start over with another --output")
    if 0 < every < until:
        raise UserError(
            f"{root} has no checkpoint of the run's {until} steps; restore one, or start over with another "
            "--output"
        )
    return None


def load(path: Path, policy: TrainablePolicy, optimizer: Any, method: Method[Any]) -> int:
    """Restore from what ``save`` wrote and return its step.

    Raises UserError if it is of a different model.
    """
    policy.load_state(path / "model")
    state = read_state(path / "state")
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    method.load_state(state["method"])
    for term, own in zip(method.terms, state["terms"], strict=True):
        term.load_state(own)
    return int(state["step"])
