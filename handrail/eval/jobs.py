"""Plan the runs of a comparison and their directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.names import slug
from handrail.methods import build
from handrail.training.config import Config, load_config, parse_config
from handrail.training.contents import contents
from handrail.training.resuming import differences, held_by, require_unchanged
from handrail.training.run_data import load_data


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    name: str
    seed: int
    config: Config
    directory: Path

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        file = self.directory / "summary.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except ValueError:
            raise UserError(f"{file} is damaged; delete it, and the run writes it again") from None

    @property
    def final_accuracies(self) -> dict[str, dict[str, float | None]]:
        """Map held-out set -> problem -> its share of correct completions in the last evaluation.

        The share is None if the verifier reached no verdict.
        """
        lines = (self.directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        # Later evaluations of a set replace earlier ones.
        return {row["set"]: row.get("correct", row.get("rewards")) for row in map(json.loads, lines)}

    @property
    def config_written(self) -> Config | None:
        """The configuration in the run's directory; None if the run has not started."""
        file = self.directory / "config.toml"
        return load_config(file) if file.exists() else None


def plan_jobs(config: Config, output: Path) -> list[Job]:
    """Return a job for every run and seed.

    Raises UserError if a run's configuration is not valid, or if ``output`` holds another run or comparison.
    """
    if not config.compare.runs:
        raise UserError(
            "the configuration has no [compare.runs], so there is nothing to compare; "
            "list runs there, or use --methods"
        )
    tree = config.model_dump(exclude={"compare"}, exclude_none=True)
    out: list[Job] = []
    for seed in config.compare.seeds:
        for name, changes in config.compare.runs.items():
            changed = runnable(
                merged(merged(tree, changes), {"train": {"seed": seed}}), f"compare.runs.{name}"
            )
            if not slug(name):
                raise UserError(
                    f"compare.runs: {name!r} has no letter or digit to call a directory by; rename this run"
                )
            job = Job(name, seed, changed, output / slug(name) / f"seed-{seed}")
            if any(other.directory == job.directory for other in out):
                raise UserError(
                    f"compare: two runs would be written into {job.directory}; "
                    "rename one, or list each seed once"
                )
            out.append(job)
    if (held := held_by(output)) not in (None, "a comparison"):
        raise UserError(
            f"{output} holds {held}, into which no comparison can be written; choose another --output"
        )
    for job in out:
        there = job.config_written
        if there and (other := differences(there.model_dump(), job.config.model_dump())):
            raise UserError(
                f"{job.directory} holds a run of another configuration: {other}; choose another --output"
            )
    return out


def require_finished_unchanged(planned: Sequence[Job]) -> None:
    """Raise UserError if data, a model or the user's code have changed since one of the runs finished."""
    found: dict[str, dict[str, str]] = {}
    for job in planned:
        if job.summary is None:
            continue
        key = job.config.model_dump_json(include={"data", "model", "eval", "experts", "verifier", "method"})
        if key not in found:
            found[key] = loaded_contents(job.config)
        require_unchanged(job.directory, found[key], every=True)


def loaded_contents(config: Config) -> dict[str, str]:
    """Load the data of ``config`` and return the digests of what it names."""
    data = load_data(config)
    return contents(config, data.sources, data.held_out)


def runnable(tree: dict[str, Any], where: str) -> Config:
    """Parse the configuration ``tree``, including its method's settings.

    Raises UserError, naming ``where``, if it is not valid.
    """
    config = parse_config(tree, where)
    try:
        build(config.method, config.rollout)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def listed(option: str, text: str) -> list[str]:
    """Split the ``text`` of an ``option`` at its commas. Raises UserError for an empty or repeated name."""
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"{option} {text}: a name is empty; put one comma between two names")
    require_distinct(option, names)
    return names


def require_distinct(option: str, names: Sequence[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UserError(f"{option}: {twice} is named twice; leave one of them out")


def choose(config: Config, texts: Sequence[str]) -> Config:
    """Return ``config`` with only the runs that ``texts`` name: each is one name, or several with commas.

    Raises UserError if there is no run of a name, or if one is named twice.
    """
    known = config.compare.runs
    names = [name for text in texts for name in ([text] if text in known else listed("--runs", text))]
    require_distinct("--runs", names)
    for name in names:
        if name not in config.compare.runs:
            raise UserError(
                f"--runs: [compare.runs] has no {name!r}; there are: {', '.join(config.compare.runs)}"
            )
    runs = {name: config.compare.runs[name] for name in names}
    return config.model_copy(update={"compare": config.compare.model_copy(update={"runs": runs})})


def by_methods(config: Config, names: list[str]) -> Config:
    """Return ``config`` with a run for each of these methods.

    The method that ``config`` itself configures keeps its settings; the others have their defaults.
    """
    own = config.method
    runs = {
        name: {} if own.get("name", "grpo").lower() == name.lower() else {"method": {"name": name}}
        for name in names
    }
    return config.model_copy(update={"compare": config.compare.model_copy(update={"runs": runs})})


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tree`` overridden by ``changes``, with tables merged key by key.

    If ``changes`` name a method, its table replaces the method of ``tree`` completely.
    """
    out = dict(tree)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        other_method = both_tables and key == "method" and "name" in value
        out[key] = merged(out[key], value) if both_tables and not other_method else value
    return out
