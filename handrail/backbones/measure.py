"""What a backbone can do before any training: the conditions under which the demo's story can be true."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator

from handrail.config import Config, DataConfig, ModelConfig, RolloutConfig, Source, VerifierConfig
from handrail.evaluate import Accuracy, evaluate
from handrail.policy.transformers import TransformersPolicy
from handrail.sources import load_problems
from handrail.tasks.house_rules import derivation_is_right
from handrail.tools import Tools
from handrail.trajectory import Group
from handrail.verifier_pool import VerifierPool

GROUP_SIZE = 8


def measure(model: str, n: int) -> Iterator[str]:
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
