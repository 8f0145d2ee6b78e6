"""The page docs/systems-evidence.md, from the comparisons' runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.suite.claims import Row
from benchmarks.systems.data import replaced_labels
from handrail._util.names import slug
from handrail.eval.attempts import read_attempts
from handrail.eval.differences import Difference, Rewards, over_seeds, paired
from handrail.eval.estimators import maj_at_k, pick_at_k, votes

BASE = "GRPO"
PICK = "pick"
SAMPLES = 8
HEAD = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")


def page(claims: Sequence[dict[str, Any]], runs: Path, seeds: Mapping[str, int]) -> str:
    """Return the page. ``seeds``: number of planned seeds by task.

    A claim without finished runs is marked as not measured.
    """
    parts = [HEAD]
    for task in dict.fromkeys(claim["task"] for claim in claims):
        here = [claim for claim in claims if claim["task"] == task]
        parts.append(f"## {task}")
        if task != PICK:
            parts.append(table(task, list(dict.fromkeys(claim["run"] for claim in here)), runs))
        parts += [section(claim, runs / task, seeds[task]) for claim in here]
    return "\n".join(parts)


def replace_task(old: str, new: str, task: str) -> str:
    """Return the page ``old`` with its head and the part of one task taken from the page ``new``."""
    theirs, ours = (
        {part.partition("\n")[0]: part for part in re.split("(?m)^(?=## )", text)} for text in (old, new)
    )
    taken = {heading: ours[heading] for heading in (next(iter(ours)), f"## {task}")}
    return "".join({**theirs, **taken}.values())


def directories(run: Path) -> list[Path]:
    """The finished seeds of a run."""
    return sorted(each.parent for each in run.glob("seed-*/summary.json"))


def seed_of(directory: Path) -> int:
    return int(directory.name.removeprefix("seed-"))


def rewards(run: Path, held_out: str) -> Rewards:
    """Map seed -> problem -> its share of correct completions after training."""
    out = {}
    for directory in directories(run):
        rows = map(json.loads, (directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines())
        last = {row["set"]: row.get("correct", row.get("rewards")) for row in rows}
        out[seed_of(directory)] = last[held_out]
    return out


def mean(run: Path, key: str) -> float | None:
    """Mean over seeds of a figure of the runs' summaries."""
    found = [json.loads((each / "summary.json").read_text()).get(key) for each in directories(run)]
    values = [value for value in found if value is not None]
    return fmean(values) if values else None


def table(task: str, names: Sequence[str], runs: Path) -> str:
    lines = [
        "| run | hard | easy | tokens sampled | steps | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in (BASE, *names):
        run = runs / task / slug(name)
        if not directories(run):
            continue
        found = {held_out: rewards(run, held_out) for held_out in ("hard", "easy")}
        cells = [
            f"{100 * fmean(fmean(each.values()) for each in found[held_out].values()):.1f}"
            for held_out in ("hard", "easy")
        ]
        cells += [f"{mean(run, key) or 0:,.0f}" for key in ("tokens_sampled", "steps")]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(directories(run))} |")
    return "\n".join(lines) + "\n"


# What a claim is about, by its measure: a difference over seeds; None without a common seed


def accuracy(task: Path, run: str) -> Difference | None:
    ours, theirs = (rewards(task / slug(name), "hard") for name in (run, BASE))
    return paired("hard", run, BASE, ours, theirs) if ours.keys() & theirs.keys() else None


def entropy(task: Path, run: str) -> Difference | None:
    """Entropy of the rollouts' tokens in the last tenth of the steps."""

    def at_the_end(name: str) -> dict[int, float]:
        out = {}
        for directory in directories(task / slug(name)):
            lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
            last = lines[-max(1, len(lines) // 10) :]
            out[seed_of(directory)] = fmean(json.loads(line)["entropy"] for line in last)
        return out

    ours, theirs = at_the_end(run), at_the_end(BASE)
    return over_seeds("entropy", run, BASE, ours, theirs) if ours.keys() & theirs.keys() else None


def labels(task: Path, run: str) -> Difference | None:
    """Right answers among those that replaced a label, against these labels."""
    found = {seed_of(each): replaced_labels(each / "labels.jsonl") for each in directories(task / slug(run))}
    known = {seed: shares for seed, shares in found.items() if shares}
    ours, theirs = ({seed: shares[side] for seed, shares in known.items()} for side in (0, 1))
    return over_seeds("labels", run, "data", ours, theirs) if known else None


def pick(task: Path, run: str) -> Difference | None:
    """The answer of least free energy against the most frequent one, among the same completions."""
    ours: dict[int, dict[str, float]] = {}
    theirs: dict[int, dict[str, float]] = {}
    for directory in directories(task):
        seed = seed_of(directory)
        ours[seed], theirs[seed] = {}, {}
        for each in read_attempts(directory / "hard.jsonl"):
            ordered = sorted(each.attempts, key=lambda one: inf if one.energy is None else one.energy)
            right = [attempt.correct is True for attempt in ordered]
            ours[seed][each.id] = pick_at_k(right, SAMPLES)
            answers = votes([attempt.answer for attempt in ordered], [float(one) for one in right])
            theirs[seed][each.id] = maj_at_k(*answers, SAMPLES)
    return paired("hard", f"pick@{SAMPLES}", f"maj@{SAMPLES}", ours, theirs) if ours else None


@dataclass(frozen=True)
class Measure:
    unit: str
    """What a hundredth of the figure is called."""
    difference: Callable[[Path, str], Difference | None]


MEASURES = {
    "accuracy": Measure("points", accuracy),
    "entropy": Measure("hundredths of a nat per token", entropy),
    "labels": Measure("points", labels),
    PICK: Measure("points", pick),
}


def section(claim: dict[str, Any], task: Path, seeds: int) -> str:
    """A claim, what was expected, and what was found."""
    parts = [f"### {claim['run']}: {claim['says']}", f"Expected: {claim['expected']}."]
    measure = MEASURES[claim.get("measure", "accuracy")]
    found = measure.difference(task, claim["run"])
    if found:
        per_seed = ", ".join(f"{100 * each:+.1f}" for each in found.per_seed)
        figures = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        count = len(found.per_seed)
        answer = Row(claim["task"], found).answer
        said = f"**{answer}**" if count >= seeds else f"no answer yet, with {count} of {seeds} seeds"
        parts.append(f"Found: {said}; {figures} {measure.unit}; per seed {per_seed}.")
    else:
        parts.append("Not measured yet.")
    if note := claim.get("note"):
        parts.append(note)
    return "\n\n".join(parts) + "\n"
