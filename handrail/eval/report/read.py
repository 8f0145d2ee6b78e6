"""Read the directory of a run or a comparison for the report, whether finished or not."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.names import slug

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The files that a run has written so far."""

    name: str
    seed: int
    directory: Path

    @cached_property
    def metrics(self) -> list[Row]:
        """The lines of metrics.jsonl, from step 0."""
        return list(rows(self.directory / "metrics.jsonl"))

    @cached_property
    def versions(self) -> list[Row]:
        return list(rows(self.directory / "versions.jsonl"))

    @cached_property
    def summary(self) -> Row | None:
        """The run's summary; None if the run is not finished."""
        return json_object(self.directory / "summary.json")

    @cached_property
    def config_text(self) -> str:
        return read_text(self.directory / "config.toml")

    @cached_property
    def config(self) -> Row:
        """The resolved configuration, not validated, so that runs of other releases can be shown too."""
        try:
            return tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def steps(self) -> list[Row]:
        """The metrics of the training steps, without step 0."""
        return [row for row in self.metrics if row["step"] > 0]


@dataclass(frozen=True)
class Results:
    """Runs, ordered by method and seed, and the comparison's summary if there is one."""

    title: str
    runs: list[Run]
    summary: Row

    @property
    def methods(self) -> dict[str, list[Run]]:
        """The runs by the name of their method."""
        names = dict.fromkeys(run.name for run in self.runs)
        return {name: [run for run in self.runs if run.name == name] for name in names}

    @property
    def sets(self) -> list[str]:
        """The held-out sets that were evaluated."""
        keys = (key for run in self.runs for row in run.metrics for key in row)
        return list(dict.fromkeys(found[1] for key in keys if (found := re.fullmatch("eval/(.+)/mean", key))))


def read(directory: Path) -> Results:
    """Read a run or a comparison. Raises UserError if ``directory`` holds neither."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: there is no such directory; give one that handrail train or handrail compare wrote"
        )
    title = directory.resolve().name
    if (directory / "metrics.jsonl").exists():
        return Results(title, [single(directory)], {})
    found = [
        path
        for path in directory.glob("*/seed-*")
        if re.fullmatch(r"seed--?\d+", path.name) and (path / "metrics.jsonl").exists()
    ]
    if not found:
        raise UserError(
            f"{directory} holds neither a run (metrics.jsonl) nor a comparison (NAME/seed-N/metrics.jsonl); "
            "give a directory that handrail train or handrail compare wrote"
        )
    summary = json_object(directory / "summary.json") or {}
    names = {
        slug(name): name for name in summary.get("methods", {})
    }  # the directories of an unfinished comparison have slugs only
    runs = [
        Run(names.get(path.parent.name, path.parent.name), int(path.name.removeprefix("seed-")), path)
        for path in found
    ]
    order = [*names.values(), *sorted({run.name for run in runs} - {*names.values()})]
    return Results(title, sorted(runs, key=lambda run: (order.index(run.name), run.seed)), summary)


def single(directory: Path) -> Run:
    """Return a single run, named after its method."""
    config = Run("", 0, directory).config
    return Run(
        config.get("method", {}).get("name") or "grpo", config.get("train", {}).get("seed", 0), directory
    )


def rows(file: Path) -> Iterator[Row]:
    """Yield the lines of a JSONL file up to the first incomplete one; nothing if the file does not exist."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = parse(line)
            except json.JSONDecodeError:
                return
            if not isinstance(row, dict) or "step" not in row:
                return
            yield row


def json_object(file: Path) -> Row | None:
    try:
        found = parse(read_text(file))
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def parse(text: str) -> Any:
    """Parse JSON, with None for NaN and infinities, which Python writes but JSON does not have."""
    return json.loads(text, parse_constant=lambda name: None)


def read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
