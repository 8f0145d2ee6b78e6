"""Measure memory and open files of a run of thousands of steps:
``python -m benchmarks.long_run --steps 5000``.

Prints both at every tenth of the run, and their growth from the median of the first half to that of the
second half. The run is LUFFY on the built-in backbone, with evaluations, checkpoints and samples, all in the
process that is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from handrail import train
from handrail.training.config import parse_config


def resident_mib() -> float:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    config = parse_config({
        "model": {"path": "builtin:house-tiny", "device": "cpu"},
        "data": {"train": "task:house-rules?level=hard&house=3&n=512"},
        "eval": {"sets": {"easy": "task:house-rules?level=easy&split=test&n=16"}, "every": 50},
        "verifier": {"name": "exact", "extract": r"# ([\d ]+)$", "workers": 1},
        "rollout": {"max_tokens": 48, "group_size": 4},
        "method": {"name": "luffy"},
        "train": {"steps": steps, "problems_per_step": 4, "learning_rate": 1e-4, "checkpoint_every": 100,
        "samples_every": 20},
    })  # fmt: skip
    memory, files = [], []

    def watch(step: int, total: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        memory.append(resident_mib())
        files.append(len(os.listdir("/proc/self/fd")))
        if step and step % (total // 10) == 0:
            print(f"step {step}: {memory[-1]:.0f} MiB, {files[-1]} open files", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run", progress=watch)
    first, second = slice(steps // 10, steps // 2), slice(steps // 2, None)
    for name, values, unit in (("memory", memory, " MiB"), ("open files", files, "")):
        a, b = median(values[first]), median(values[second])
        print(
            f"{name}: median {a:.0f}{unit} in the first half without its first tenth, {b:.0f}{unit} in the "
            f"second, {b / a - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
