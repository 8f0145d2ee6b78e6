"""Checkpoints: everything needed to resume a run exactly, in safetensors and JSON only."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from safetensors import safe_open
from safetensors.torch import save_file

from handrail._util.errors import Paused, UserError
from handrail._util.files import damage, no_room, remove_directory, whole_directory, write_sums
from handrail._util.state import read_state, write_state
from handrail.methods.base import Method, State
from handrail.methods.method_and_terms import restore
from handrail.models.sharding import cut_like, local
from handrail.training.config import TrainConfig
from handrail.training.update import Update

log = logging.getLogger("handrail")

SHARDS = ".shards"
"""Directory beside the checkpoints, where processes put their shards until a checkpoint takes them."""


def save(root: Path, step: int, config: TrainConfig, updates: Mapping[str, Update], state: State) -> None:
    """Write ``root/step-NNNNNN`` atomically, then delete the checkpoints that ``config`` does not keep.

    ``updates``: those of all models that are trained. ``state``: that of the method and its terms, see
    ``state_of``.
    Raises Paused if the disk is full, and UserError if a weight is not finite, or if shards are missing;
    earlier checkpoints then remain.
    """
    require_finite(root, step, updates)
    with explain_no_room(root, step, updates), whole_directory(root / f"step-{step:06d}") as aside:
        for name, update in updates.items():
            directory = model_directory(aside, name)
            update.policy.save_state(directory / "model")
            if update.policy.shards:
                take_shards(root, directory)
            else:
                save_file(moments(update.optimizer), directory / "optimizer.safetensors")
        write_state(aside / "state", {"step": step, **state})
        write_sums(aside)
    prune(root, step, config)


def model_directory(root: Path, name: str) -> Path:
    """Directory of one of the models that are trained; the policy's is ``root`` itself."""
    return root if name == "policy" else root / name


def save_shard(root: Path, step: int, updates: Mapping[str, Update]) -> None:
    """Write this process's shard of the optimizer's state beside the checkpoints, for ``save`` to take.

    Raises Paused if the disk is full.
    """
    accelerator = updates["policy"].accelerator
    number, processes = accelerator.process_index, accelerator.num_processes
    with explain_no_room(root, step, updates):
        (root / SHARDS).mkdir(parents=True, exist_ok=True)
        name = f"optimizer-{number + 1:05d}-of-{processes:05d}.safetensors"
        save_file(moments(updates["policy"].optimizer), root / SHARDS / name)


def take_shards(root: Path, into: Path) -> None:
    """Move the shards of all processes into a checkpoint.

    Raises UserError if some are missing, because another host wrote them to a disk of its own.
    """
    processes = torch.distributed.get_world_size()
    found = sorted((root / SHARDS).glob(f"optimizer-*-of-{processes:05d}.safetensors"))
    if len(found) < processes:
        raise UserError(
            f"{root} holds the shards of {len(found)} of {processes} processes; --output must be on a disk "
            "that all hosts share"
        )
    for file in found:
        file.rename(into / file.name)
    shutil.rmtree(root / SHARDS)


def moments(optimizer: Any) -> dict[str, torch.Tensor]:
    """The optimizer's state, or this process's shard of it, by the number of the weight and by name."""
    return {
        f"{index}.{name}": local(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


@contextmanager
def explain_no_room(root: Path, step: int, updates: Mapping[str, Update]) -> Iterator[None]:
    """Raise Paused if the disk is full."""
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        raise Paused(no_room_for(root, step, updates)) from error


def require_finite(root: Path, step: int, updates: Mapping[str, Update]) -> None:
    """Raise UserError if a trainable weight is not finite."""
    if not all(
        bool(parameter.isfinite().all())
        for update in updates.values()
        for parameter in update.policy.bare_model.parameters()
        if parameter.requires_grad
    ):
        raise UserError(
            f"a weight is not finite after step {step}, so the step is not kept; {restart_advice(root)}"
        )


def no_room_for(root: Path, step: int, updates: Mapping[str, Update]) -> str:
    free = shutil.disk_usage(root).free
    trained = [weight for update in updates.values() for weight in update.parameters]
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
    paths = {"model.path": there[-1] / "model", "experts.critic": there[-1] / "critic/model"} if there else {}
    named = " and ".join(f'{setting} = "{path}"' for setting, path in paths.items() if path.exists())
    return "lower train.learning_rate in a new run" + (
        f" with {named}, to keep what was learned" if named else ""
    )


def prune(root: Path, step: int, config: TrainConfig) -> None:
    """Delete all but the newest ``keep_last`` checkpoints up to ``step`` and those at multiples of
    ``keep_every``.

    Checkpoints after ``step`` are deleted too: the run resumed from an earlier one, so they are obsolete.
    """
    there = checkpoints(root)
    for old in [path for path in there if step_of(path) <= step][: -config.keep_last]:
        if not (config.keep_every and step_of(old) % config.keep_every == 0):
            remove_directory(old)
    for later in [path for path in there if step_of(path) > step]:
        remove_directory(later)


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


def load(path: Path, updates: Mapping[str, Update], method: Method[Any]) -> int:
    """Restore from what ``save`` wrote and return its step.

    Raises UserError if it is of a different model.
    """
    for name, update in updates.items():
        directory, optimizer = model_directory(path, name), update.optimizer
        update.policy.load_state(directory / "model")
        groups = optimizer.state_dict()["param_groups"]
        moments = load_moments(directory, update.parameters)
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state = read_state(path / "state")
    restore(method, state)
    return int(state["step"])


def load_moments(path: Path, trained: Sequence[torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Load the optimizer's state that any number of processes wrote, as this process keeps it.

    ``trained``: the weights that it is about.
    """
    entries: dict[int, dict[str, torch.Tensor]] = {}
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, "pt")) for file in sorted(path.glob("optimizer*.safetensors"))
        ]
        for key in files[0].keys():  # noqa: SIM118 (not a dictionary)
            index, _, name = key.partition(".")
            shards = [file.get_tensor(key) for file in files]
            whole = torch.cat(shards) if shards[0].ndim else shards[0]
            entries.setdefault(int(index), {})[name] = cut_like(whole, trained[int(index)])
    return entries
