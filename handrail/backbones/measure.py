"""What a backbone can do before any training: the conditions under which the demo's story can be true."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from handrail.backbones import locate
from handrail.backbones.make_prm import KINDS, draw, first_wrong
from handrail.config import Config, DataConfig, ModelConfig, RolloutConfig, Source, VerifierConfig
from handrail.evaluate import Accuracy, evaluate
from handrail.guidance.judge import first_error
from handrail.guidance.prm import PrmJudge
from handrail.guidance.steps import split_steps
from handrail.policy.transformers import TransformersPolicy
from handrail.problems import Problem
from handrail.sources import load_problems
from handrail.tasks.house_rules import derivation_is_right
from handrail.tools import Tools
from handrail.trajectory import Group
from handrail.verifier_pool import VerifierPool

GROUP_SIZE = 8


def measure(model: str, n: int) -> Iterator[str]:
    """What ``model`` can do, policy or process reward model, in lines."""
    config = Path(locate(model)) / "config.json"
    is_prm = config.is_file() and "RewardModel" in config.read_text(encoding="utf-8")
    return measure_prm(model, n) if is_prm else measure_policy(model, n)


def measure_policy(model: str, n: int) -> Iterator[str]:
    """Accuracy on ``n`` held-out problems of each level, dead groups, and rewarded completions whose derivation is wrong."""
    config = Config(
        model=ModelConfig(path=model), data=DataConfig(train=[Source(path="task:house-rules")]),
        verifier=VerifierConfig(name="exact", extract=r"# ([\d ]+)$"), rollout=RolloutConfig(max_tokens=48),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    with VerifierPool(config.verifier) as verifier:
        tools = Tools(TransformersPolicy(config, accelerator), verifier)
        for level in ("easy", "hard"):
            problems = load_problems(f"task:house-rules?level={level}&split=test&n={n}")
            groups = evaluate(tools, accelerator, problems, GROUP_SIZE, level)
            yield from _lines(level, groups)


def _lines(level: str, groups: list[Group]) -> Iterator[str]:
    pairs = [(group.problem, member) for group in groups for member in group.trajectories]
    accuracy = Accuracy.over_problems(groups)
    dead = Accuracy.of([float(group.all_wrong) for group in groups])
    rewarded = [(problem, member) for problem, member in pairs if member.reward == 1]
    lucky = sum(not derivation_is_right(problem, member.text) for problem, member in rewarded)
    yield f"{level}: pass@1 {accuracy.mean:.2%} [{accuracy.low:.2%}, {accuracy.high:.2%}] over {accuracy.n} problems"
    yield f"  groups of {GROUP_SIZE} all wrong: {dead.mean:.1%} [{dead.low:.1%}, {dead.high:.1%}]"
    yield f"  rewarded with a wrong derivation: {lucky} of {len(rewarded)}; by luck {lucky / len(pairs):.2%} of all completions"


def measure_prm(model: str, n: int) -> Iterator[str]:
    """How well a process reward model finds the first wrong step of ``n`` held-out hard solutions, for each way to err."""
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
