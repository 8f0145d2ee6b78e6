"""Training problems of the tasks *labels* and *luck*."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from handrail.data.load import load_problems
from handrail.eval.attempts import read_attempts

HARD = "task:house-rules?level=hard&house=2&n="
LABELS = f"{HARD}96"
LUCK = f"{HARD}480"


def write_labels(attempts: Path, file: Path) -> None:
    """Write problems of which every other one has the wrong answer that the policy gives most often."""
    tried = {each.id: each.attempts for each in read_attempts(attempts)}
    with file.open("w", encoding="utf-8") as stream:
        for place, problem in enumerate(load_problems(LABELS)):
            wrong = Counter(each.answer for each in tried[problem.id] if not each.correct and each.answer)
            (answer, _), *_ = wrong.most_common(1) if place % 2 and wrong else [(problem.answer, 0)]
            stream.write(json.dumps({"id": problem.id, "prompt": problem.prompt, "answer": answer}) + "\n")


def write_luck(file: Path) -> None:
    """Write problems whose answer is only the last digit of the last value."""
    with file.open("w", encoding="utf-8") as stream:
        for problem in load_problems(LUCK):
            row = {"id": problem.id, "prompt": problem.prompt, "answer": problem.answer[-1]}
            stream.write(json.dumps({**row, "reference": problem.references[0]}) + "\n")


def replaced_labels(file: Path) -> tuple[float, float] | None:
    """Share of right answers among those that a run put in place of the labels, and among these labels.

    ``file`` is the run's labels.jsonl; of a problem that was changed in several passes, the last one counts.
    """
    if not file.exists():  # nothing was replaced
        return None
    rows = {row["problem"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    true = {problem.id: problem.answer for problem in load_problems(LABELS)}
    new, given = (sum(row[key] == true[name] for name, row in rows.items()) for key in ("answer", "given"))
    return new / len(rows), given / len(rows)
