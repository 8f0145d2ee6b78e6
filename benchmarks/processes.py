"""Compare the time of a training step in one process, by torchrun and under Ray:
``python -m benchmarks.processes``.

Every process has one thread. The ways take turns, so that a slow minute of the machine slows all of them
down. Seconds are medians over the steps of all rounds, without the first two steps of each run. If the
sampler differs from the trainer, the last columns are the importance weights of the same steps: their mean,
the largest one, and the share of tokens whose weight is capped.
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
from statistics import fmean, median
from typing import Any

import tomli_w
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
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
ODD = '''"""What a random model can learn: a reward between 0 and 1 for every completion."""
def reward(problem, completion):
    return sum(letter in "13579" for letter in completion) / max(1, len(completion))
'''


def write_vllm_job(directory: Path) -> Path:
    """Write the configuration of a run with vLLM in which sampling takes longer than the update: few and
    long completions of a random model of 23M weights. Return its file."""
    tokenizer = load_model(ModelConfig(path="builtin:house-tiny", device="cpu"))[1]
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "odd.py").write_text(ODD)
    tree = {
        "model": {"path": str(directory / "model"), "device": "cpu"},
        "data": {"train": "task:house-rules"},
        "verifier": {"name": f"{directory / 'odd.py'}:reward", "workers": 1},
        "rollout": {"group_size": 4, "max_tokens": 128, "require_end": False},
        "sampler": {"name": "vllm", "cache_gib": 0.5},
        "train": {"learning_rate": 1e-4},
    }
    (directory / "config.toml").write_text(tomli_w.dumps(tree))
    return directory / "config.toml"


def later_steps(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines that ``name``.jsonl has for the steps after those that warm up."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()][1 + WARM_UP :]


def importance(steps: list[dict[str, Any]]) -> str:
    """Return the last columns of a row; steps in which nothing was trained have no importance weights."""
    mean, largest, capped = (
        [step[f"importance/{name}"] for step in steps if f"importance/{name}" in step]
        for name in ("mean", "max", "capped")
    )
    return f"{fmean(mean):.3f} | {max(largest):.2f} | {fmean(capped):.2%}" if mean else "| |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="examples/quick.toml")
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM, a random model for --config's")
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
    metrics: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        config = write_vllm_job(Path(directory)) if options.vllm else options.config
        for number in range(options.rounds):
            for way in ways:
                command, extra = WAYS[way]
                run = Path(directory) / f"{ways.index(way)}-{number}"
                sets = [part for setting in settings for part in ("--set", setting)]
                done = subprocess.run(
                    [*command, str(config), "--output", str(run), *sets, *extra],
                    env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{way}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
                times[way] += map(training_seconds, later_steps(run, "timings"))
                metrics[way] += later_steps(run, "metrics")
    first = median(times[ways[0]])
    print("| way | seconds a step | times the first row's | mean weight | largest | capped |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        seconds = median(times[way])
        print(f"| {way} | {seconds:.2f} | {seconds / first:.2f} | {importance(metrics[way])} |")


if __name__ == "__main__":
    main()
