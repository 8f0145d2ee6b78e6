"""Everything a run needs to go on as if it had never stopped, in safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from handrail.methods.base import Method
from handrail.policy.learning import LearningPolicy


def save(root: Path, step: int, keep: int, policy: LearningPolicy, optimizer: Any, scheduler: Any, method: Method) -> None:
    """Writes ``root/step-NNNNNN`` aside and renames it, then deletes all but the newest ``keep``."""
    final = root / f"step-{step:06d}"
    aside = root / f".{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    policy.save_state(aside / "model")
    moments = {
        f"{index}.{name}": value.contiguous() for index, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()
    }
    save_file(moments, aside / "optimizer.safetensors")
    state = {"step": step, "scheduler": scheduler.state_dict(), "method": method.state()}
    (aside / "state.json").write_text(json.dumps(state, indent=1, default=float))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(root.glob("step-*"))


def load(path: Path, policy: LearningPolicy, optimizer: Any, scheduler: Any, method: Method) -> int:
    """Restores what ``save`` wrote and returns the step it was written after. Raises UserError if the model is another one."""
    policy.load_state(path / "model")
    state = json.loads((path / "state.json").read_text())
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # the scheduler restores its count, not what it had set
    method.load_state(state["method"])
    return int(state["step"])
