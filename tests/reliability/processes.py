"""Real ``handrail`` processes: started, watched from outside, and compared by the files that they leave."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from tests.conftest import EASY, HARD, config
from tests.forks import Fork

PROMISED = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
"""Files that are equal, to the byte, in a run that was stopped and one that was not."""


def job(directory: Path, **changes: Any) -> Path:
    """Write the configuration of a run of a few seconds that makes a checkpoint after every step."""
    train = {
        "steps": 8,
        "checkpoint_every": 1,
        "samples_every": 2,
        "schedule": "cosine",
        "updates_per_step": 2,
        **changes.pop("train", {}),
    }
    evaluation = {"sets": {"easy": f"{EASY}&split=test&n=8"}, "every": 3}
    changes = {"method": {"name": "luffy"}, "data": {"train": f"{HARD}&n=64"}, **changes}
    settings = config(train=train, eval=evaluation, **changes)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "job.toml"
    file.write_text(tomli_w.dumps(settings.model_dump(exclude_none=True, exclude_defaults=True)))
    return file


def start(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``handrail ARGUMENTS`` as a shell does; ``tests.forks.start`` saves the imports."""
    return subprocess.Popen(
        [sys.executable, "-m", "handrail.cli", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}), start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str] | Fork, seconds: float = 120) -> tuple[int, str]:
    """Return (exit code, all output)."""
    said = process.communicate(timeout=seconds)[0]
    return process.wait(), said


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def steps(directory: Path) -> int:
    """Number of lines in metrics.jsonl."""
    file = directory / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def left_behind(directory: Path) -> dict[str, str]:
    """Return checksums of the promised files and the weights, and the summary without its seconds."""
    files = [directory / name for name in PROMISED] + sorted((directory / "model").glob("*.safetensors"))
    summary = json.loads((directory / "summary.json").read_text())
    del summary["seconds"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} | {
        "summary": json.dumps(summary)
    }
