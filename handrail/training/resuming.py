"""Conditions for resuming a run or a measurement: the same settings, and the same contents of what they
name."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.section import flat
from handrail.experts.config import EndpointConfig
from handrail.training.config import Config
from handrail.training.contents import find_changes, may_change, read_object

CONTENTS = "contents.json"
"""File in a run directory with the digests of the contents that the run was made from."""
log = logging.getLogger("handrail")

SHOWN = 3
"""Number of differing settings that are shown with both values."""


def run_directory(config: str | Path) -> Path:
    """Default directory for a run of this file: in ``runs/``, or the file's own directory if a run wrote
    it."""
    file = Path(config)
    return file.parent if written_by_a_run(file) else Path("runs") / file.stem


def compare_directory(config: str | Path) -> Path:
    """Default directory for a comparison of this file; never one that a run of it writes."""
    file = Path(config)
    return Path("runs") / f"compare-{file.absolute().parent.name if written_by_a_run(file) else file.stem}"


def written_by_a_run(file: Path) -> bool:
    return file.name == "config.toml" and file.with_name("metrics.jsonl").exists()


def held_by(directory: Path) -> str | None:
    """What ``handrail`` wrote into a directory: a run, a comparison or a measurement (eval, probe).

    None if it wrote nothing there.
    """
    if (directory / "metrics.jsonl").exists():
        return "a run"
    if any(directory.glob("*/seed-*")):
        return "a comparison"
    return "a measurement" if (directory / "settings.json").exists() else None


def no_run_in(path: Path) -> str:
    """Message if there is no run to resume in ``path``; suggests nearby runs with similar names."""
    runs = [
        str(file.parent)
        for file in [*path.parent.glob("*/metrics.jsonl"), *Path("runs").glob("*/metrics.jsonl")]
    ]
    near = difflib.get_close_matches(str(path), list(dict.fromkeys(runs)), SHOWN, cutoff=0.3)
    hint = f"did you mean --output {' or '.join(near)}? To start one, " if near else "to start one, "
    return f"there is no run in {path} to resume; {hint}leave out --resume"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the settings that differ with both values, as in ``train.seed is 0 there and 5 here``; may be
    empty."""
    there, here = flat(before), flat(now)
    keys = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    shown = [
        f"{key} is {as_text(there.get(key))} there and {as_text(here.get(key))} here" for key in keys[:SHOWN]
    ]
    more = [f"{', '.join(keys[SHOWN:])} differ too"] if keys[SHOWN:] else []
    return ", ".join(shown + more)


def as_text(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


def require_unchanged(directory: Path, now: Mapping[str, str], every: bool = False) -> None:
    """Raise UserError if contents that the run in ``directory`` was made from have changed since it started.

    Changes of what ``may_change`` only cause a warning, unless ``every`` change is an error.
    """
    file = directory / CONTENTS
    before = read_object(file)
    if file.exists() and not before:
        raise UserError(
            f"{file}: it is damaged; restore it from a copy, or delete it to go on without knowing whether "
            "data, models or code have changed"
        )
    found = find_changes(before, now)
    fatal = [key for key in found if every or not may_change(key)]
    if fatal:
        raise UserError(
            f"{directory} was made from other contents of {', '.join(fatal)}, which changed since; "
            "restore them, or choose another --output"
        )
    if found:
        log.warning(
            "%s goes on with other contents of %s, which changed since it began", directory, ", ".join(found)
        )


def what_is_learned(config: Config) -> dict[str, Any]:
    """The configuration without the settings that may change on resumption.

    These are the run's length, its evaluation, book-keeping, batch sizes of computations, how the model is
    sharded, and the address of a server and how it is queried.
    """
    book_keeping = {
        "steps",
        "token_budget",
        "seconds_budget",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "samples_every",
        "max_skipped_updates",
    }
    asking = set(EndpointConfig.model_fields) - {"model"}
    same: dict[str, Any] = {
        "train": {*book_keeping, "micro_batch_tokens", "fsdp"},
        "model": {"gradient_checkpointing", "compile"},
        "rollout": {"batch_size"},
        "sampler": {"cache_gib"},
        "eval": True,
        "compare": True,
        "verifier": {"timeout", "memory_gib", "workers"},
        "endpoint": asking,
    }
    return config.model_dump(exclude=same)
