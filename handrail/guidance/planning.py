"""Plans for a whole data set, derived once and written as data that ``train`` reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from handrail.errors import UserError
from handrail.files import writable, write_whole
from handrail.guidance.planner import Planner, leaks
from handrail.problems import Problem

BATCH = 64


def derive(problems: Sequence[Problem], planner: Planner, output: Path, progress: Callable[[int, int], None]) -> Counter[str]:
    """Writes the problems with a plan each to ``output`` (JSONL) and counts plans, leaks and failures.

    Plans that stand in ``output`` or beside it in ``.partial`` already are kept, so that a stopped run goes on where it was; a
    problem's own plan is kept where the planner has none for it.
    """
    partial = writable(output).with_name(output.name + ".partial")
    plans = known(output) | known(partial)
    todo = [problem for problem in problems if problem.references and key(problem) not in plans]
    counts = Counter(planned=0, kept=sum(key(problem) in plans for problem in problems), leaking=0, no_plan=0, no_reference=0)
    counts["no_reference"] = sum(not problem.references for problem in problems)
    progress(len(problems) - len(todo), len(problems))
    with partial.open("a", encoding="utf-8") as stream:
        for batch in batches(todo):
            for problem, plan in zip(batch, planner.plans([(problem, problem.references[0]) for problem in batch]), strict=True):
                kind = "no_plan" if plan is None else "leaking" if leaks(plan, problem) else "planned"
                counts[kind] += 1
                if kind == "planned":
                    plans[key(problem)] = plan
                    stream.write(line(problem, plan))
            stream.flush()
            progress(len(problems) - len(todo) + sum(counts[kind] for kind in ("planned", "leaking", "no_plan")), len(problems))
    write_whole(output, "".join(line(problem, plans.get(key(problem)) or problem.plan) for problem in problems))
    partial.unlink()
    return counts


def batches(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    rest = iter(problems)
    while batch := list(islice(rest, BATCH)):
        yield batch


def key(problem: Problem) -> str:
    """What a plan depends on."""
    return json.dumps([problem.prompt, problem.references])


def line(problem: Problem, plan: str | None) -> str:
    """The problem as a line of JSONL that is read back as the same problem, with ``plan`` for its own.

    Metadata that JSON does not know, such as fractions, become text, as they do on the way to a verifier.
    """
    own = {"id": problem.id, "prompt": problem.prompt, "answer": problem.answer, "reference": list(problem.references), "plan": plan}
    return json.dumps({**problem.metadata, **{field: value for field, value in own.items() if value}}, default=str) + "\n"


def known(file: Path) -> dict[str, str | None]:
    """The plans in a file that was written before. Raises UserError if it holds anything else."""
    if not file.exists():
        return {}
    plans: dict[str, str | None] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(text)
            asked = json.dumps([entry["prompt"], entry.get("reference", [])])
            if entry.get("plan") and entry["answer"]:
                plans[asked] = entry["plan"]
        except (ValueError, KeyError, AttributeError):
            if file.suffix == ".partial":  # a line that was being written when the run died
                continue
            raise UserError(f"{file}, line {number}: this is no problem with a plan; choose another --output") from None
    return plans
