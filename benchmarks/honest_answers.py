"""Count the correct answers that a verifier refuses:
``python -m benchmarks.honest_answers FILE... --verifier math``.

FILE is a JSONL file of a public benchmark. Each row has an ``answer``, or a worked ``solution`` (also
``steps``, ``cot``) with the answer in a box, or both. GSM8K's ``answer`` ends in ``#### N``. Three
completions are graded: the answer itself in a box; the solution, if there is one; and, as a near miss that
must not be paid, the answer of the previous row, if it differs. Prints one line per file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from handrail.types.problem import Problem
from handrail.verifiers.answer_text import boxes, last_joined, marked, plain
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

SOLUTIONS = ("solution", "steps", "cot", "response")
ANSWERS = ("final_answer", "answer", "gt")


def rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """Return the answer and the worked solution of every row that has an answer."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer, solution = _first(row, ANSWERS), _first(row, SOLUTIONS)
        if answer and (mark := marked(answer)):
            answer, solution = mark.strip(), answer
        if not answer and solution and (spans := boxes(solution)):
            answer = last_joined(solution, spans)
        if answer and plain(answer):
            yield answer, solution


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((row[name] for name in names if row.get(name) is not None), None)
    return ", ".join(map(str, found)) if isinstance(found, list) else found if found is None else str(found)


def measure(path: Path, pool: VerifierPool) -> str:
    found = list(rows(path))
    problems = [Problem(str(index), "?", answer) for index, (answer, _) in enumerate(found)]
    boxed = [(problem, rf"\boxed{{{problem.answer}}}") for problem in problems]
    solved = [(problem, solution) for problem, (_, solution) in zip(problems, found, strict=True) if solution]
    others = [
        (problem, rf"\boxed{{{before.answer}}}")
        for before, problem in zip(problems, problems[1:], strict=False)
        if plain(before.answer) != plain(problem.answer)
    ]
    refused = {
        name: sum(verdict.reward < 1 for verdict in pool.grade(asked))
        for name, asked in (("box", boxed), ("solution", solved))
    }
    paid = sum(verdict.reward == 1 for verdict in pool.grade(others))
    return (
        f"{path.name}: refused {refused['box']} of {len(boxed)} answers in a box, {refused['solution']} of "
        f"{len(solved)} solutions; "
        f"paid {paid} of {len(others)} answers to other problems"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--verifier", default="math")
    options = parser.parse_args()
    with VerifierPool(VerifierConfig(name=options.verifier, timeout=10)) as pool:
        for path in options.files:
            print(measure(path, pool), flush=True)


if __name__ == "__main__":
    main()
