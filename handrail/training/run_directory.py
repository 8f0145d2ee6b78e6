"""Run directory: configuration, versions, metrics, timings, samples, TensorBoard events and the summary."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

from handrail._util.errors import Paused, UserError
from handrail._util.files import locked, no_room, sync, whole_file, write_whole
from handrail._util.version import __version__
from handrail.training.checkpoint import newest_intact
from handrail.training.config import Config, load_config
from handrail.training.resuming import CONTENTS, differences, held_by, no_run_in, what_is_learned

log = logging.getLogger("handrail")


class RunDirectory:
    """Writer of a run directory.

    ``metrics.jsonl`` depends only on the configuration, so identical runs write identical bytes; everything
    measured with a clock goes to ``timings.jsonl``.
    """

    def __init__(self, path: Path, config: Config, resume_from: int | None, writes: bool = True) -> None:
        """``resume_from``: the step to resume after, whose later lines are deleted; None for a new run.

        ``writes``: True in exactly one process; in all others, every method does nothing.
        """
        self.path, self.writes, self.checkpoints = path, writes, path / "checkpoints"
        self.files = [
            path / f"{name}.jsonl" for name in ("metrics", "timings", "samples", "evaluations", "versions")
        ]
        self.metrics, self.timings, self.samples, self.evaluations, self.versions = self.files
        self.optional = [path / f"{name}.jsonl" for name in ("skipped", "labels", "mistakes", "rollbacks")]
        self.skipped, self.labels, self.mistakes, self.rollbacks = self.optional
        if not writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            keep_until(file, resume_from)
        write_whole(
            path / "config.toml", tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"compare"}))
        )
        for file in filter(Path.exists, self.optional):
            keep_until(file, resume_from)
        append(self.versions, {"step": 0 if resume_from is None else resume_from + 1, **versions()})
        self.board = SummaryWriter(
            str(path / "tensorboard"), purge_step=None if resume_from is None else resume_from + 1
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            with suppress(OSError):  # the cause has been reported already
                self.board.close()
                if isinstance(error, UserError | Paused) and not (self.path / "summary.json").exists():
                    write_whole(self.path / "stopped.txt", f"{error}\n")

    @staticmethod
    def claim(path: Path, config: Config, resume: bool) -> None:
        """Raise UserError if a run cannot be written to ``path`` or, with ``resume``, resumed from it."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --output")
        if not (path / "metrics.jsonl").exists():
            if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                if held := held_by(path):
                    raise UserError(
                        f"{path} holds {held}, into which no run can be written; choose another --output"
                    )
                raise UserError(
                    f"{path} has no metrics.jsonl and holds something else; choose another --output"
                )
            if (
                resume and not (path / ".lock").exists()
            ):  # a run killed at its very start leaves only the lock
                raise UserError(no_run_in(path))
            return
        if not resume:
            raise UserError(
                f"{path} already holds a run; continue it with --resume, or choose another --output"
            )
        if not (path / "checkpoints").exists() and (path / "summary.json").exists():
            raise UserError(f"{path} holds a finished run without checkpoints; choose another --output")
        if last_step(path) < 0:  # killed at its very start
            return
        own = path / "config.toml"
        if changed := differences(what_is_learned(load_config(own)), what_is_learned(config)):
            raise UserError(
                f"{path} holds a run of another configuration: {changed}; resume it with its own, {own}, "
                "or choose another --output"
            )

    @classmethod
    @contextmanager
    def lock(cls, path: Path, config: Config, resume: bool) -> Iterator[None]:
        """Keep other runs out, and check again that none took ``path`` meanwhile.

        Raises UserError as ``claim``.
        """
        with locked(path):
            cls.claim(path, config, resume)
            yield

    def log(self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        if not self.writes:
            return
        append(self.metrics, {"step": step, **metrics})
        append(self.timings, {"step": step, **{name: round(value, 4) for name, value in seconds.items()}})
        for name, value in {
            **metrics,
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }.items():
            of_rollouts = name in ("rollouts", "tokens/sampled") or (
                name.startswith("groups/") and name != "groups/all"
            )
            if isinstance(value, int | float) and (metrics.get("rollouts") or not of_rollouts):
                self.board.add_scalar(name, value, step)

    def sample(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            append(self.samples, row)

    def skip(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the batch of a skipped update."""
        for row in rows:
            append(self.skipped, row)

    def label(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the answers of problems that were replaced, and what by."""
        for row in rows:
            append(self.labels, row)

    def write_evaluation(self, step: int, name: str, correct: Mapping[str, float | None]) -> None:
        """Write the share of correct completions of each held-out problem, by id; None without a verdict."""
        if self.writes:
            append(self.evaluations, {"step": step, "set": name, "correct": correct})

    def read(self, file: Path) -> list[dict[str, Any]]:
        if not self.writes:
            return []
        return whole_lines(file)

    def reopen(self) -> None:
        """Delete the files that mark the run as ended, because it is resumed."""
        (self.path / "summary.json").unlink(missing_ok=True)
        (self.path / "stopped.txt").unlink(missing_ok=True)

    def write_contents(self, contents: Mapping[str, str]) -> None:
        if self.writes:
            write_whole(self.path / CONTENTS, json.dumps(contents, indent=1) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def sync(self) -> None:
        """Flush all lines to disk, before the checkpoint that belongs to them is written."""
        for file in filter(Path.exists, [*self.files, *self.optional]):
            sync(file)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose releases may change a figure."""
    packages = (
        "torch",
        "transformers",
        "accelerate",
        "tokenizers",
        "datasets",
        "math-verify",
        "reasoning-gym",
        "numpy",
    )
    return {
        "handrail": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, except a last one that is incomplete because the run died while writing.

    Raises UserError, with the line number, if a row is damaged.
    """
    return [row for _, row in read_lines(file)]


def read_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line as it is written, with its row; see ``whole_lines``."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = dict(json.loads(line))
                row["step"] = int(row["step"])
            except (ValueError, TypeError, KeyError):
                without = ", or delete it to do without that step" if number > 1 else ""
                raise UserError(
                    f"{file}, line {number}: it is damaged; restore it from a copy{without}"
                ) from None
            yield line, row


def last_step(path: Path) -> int:
    """Last step in the metrics of the run in ``path``; -1 if there is none."""
    rows = whole_lines(path / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else -1


def newest_checkpoint(path: Path) -> Path | None:
    """Find the newest intact checkpoint of the run in ``path``; warn and return None if it never wrote one.

    Raises UserError as ``newest_intact``.
    """
    done = last_step(path)
    if done < 0:
        return None
    # Use the run's own checkpoint_every; the configuration of the resumption may differ.
    newest = newest_intact(
        path / "checkpoints", done, load_config(path / "config.toml").train.checkpoint_every
    )
    if newest is None:
        log.warning(
            "%s was stopped after step %d and before its first checkpoint, so it starts again at step 0",
            path,
            done,
        )
    return newest


def keep_until(file: Path, step: int | None) -> None:
    """Delete the rows of steps after ``step``; all rows if it is None.

    That a run went back is kept, because it may since have gone back to a step before that.
    """
    with whole_file(file) as new:
        if step is not None:
            new.writelines(
                line for line, row in read_lines(file) if row["step"] <= step or row.get("to") is not None
            )


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Enclose a block that writes to ``path``: raises Paused if the disk is full, UserError if writing
    fails."""
    before = threading.excepthook
    # TensorBoard's thread fails for the same reason as this one; one message is enough.
    threading.excepthook = lambda thread: None if isinstance(thread.exc_value, OSError) else before(thread)
    try:
        yield
    except (UserError, Paused):
        raise
    except Exception as error:
        if no_room(error):
            raise Paused(
                f"no room left in {path}; its checkpoints are intact: make room, then go on with --resume"
            ) from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        name = getattr(error, "filename", None)
        where = Path(os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ".")
        if not where.is_relative_to(path):
            raise
        if isinstance(error, FileNotFoundError):
            raise UserError(
                f"{where} is gone: {path} was deleted or renamed while it was being written"
            ) from error
        raise UserError(
            f"{where} cannot be written ({getattr(error, 'strerror', error)}); choose another --output"
        ) from error
    finally:
        threading.excepthook = before
