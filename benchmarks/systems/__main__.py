"""Test what the papers of the systems claim, in miniature: ``python -m benchmarks.systems``.

Makes what the comparisons start from (a policy, a teacher, answers of a later checkpoint, wrong labels),
runs the three comparisons beside this file, and writes docs/systems-evidence.md from them. It continues
where it was stopped. Two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks.systems.page import page
from handrail.data.load import load_problems

HERE = Path(__file__).parent
RUNS = Path("runs/systems")
TASKS = ("signal", "labels", "hard")
HARD = "task:house-rules?level=hard&house=2&n="


def handrail(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, "-m", "handrail.cli", *arguments]).returncode:
        sys.exit(code)


def prepare() -> None:
    """Train the policy that knows a little, its teacher and a scout, and keep the scout's right answers."""
    short = ["--set", "train.steps=30"]
    for name, extra in (("start", short), ("teacher", [])):
        sets = ["--set", "method.name=sft", "--set", "train.seed=101", *extra]
        train("examples/demo.toml", name, sets)
    train(str(HERE / "signal.toml"), "scout", ["--set", "method.name=grpo", "--set", "train.seed=101"])
    config = ["--config", str(HERE / "signal.toml"), "--rollouts", "4"]
    handrail("harvest", str(RUNS / "scout"), f"{HARD}480", *config, "--output", str(RUNS / "answers.jsonl"))
    write_labels(RUNS / "labels.jsonl")


def train(config: str, name: str, extra: list[str]) -> None:
    if not (RUNS / name / "summary.json").exists():
        resume = ["--resume"] if (RUNS / name).exists() else []
        handrail("train", config, "--output", str(RUNS / name), "--set", "eval.every=0", *extra, *resume)


def write_labels(file: Path) -> None:
    """Write 160 problems; every third of the first 144 has the answer of the problem after it."""
    problems = load_problems(f"{HARD}160")
    with file.open("w", encoding="utf-8") as stream:
        for place, problem in enumerate(problems):
            wrong = place % 3 == 0 and place < 144
            answer = problems[place + 1].answer if wrong else problem.answer
            row = {"id": problem.id, "prompt": problem.prompt, "answer": answer}
            stream.write(json.dumps(row) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=Path("docs/systems-evidence.md"), help="page to write")
    parser.add_argument("--write-only", action="store_true", help="only write the page from finished runs")
    parser.add_argument("--workers", default="2", help="runs at a time")
    options = parser.parse_args(arguments)
    if not options.write_only:
        RUNS.mkdir(parents=True, exist_ok=True)
        prepare()
        for seeds in ([31], [31, 32], [31, 32, 33]):  # so that a page cut short has all systems
            for task in TASKS:
                comparison = ["compare", str(HERE / f"{task}.toml"), "--output", str(RUNS / task)]
                handrail(*comparison, "--workers", options.workers, "--set", f"compare.seeds={seeds}")
    claims = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))["claims"]
    options.page.write_text(page(claims, RUNS), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
