"""A method of Handrail inside TRL's GRPOTrainer, on the built-in problems that the model cannot solve.

Run: ``python examples/trl_guided.py sort 60``, and ``grpo`` instead of ``sort`` for TRL alone. The first
number counts generations, the second is the seed, and the third is TRL's ``steps_per_generation``;
``accelerate launch`` may start several processes. It prints the mean reward of the first and of the last five
generations.
"""

import os
import re
import sys
from statistics import fmean
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from handrail import load_problems
from handrail.engines.trl import GuidedGRPOTrainer
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    found = [re.search(r"# ([\d ]+)$", text) for text in completions]
    return [float(each is not None and each[1] == right) for each, right in zip(found, answer, strict=True)]


def main(
    method: str = "sort", generations: int = 60, seed: int = 42, updates: int = 1, output: str = "runs/trl"
) -> tuple[float, float]:
    problems = load_problems("task:house-rules?level=hard&house=2&n=4000")
    rows = [
        {"prompt": each.prompt, "answer": each.answer, "reference": each.references[0], "plan": each.plan}
        for each in problems
    ]
    model, tokenizer = load_model(ModelConfig(path="builtin:house-tiny"))
    args = GRPOConfig(
        output, seed=seed, use_cpu=True, bf16=False, max_steps=generations * updates, learning_rate=1e-3,
        adam_beta2=0.99, per_device_train_batch_size=64 // updates // int(os.environ.get("WORLD_SIZE", 1)),
        steps_per_generation=updates, num_generations=8, max_completion_length=48, logging_steps=updates,
        gradient_checkpointing=False, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = GuidedGRPOTrainer(
        model, exact, args, Dataset.from_list(rows), processing_class=tokenizer, method=method
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return fmean(rewards[:5]), fmean(rewards[-5:])


if __name__ == "__main__":
    first, last = main(*sys.argv[1:2], *map(int, sys.argv[2:5]))
    if os.environ.get("RANK", "0") == "0":
        print(f"mean reward of the first five generations {first:.3f}, of the last five {last:.3f}")
