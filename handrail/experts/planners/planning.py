"""Plans for a whole data set, made once and written as data that ``train`` reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from handrail._util import seeds
from handrail._util.errors import UserError
from handrail._util.files import text_of, writable, write_whole
from handrail.experts.planners import Planner, leaks
from handrail.types.problem import Problem

BATCH = 64


def derive(
    problems: Sequence[Problem],
    planner: Planner,
    by: str,
    output: Path,
    progress: Callable[[int, int], None],
    replace: bool = False,
) -> Counter[str]:
    """Write problems with plans to ``output`` (JSONL); count plans, leaks and failures. ``by``: the planner's
    name.

    A problem's own plan is kept; with ``replace``, only if the planner makes none. Plans that this planner
    previously wrote to ``output`` or ``output`` + ``.partial`` are kept too, so that a stopped run continues
    where it left off. Raises UserError if ``output`` contains another planner's plans.
    """
    partial = writable(output).with_name(output.name + ".partial")
    own = {key(problem): problem.plan for problem in problems}
    plans = known(output, by, own) | known(partial, by, own)
    wanted = [problem for problem in problems if replace or not problem.plan]
    todo = [problem for problem in wanted if problem.references and key(problem) not in plans]
    counts = Counter(own=len(problems) - len(wanted), kept=sum(key(problem) in plans for problem in wanted))
    counts["no_reference"] = sum(not problem.references for problem in wanted)
    progress(len(problems) - len(todo), len(problems))
    done = len(problems) - len(todo)
    for batch in batches(todo):
        made = planner.plans(
            [(problem, problem.references[0]) for problem in batch], [seed(problem) for problem in batch]
        )
        # Opened only now, so that a planner that refuses leaves no file behind.
        with partial.open("a", encoding="utf-8") as stream:
            for problem, plan in zip(batch, made, strict=True):
                kind = "no_plan" if plan is None else "leaking" if leaks(plan, problem) else "planned"
                counts[kind] += 1
                if plan and kind == "planned":
                    plans[key(problem)] = plan
                    stream.write(line(problem, plan, by))
        done += len(batch)
        progress(done, len(problems))
    lines = (
        line(problem, plans.get(key(problem)) if replace or not problem.plan else None, by)
        for problem in problems
    )
    write_whole(output, "".join(lines))
    partial.unlink(missing_ok=True)
    return counts


def seed(problem: Problem) -> int:
    """Seed for sampling this problem's plan; always the same."""
    return seeds.derive("plan", problem.prompt, problem.references)


def batches(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    rest = iter(problems)
    while batch := list(islice(rest, BATCH)):
        yield batch


def key(problem: Problem) -> str:
    """Key of a plan: everything it depends on."""
    return json.dumps([problem.prompt, problem.references])


def line(problem: Problem, plan: str | None, by: str) -> str:
    """Serialize a problem as a line of JSONL that loads as the same problem; ``plan``, if any, replaces its
    own.

    Metadata that JSON does not support, such as fractions, becomes text, as it does when sent to a verifier.
    """
    planned = {"plan": plan, "planner": by} if plan else {"plan": problem.plan}
    own = {
        "id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "reference": list(problem.references),
        **planned,
    }
    return (
        json.dumps(
            {**problem.metadata, **{field: value for field, value in own.items() if value}}, default=str
        )
        + "\n"
    )


def known(file: Path, by: str, own: Mapping[str, str | None]) -> dict[str, str]:
    """Read the plans that one planner previously wrote to a file, which may also contain the problems'
    ``own``.

    Raises UserError if the file contains anything else.
    """
    if not file.exists():
        return {}
    plans: dict[str, str] = {}
    for number, text in enumerate(text_of(file, "choose another --output").splitlines(), 1):
        try:
            entry = json.loads(text)
            asked = json.dumps([entry["prompt"], entry.get("reference", [])])
            plan, planner = (entry["answer"] and entry.get("plan")), entry.get("planner")
        except (ValueError, KeyError, TypeError, AttributeError):
            if file.suffix == ".partial":  # a line that was being written when the run died
                continue
            raise UserError(
                f"{file}, line {number}: this is not a problem with a plan; choose another --output"
            ) from None
        if plan and planner == by:
            plans[asked] = plan
        elif plan and plan != own.get(asked):
            raise UserError(f"{file}, line {number}: its plan is not by {by}; choose another --output")
    return plans
