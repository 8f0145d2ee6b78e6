"""Test what the papers of the systems claim, in miniature: ``python -m benchmarks.systems``.

Makes what the comparisons start from (a policy, a teacher, answers of a later checkpoint, wrong labels,
problems that luck can solve), runs the comparisons beside this file, and writes docs/systems-evidence.md from
them. It continues where it was stopped. ``--task hard`` runs one comparison and writes its part of the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks.systems.data import LABELS, LUCK, write_labels, write_luck
from benchmarks.systems.page import PICK, SAMPLES, directories, page, replace_task, seed_of
from handrail.training.config import load_config

HERE = Path(__file__).parent
RUNS = Path("runs/systems")
TASKS = ("signal", "plateau", "luck", "labels", "hard")


def handrail(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, "-m", "handrail.cli", *arguments]).returncode:
        sys.exit(code)


def prepare() -> None:
    """Train policies on more and more references, and a scout; write the data that they make."""
    for name, steps in (("start", 20), ("later", 24), ("half", 40), ("teacher", 140)):
        sets = ["--set", "method.name=sft", "--set", "train.seed=101", "--set", f"train.steps={steps}"]
        train("examples/demo.toml", name, sets)
    longer = ["--set", "train.token_budget=440_000"]
    sets = ["--set", "method.name=grpo", "--set", "train.seed=101", *longer]
    train(str(HERE / "signal.toml"), "scout", sets)
    config = ["--config", str(HERE / "signal.toml")]
    answers = str(RUNS / "answers.jsonl")
    handrail("harvest", str(RUNS / "scout"), LUCK, *config, "--rollouts", "4", "--output", answers)
    half = [str(RUNS / "half/model"), f"labels={LABELS}"]
    handrail("eval", *half, *config, "--samples", "16", "--output", str(RUNS / "attempts"))
    write_labels(RUNS / "attempts/labels.jsonl", RUNS / "labels.jsonl")
    write_luck(RUNS / "luck.jsonl")


def train(config: str, name: str, extra: list[str]) -> None:
    if not (RUNS / name / "summary.json").exists():
        resume = ["--resume"] if (RUNS / name).exists() else []
        handrail("train", config, "--output", str(RUNS / name), "--set", "eval.every=0", *extra, *resume)


def pick() -> None:
    """Sample the held-out problems with what GRPO has trained in *signal*."""
    config = str(HERE / "signal.toml")
    held_out = load_config(HERE / "signal.toml").eval.sets["hard"]
    for run in directories(RUNS / "signal/grpo"):
        output = RUNS / PICK / f"seed-{seed_of(run)}"
        if not (output / "summary.json").exists():
            sampled = ["--samples", str(SAMPLES), "--output", str(output)]
            handrail("eval", str(run / "model"), f"hard={held_out}", "--config", config, *sampled)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=Path("docs/systems-evidence.md"), help="page to write")
    parser.add_argument("--task", choices=(*TASKS, PICK), help="run only this task, and write only its part")
    parser.add_argument("--write-only", action="store_true", help="only write the page from finished runs")
    parser.add_argument("--jobs", default="2", help="runs at a time")
    options = parser.parse_args(arguments)
    tasks = (options.task,) if options.task else (*TASKS, PICK)
    seeds = {task: load_config(HERE / f"{task}.toml").compare.seeds for task in TASKS}
    if not options.write_only:
        RUNS.mkdir(parents=True, exist_ok=True)
        prepare()
        for number in range(max(map(len, seeds.values()))):  # so that a page cut short has all systems
            for task in tasks:
                if task == PICK:
                    pick()
                elif number < len(seeds[task]):
                    some = f"compare.seeds={seeds[task][: number + 1]}"
                    comparison = ["compare", str(HERE / f"{task}.toml"), "--output", str(RUNS / task)]
                    handrail(*comparison, "--jobs", options.jobs, "--set", some)
    claims = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))["claims"]
    planned = {task: len(each) for task, each in seeds.items()}
    text = page(claims, RUNS, {**planned, PICK: planned["signal"]})
    if options.task:
        text = replace_task(options.page.read_text(encoding="utf-8"), text, options.task)
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
