"""Compare the time of a training step in one process, by torchrun and under Ray:
``python -m benchmarks.processes``.

Every process has one thread. The ways take turns, so that a slow minute of the machine slows all of them
down. A figure is the median over the steps of all rounds, without the first two steps of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from handrail.training.metrics import training_seconds

ALONE = (sys.executable, "-m", "handrail", "train")
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone")
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one process": (ALONE, ()),
    "torchrun, 2 processes": ((*LAUNCH, "--nproc-per-node=2", "-m", "handrail", "train"), ()),
    "Ray, 1 worker": (ALONE, ("--ray", "--workers", "1")),
    "Ray, 2 workers": (ALONE, ("--ray", "--workers", "2")),
    "Ray, 1 worker, 1 sampler": (ALONE, ("--ray", "--workers", "1", "--samplers", "1")),
    "the same, staleness 1": (
        ALONE,
        ("--ray", "--workers", "1", "--samplers", "1", "--set", "sampler.staleness=1"),
    ),
    "the same, staleness 4": (
        ALONE,
        ("--ray", "--workers", "1", "--samplers", "1", "--set", "sampler.staleness=4"),
    ),
}
WARM_UP = 2


def seconds_of_steps(run: Path) -> list[float]:
    """Return what each step of a run took, without evaluations and checkpoints."""
    lines = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    return [training_seconds(line) for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="examples/quick.toml")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="a setting, as for train")
    parser.add_argument("--problems", type=int, default=128, help="problems in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))), help="numbers from 0")
    options = parser.parse_args()
    settings = [f"train.problems_per_step={options.problems}", f"train.steps={options.steps}"]
    settings += ["method.name=grpo", "train.checkpoint_every=0", "train.samples_every=0", "eval.every=0"]
    settings += options.settings
    ways = [list(WAYS)[int(number)] for number in options.ways.split(",")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.rounds):
            for way in ways:
                command, extra = WAYS[way]
                run = Path(directory) / f"{ways.index(way)}-{number}"
                sets = [part for setting in settings for part in ("--set", setting)]
                done = subprocess.run(
                    [*command, options.config, "--output", str(run), *sets, *extra],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{way}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
                times[way] += seconds_of_steps(run)[WARM_UP:]
    first = median(times[ways[0]])
    print("| way | seconds a step | times the first row's |\n|---|---|---|")
    for way in ways:
        print(f"| {way} | {median(times[way]):.2f} | {median(times[way]) / first:.2f} |")


if __name__ == "__main__":
    main()
