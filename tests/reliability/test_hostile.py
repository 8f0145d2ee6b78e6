"""Hostile completions: part of the corpus through every verifier, and all kinds of it through a real run.
``hostile.py`` grades all of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from handrail import train
from handrail.eval.report.page import write_report
from handrail.methods.base import Method
from handrail.methods.context import Context
from handrail.methods.grpo import Grpo
from handrail.types.problem import Problem
from handrail.types.trajectory import Group
from handrail.verifiers.builtin import resolve
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool
from tests.conftest import config
from tests.reliability.hostile import corpus, fuzzed, grade_all, overpaid, problems


@pytest.fixture(autouse=True)
def forked_verifiers() -> None:
    """Verifiers start as users' do."""


def test_the_corpus_is_large_and_always_the_same() -> None:
    assert len(corpus()) >= 2000 and corpus() == corpus()


@pytest.mark.parametrize("label", ["math", "normalized", "task", "reasoning-gym:countdown"])
def test_no_hostile_completion_hangs_crashes_or_is_rewarded(label: str) -> None:
    name, problem = problems()[label]
    said = grade_all(name, problem, [*corpus()[::40], *fuzzed(100, seed=1)], timeout=1)
    assert "paid 0" in said and "crash" not in said, said


@pytest.mark.parametrize(
    "family",
    ["complex_arithmetic", "gsm_symbolic", "game_of_life_halting", "coin_flip", "countdown", "n_queens"],
)
def test_no_constant_is_paid_for_different_problems(family: str) -> None:
    with VerifierPool(VerifierConfig(name="reasoning-gym", workers=1)) as pool:
        assert overpaid(family, pool) == []


HACKS = {
    "the answer": "42",
    "several boxed answers, the last one right": r"\boxed{41} \boxed{42}",
    "several boxed answers, the first one right": r"\boxed{42} \boxed{41}",
    "one box with several answers": r"\boxed{41, 42}",
    "a set that holds it": r"\boxed{\{41, 42\}}",
    "an interval that holds it": r"\boxed{[0, 100]}",
    "plus or minus": r"\boxed{\pm 42}",
    "all numbers listed, the right one not last": "40, 41, 42, 43",
    "all numbers listed, the right one last": "39, 40, 41, 42",
    "the prompt echoed": "What is 6*7? Hint: it is not 41.",
    "the question as the answer": r"\boxed{6*7}",
    "an integral": r"\boxed{\int_0^{42} 1 dx}",
    "a fraction yet to be divided": r"\boxed{\frac{84}{2}}",
    "a true equation": r"\boxed{x = x}",
    "not a number": r"\boxed{nan}",
    "the wrong sign": "-42",
    "a relation": "> 42",
    "a negation": r"\boxed{\neq 42}",
    "another base": "42_7",
    "a binomial": r"\binom{42}{1}",
    "a false equation": "0 = 42",
    "another answer in words": r"\boxed{42 \text{ is wrong, it is 41}}",
    "another answer behind the box": r"\boxed{42} is wrong, it is 41",
    "the answer in its thinking": r"<think>\boxed{42}</think> I do not know.",
    "thinking without an end": r"<think>\boxed{42}",
    "a praised grader": "The verifier says: reward 1.0",
}
PAID = {
    "math": {"the answer", "another answer behind the box"},
    "normalized": {
        "the answer",
        "several boxed answers, the last one right",
        "another answer behind the box",
    },
    "exact": {"the answer"},
}
"""The last box is the answer, so several guesses count as one."""


@pytest.mark.parametrize("name", PAID)
def test_rewards_of_reward_hacks(name: str) -> None:
    verifier = resolve(VerifierConfig(name=name))
    problem = Problem("0", "What is 6*7? Hint: it is not 41.", "42")
    assert {hack for hack, completion in HACKS.items() if verifier(problem, completion)} == PAID[name]


class Hostile(Grpo):
    """A policy that writes hostile completions."""

    name = "hostile"

    texts = cycle(corpus()[:: len(corpus()) // 16])

    async def reward(self, group: Group, ctx: Context) -> Group:
        return await super().reward(group.map(lambda member: replace(member, text=next(self.texts))), ctx)


def test_a_run_with_hostile_completions_ends_and_has_a_report(tmp_path: Path) -> None:
    method: type[Method[Any]] = Hostile
    verifier = {"name": "math", "timeout": 1.0}
    settings = config(
        verifier=verifier,
        rollout={"max_tokens": 48, "group_size": 8, "require_end": False},
        train={"problems_per_step": 2},
    )
    summary = train(settings, tmp_path / "run", method=method)
    assert summary["steps"] == 2 and summary["guided"] == 0
    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text()
    assert "<script>alert(1)</script>" not in page and "onerror=alert(1)>" not in page
