"""Training and held-out problems of a run, with notes about them for the user."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from handrail._util.errors import UserError
from handrail.data.contamination import overlap
from handrail.data.filter import kept
from handrail.data.load import load
from handrail.training.config import Config
from handrail.training.lengths import TooLong, split_by_length
from handrail.types.problem import Problem

if TYPE_CHECKING:
    from handrail.models.hf import TransformersPolicy


@dataclass(frozen=True)
class RunData:
    """Training problems by source, and held-out problems by the name of their set."""

    sources: list[list[Problem]]
    held_out: dict[str, list[Problem]]
    notes: list[str]
    """Sentences to show before the first step."""
    skipped: dict[str, int]
    """Number of problems left out, as metrics; empty if leaving out problems is not allowed."""

    @property
    def training(self) -> list[Problem]:
        return [problem for source in self.sources for problem in source]


def load_data(config: Config) -> RunData:
    """Load all sources of a configuration. Raises UserError."""
    loaded = {
        path: load(path, config.data.columns)
        for path in [*(each.path for each in config.data.train), *config.eval.sets.values()]
    }
    notes = [each.note for each in loaded.values() if each.note]
    sources = [
        kept(loaded[source.path].problems, source, Path(source.probe))
        if source.probe
        else loaded[source.path].problems
        for source in config.data.train
    ]
    sources = with_distinct_ids(sources, [source.path for source in config.data.train])
    held_out = {name: loaded[path].problems[: config.eval.limit] for name, path in config.eval.sets.items()}
    data = RunData(sources, held_out, notes, {})
    notes += [
        sentence
        for name, test in held_out.items()
        if (sentence := overlap(data.training, test, f"eval.sets.{name}"))
    ]
    return data


def with_distinct_ids(sources: list[list[Problem]], names: list[str]) -> list[list[Problem]]:
    """Prefix every id with its source's name if any two different problems share an id."""
    first: dict[str, Problem] = {}
    if all(first.setdefault(problem.id, problem) == problem for source in sources for problem in source):
        return sources
    return [
        [replace(each, id=f"{name}:{each.id}") for each in source]
        for source, name in zip(sources, names, strict=True)
    ]


def fit(data: RunData, policy: TransformersPolicy, config: Config) -> RunData:
    """Clean the references, and leave out, note and count problems that exceed the model's context, if
    allowed.

    Raises UserError if a problem is unusable.
    """
    setting = config.data.too_long
    data = replace(
        data, sources=[[policy.renderer.clean_references(each) for each in source] for source in data.sources]
    )
    _, long = split_by_length(policy, data.training, setting)
    held_out = {
        name: split_by_length(policy, problems, setting, references=False)
        for name, problems in data.held_out.items()
    }
    gone = {id(each.problem) for each in long}
    sources = [[problem for problem in source if id(problem) not in gone] for source in data.sources]
    if not all(sources):
        empty = sources.index([]) + 1
        raise UserError(
            f"data.train: no problem of source {empty} fits the model's context of {policy.context} tokens"
        )
    skipped = {
        "data/too_long": long,
        **{f"data/too_long/{name}": found for name, (_, found) in held_out.items()},
    }
    return RunData(
        sources,
        {name: problems for name, (problems, _) in held_out.items()},
        data.notes + [_note(name, found) for name, found in skipped.items() if found],
        {name: len(found) for name, found in skipped.items()} if setting == "skip" else {},
    )


def _note(name: str, found: list[TooLong]) -> str:
    held_out = name.removeprefix("data/too_long").removeprefix("/")
    where = f"eval.sets.{held_out}" if held_out else "data.train"
    return f"{len(found)} problems of {where} are too long and left out, first {found[0]}"
