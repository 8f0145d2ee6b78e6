"""Measure how likely a model finds references without a plan and with each planner's:
``python -m benchmarks.plans``.

Prints the mean probability of a token, separately for tokens with a digit and for the others, on the training
problems of a configuration.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from accelerate import Accelerator

from handrail.data.load import load_problems
from handrail.experts.planners import DataPlanner
from handrail.training.config import load_config
from handrail.training.policies import load_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2-gsm.toml"))
    parser.add_argument("-n", type=int, default=64, help="problems, the first ones")
    options = parser.parse_args()
    config = load_config(options.config)
    policy = load_policy(config, Accelerator())
    source = config.data.train[0]
    pairs = [(problem, problem.references[0]) for problem in load_problems(source.path)[: options.n]]
    completions = [policy.renderer.reference(problem, reference) for problem, reference in pairs]
    has_digit = [
        [any(map(str.isdigit, policy.renderer.text([token]))) for token in tokens] for tokens in completions
    ]
    plans: dict[str, list[str | None]] = {"none": [None] * len(pairs)}
    plans |= {"rule": DataPlanner("rule").plans(pairs), "outline": DataPlanner("outline").plans(pairs)}
    for name, made in plans.items():
        prompts = [
            policy.renderer.prompt(problem, plan) for (problem, _), plan in zip(pairs, made, strict=True)
        ]
        found: dict[bool, list[float]] = {True: [], False: []}
        for logp, digits in zip(policy.score(prompts, completions), has_digit, strict=True):
            for p, digit in zip(logp.exp().tolist(), digits, strict=True):
                found[digit].append(p)
        print(f"{name:8} tokens with a digit {mean(found[True]):.2f}, others {mean(found[False]):.2f}")


if __name__ == "__main__":
    main()
