"""What a run leaves behind: configuration, versions, metrics, timings, samples, TensorBoard events and the summary."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from handrail import __version__
from handrail.config import Config, EndpointConfig, load_config
from handrail.errors import UserError


class RunDirectory:
    """``metrics.jsonl`` holds only what is a function of the configuration, so that two equal runs write equal bytes;
    what the clock says stands in ``timings.jsonl``."""

    def __init__(self, path: Path, config: Config, resume_from: int | None, writes: bool = True) -> None:
        """``resume_from`` is the step after which to go on; lines of later steps are cut off. None starts anew.

        Of several processes one ``writes``; for the others every method does nothing.
        """
        self.path, self.writes = path, writes
        self.metrics, self.timings, self.samples, self.evaluations, self.versions = (
            path / f"{name}.jsonl" for name in ("metrics", "timings", "samples", "evaluations", "versions")
        )
        if not writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(tomli_w.dumps(config.model_dump(exclude_none=True)), encoding="utf-8")
        for file in (self.metrics, self.timings, self.samples, self.evaluations, self.versions):
            keep_until(file, resume_from)
        append(self.versions, {"step": 0 if resume_from is None else resume_from + 1, **versions()})
        self.board = SummaryWriter(str(path / "tensorboard"), purge_step=None if resume_from is None else resume_from + 1)

    @staticmethod
    def claim(path: Path, config: Config, resume: bool) -> None:
        """Raises UserError if ``path`` is no directory, or holds a run that is not to be resumed."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --output")
        if not (path / "metrics.jsonl").exists():
            return
        if not resume:
            raise UserError(f"{path} already holds a run; continue it with --resume, or choose another --output")
        if not (path / "checkpoints").exists() and (path / "summary.json").exists():
            raise UserError(f"{path} holds a finished run without checkpoints; choose another --output")
        if what_is_learnt(load_config(path / "config.toml")) != what_is_learnt(config):
            raise UserError(f"{path} holds a run of another configuration; resume it with its own, or choose another --output")

    def log(self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        if not self.writes:
            return
        append(self.metrics, {"step": step, **metrics})
        append(self.timings, {"step": step, **{name: round(value, 4) for name, value in seconds.items()}})
        for name, value in {**metrics, **{f"seconds/{name}": value for name, value in seconds.items()}}.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def sample(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            append(self.samples, row)

    def evaluated(self, step: int, name: str, rewards: Mapping[str, float]) -> None:
        """The mean reward of every problem of a held-out set, by its id."""
        if self.writes:
            append(self.evaluations, {"step": step, "set": name, "rewards": rewards})

    def read(self, file: Path) -> list[dict[str, Any]]:
        if not self.writes:
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self.board.close()
        (self.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def what_is_learnt(config: Config) -> dict[str, Any]:
    """The configuration without what may change between a run and its resumption: its length, evaluation, book-keeping, and where
    and how a server is asked."""
    book_keeping = {"steps", "token_budget", "seconds_budget", "checkpoint_every", "keep_checkpoints", "samples_every"}
    asking = set(EndpointConfig.model_fields) - {"model"}
    same: dict[str, Any] = {"train": book_keeping, "eval": True, "compare": True, "verifier": {"timeout", "workers"}, "endpoint": asking}
    return config.model_dump(exclude=same)


def versions() -> dict[str, str]:
    """What computes: Python and the packages whose releases may change a figure."""
    packages = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "math-verify", "reasoning-gym", "numpy")
    return {"handrail": __version__, "python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def keep_until(file: Path, step: int | None) -> None:
    """Keeps the lines of steps up to ``step``; a line that was being written when the run died goes too."""
    if step is None or not file.exists():
        file.write_text("")
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    file.write_text("".join(kept), encoding="utf-8")
