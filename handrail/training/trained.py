"""Trained models: their location, and the settings that they were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from handrail._util.errors import UserError
from handrail.training.config import Config, load_config

KEPT = "handrail.toml"
"""The run's configuration in the model's directory, so that it stays with a model that is moved or copied."""


def keep_settings(directory: Path, config: Config) -> None:
    """Write the configuration into the model's directory."""
    text = tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"compare"}))
    (directory / KEPT).write_text(text, encoding="utf-8")


def is_run(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.toml", "metrics.jsonl"))


def model_of(path: str) -> str:
    """Return the model directory if ``path`` is a run, else ``path``.

    Raises UserError if the run has no model yet.
    """
    directory = Path(path)
    if not is_run(directory):
        return path
    if (directory / "model").is_dir():
        return str(directory / "model")
    there = sorted(directory.glob("checkpoints/step-*/model"))
    instead = f"name its newest checkpoint, {there[-1]}" if there else "it has no checkpoint either"
    raise UserError(f"{path} is a run that has not ended, so there is no {directory / 'model'}; {instead}")


def settings_file(path: str) -> Path | None:
    """Find the configuration of the run that trained the model or checkpoint in ``path``; None if no run
    did."""
    model = Path(path).absolute()
    if (model / KEPT).is_file():
        return Path(path) / KEPT
    near = model.parents[:1] if model.name == "model" else []
    for depth in (0, 1):  # in the checkpoint, or in its directory of a critic
        if model.parents[depth].name.startswith("step-"):
            near = model.parents[depth + 2 : depth + 3]
    return next((directory / "config.toml" for directory in near if is_run(directory)), None)


def settings_to_use(file: Path, sources: Sequence[str], kind: Any) -> dict[str, Any]:
    """Extract a run's settings for prompts, sampling, grading and held-out sets, without defaults.

    ``sources``: the data that the model is used with; the run's own if empty. The run's verifier is dropped
    if their ``kind`` (a function of sources) differs from that of the run's data.
    """
    run = load_config(file)
    model = {"path", "gradient_checkpointing", "compile"}
    excluded = {"model": model, "data": {"train"}, "rollout": {"group_size"}}
    sections = {"model", "data", "rollout", "verifier", "eval"}
    tree = run.model_dump(include=sections, exclude=excluded, exclude_defaults=True)
    trained_on = [source.path for source in run.data.train]
    if not sources:
        tree.setdefault("data", {})["train"] = trained_on
    elif kind(*sources) != kind(*trained_on):
        tree.pop("verifier", None)
    return tree
