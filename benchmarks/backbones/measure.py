"""Measure what a backbone can do before any training, and so whether the demo can show anything."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from accelerate import Accelerator

from benchmarks.backbones.make_prm import KINDS, draw, first_wrong
from handrail.data.config import DataConfig, Source
from handrail.data.load import load_problems
from handrail.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN, TASKS, structure
from handrail.data.tasks.house_rules import derivation_is_right
from handrail.engines.local import LocalEngine
from handrail.experts.judges import first_error
from handrail.experts.judges.prm import PrmJudge
from handrail.experts.steps import split_steps
from handrail.models.builtin import locate
from handrail.models.config import ModelConfig, RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.training.config import Config
from handrail.training.evaluate import Accuracy, evaluate
from handrail.training.policies import load_policy
from handrail.types.problem import Problem
from handrail.types.trajectory import Group
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool

GROUP_SIZE = 8
BENCHMARKS = {"easy": "task:house-rules?level=easy", "hard": "task:house-rules?level=hard"} | {
    name: source
    for name, source in (IN_DOMAIN | OUT_OF_DOMAIN).items()
    if not source.startswith("task:house-rules")
}


def measure(model: str, n: int) -> Iterator[str]:
    """Return, in lines, what ``model``, a policy or a process reward model, can do."""
    config = Path(locate(model)) / "config.json"
    is_prm = config.is_file() and "RewardModel" in config.read_text(encoding="utf-8")
    return measure_prm(model, n) if is_prm else measure_policy(model, n)


def measure_policy(model: str, n: int) -> Iterator[str]:
    """Measure a policy on every benchmark whose words it knows.

    For each: accuracy on ``n`` held-out problems (or all, if there are fewer), groups all wrong, completions
    that are rewarded although their derivation is wrong, and how a plan changes the probability of a
    reference's words.
    """
    config = Config(
        model=ModelConfig(path=model), data=DataConfig(train=[Source(path="task:house-rules")]),
        verifier=VerifierConfig(name="task"), rollout=RolloutConfig(max_tokens=48),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    with VerifierPool(config.verifier) as verifier:
        engine = LocalEngine(policy := load_policy(config, accelerator), verifier)
        for name, source in BENCHMARKS.items():
            problems = held_out(source, n)
            if policy.tokenizer.unk_token_id not in policy.tokenizer.encode(problems[0].prompt):
                yield from _lines(name, evaluate(engine, accelerator, problems, GROUP_SIZE, name))
                yield _plan_line(policy, problems)


def held_out(source: str, n: int) -> list[Problem]:
    """Return ``n`` held-out problems of a task, or all if there are fewer."""
    name = source.removeprefix("task:").partition("?")[0]
    most = TASKS[name].ranges({"split": "test", "house": 6})["n"][-1]
    return load_problems(f"{source}{'&' if '?' in source else '?'}split=test&n={min(n, most)}")


def _plan_line(policy: TransformersPolicy, problems: list[Problem]) -> str:
    """Return a line with the geometric mean probabilities of structure words and of the other words, without
    and with the plan."""
    completions = [policy.renderer.completion(problem.references[0], end=False) for problem in problems]
    shares = []
    for planned in (False, True):
        prompts = [policy.renderer.prompt(problem, problem.plan if planned else None) for problem in problems]
        logp = [value for row in policy.score(prompts, completions) for value in row.tolist()]
        marks = [mark for problem in problems for mark in structure(problem, problem.references[0])]
        for wanted in (True, False):
            shares.append(
                math.exp(mean(value for value, mark in zip(logp, marks, strict=True) if mark is wanted))
            )
    return (
        "  probability of a reference's words, without → with its plan: structure {0:.2f} → {2:.2f}, values "
        "{1:.2f} → {3:.2f}"
    ).format(*shares)


def _lines(level: str, groups: list[Group]) -> Iterator[str]:
    pairs = [(group.problem, member) for group in groups for member in group.trajectories]
    accuracy = Accuracy.over_problems(groups)
    dead = Accuracy.of([float(group.all_wrong) for group in groups])
    rewarded = [(problem, member) for problem, member in pairs if member.reward == 1]
    lucky = sum(not derivation_is_right(problem, member.text) for problem, member in rewarded)
    yield (
        f"{level}: pass@1 {accuracy.mean:.2%} [{accuracy.low:.2%}, {accuracy.high:.2%}] over {accuracy.n} "
        "problems"
    )
    yield f"  groups of {GROUP_SIZE} all wrong: {dead.mean:.1%} [{dead.low:.1%}, {dead.high:.1%}]"
    yield (
        f"  rewarded with a wrong derivation: {lucky} of {len(rewarded)}; by luck {lucky / len(pairs):.2%} "
        "of all completions"
    )


def measure_prm(model: str, n: int) -> Iterator[str]:
    """Measure how well a process reward model finds the first wrong step of ``n`` held-out hard solutions,
    for each kind of error."""
    judge, rng = PrmJudge(model), random.Random(1)
    for kind in KINDS:
        drawn = [draw(rng, "hard", kind, "test") for _ in range(n)]
        scores = judge.judge([(Problem("", prompt, ""), steps) for prompt, _, steps in drawn])
        named = [first_error(each or [], 0.5) for each in scores]
        wrong = [first_wrong(steps, split_steps(reference)) for _, reference, steps in drawn]
        pairs = list(zip(named, wrong, strict=True))
        shares = {
            "first wrong step named": [name == true for name, true in pairs if true is not None],
            "right solution left alone": [name is None for name, true in pairs if true is None],
        }
        for words, hits in shares.items():
            if hits:
                share = Accuracy.of([float(hit) for hit in hits])
                yield f"{kind}: {words} {share.mean:.1%} [{share.low:.1%}, {share.high:.1%}], n = {share.n}"
