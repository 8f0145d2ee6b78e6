"""The page docs/systems-evidence.md, from the comparisons' runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.suite.claims import Row
from handrail._util.names import slug
from handrail.eval.differences import Rewards, paired

BASE = "GRPO"
SEEDS = 3
HEAD = """# What the systems do in miniature

No figure on this page was typed. `python -m benchmarks.systems` trains everything in about two hours on
two CPU cores and writes this page. The tasks are in `benchmarks/systems/`:

- **hard**: the problems of the demo, which the built-in model cannot solve. All runs sample 400,000
  tokens.
- **signal**: the same problems, starting from a policy that solves one in seven (30 steps of SFT). All
  runs sample 110,000 tokens. The teacher is the same model after 140 steps of SFT. NPO's answers are
  those of a GRPO run from the same start.
- **labels**: the same start, 160 problems, three in ten with the answer of another problem. All runs take
  100 steps, ten passes over the data.

Sampled tokens include all that a method samples beside its rollouts: continuations, probes, repairs.
Every setting is the default or, for judges and correctors, `reference`; STRIDE starts in step 12 instead
of 52. The seeds 31, 32 and 33 chose nothing. The expectations were written down before the runs.

A claim *holds* if the 95 % interval of its difference to GRPO on hard held-out problems lies above zero,
*fails* if it lies at or below zero, and is *undecided* otherwise. An interval is the wider of a bootstrap
over problems and Student's over seeds, and with so few seeds it is wide. There is no answer before all
three seeds have run. Accuracies are in per cent, means over seeds.
"""


def page(claims: Sequence[dict[str, Any]], runs: Path) -> str:
    """Return the page. A claim without finished runs is marked as not measured."""
    parts = [HEAD]
    for task in dict.fromkeys(claim["task"] for claim in claims):
        here = [claim for claim in claims if claim["task"] == task]
        parts += [f"## {task}", table(task, [claim["run"] for claim in here], runs)]
        parts += [section(claim, runs / task) for claim in here]
    return "\n".join(parts)


def directories(run: Path) -> list[Path]:
    """The finished seeds of a run."""
    return sorted(each.parent for each in run.glob("seed-*/summary.json"))


def rewards(run: Path, held_out: str) -> Rewards:
    """Map seed -> problem -> its share of correct completions after training."""
    out = {}
    for directory in directories(run):
        rows = map(json.loads, (directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines())
        last = {row["set"]: row.get("correct", row.get("rewards")) for row in rows}
        out[int(directory.name.removeprefix("seed-"))] = last[held_out]
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


def section(claim: dict[str, Any], task: Path) -> str:
    """A claim, what was expected, and what was found."""
    parts = [f"### {claim['run']}: {claim['says']}", f"Expected: {claim['expected']}."]
    ours, theirs = (rewards(task / slug(name), "hard") for name in (claim["run"], BASE))
    if ours.keys() & theirs.keys():
        row = Row(claim["task"], paired("hard", claim["run"], BASE, ours, theirs))
        found = row.difference
        seeds = ", ".join(f"{100 * each:+.1f}" for each in found.per_seed)
        figures = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        count = len(found.per_seed)
        answer = f"**{row.answer}**" if count >= SEEDS else f"no answer yet, with {count} of {SEEDS} seeds"
        parts.append(f"Found: {answer}; {figures} points; per seed {seeds}.")
    else:
        parts.append("Not measured yet.")
    if note := claim.get("note"):
        parts.append(note)
    return "\n\n".join(parts) + "\n"
