"""What each method does with groups: who is guided, with what weight, and what is counted."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from handrail._util.errors import UserError
from handrail.methods import METHODS, build
from handrail.methods.base import Method
from handrail.methods.context import Tools
from handrail.methods.sort import Sort
from handrail.models.config import RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.types import Group, Origin, Problem, Trajectory
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool
from tests.conftest import prepared

PROBLEM = Problem("p", "77 A 8 ?", "70", ("77 + 8 = 85 , 85 * 2 = 70 # 70",), "add then double")
OTHER = Problem("q", "9 B 3 ?", "15", ("9 * 2 = 18 , 18 - 3 = 15 # 15",), "double then subtract")


def make(name: str, tools: Tools | None = None, **settings: Any) -> Method:
    method = build({"name": name, **settings}, RolloutConfig(group_size=4, max_tokens=48))
    return prepared(method, tools) if tools else method


def group(policy: TransformersPolicy, rewards: list[float], problem: Problem = PROBLEM) -> Group:
    prompt, completion = policy.encode_prompt(problem), policy.encode_completion("# 1")
    members = [
        Trajectory(
            prompt, completion, "# 1", [Origin.POLICY] * len(completion), [0.0] * len(completion), reward=reward, correct=reward == 1
        )
        for reward in rewards
    ]
    return Group(problem, members)


def weights_of(method: Method, groups: list[Group], tools: Tools) -> list[list[float]]:
    groups = method.credit(prepared(method, tools).guide(groups, tools), tools)
    return [member.weight for group in groups for member in group.demonstrations]


@pytest.mark.parametrize(
    ("p0", "p1", "weight"),
    [(0.01, 0.01, 0.01), (0.01, 0.8, 0.0894), (0.05, 0.01, 0.0224), (0.05, 0.6, 0.1732), (0.5, 0.9, 0.6708), (0.9, 0.9, 0.9),
     (0.9, 0.99, 0.9439)],
)  # fmt: skip
def test_sorts_weight_is_the_geometric_mean_of_both_scorings(p0: float, p1: float, weight: float, tools: Tools) -> None:
    method = make("sort")
    assert isinstance(method, Sort)
    (found,) = method.token_weights(torch.tensor([math.log(p0)]), torch.tensor([math.log(p1)]), tools)
    assert found == pytest.approx(weight, abs=5e-5)


def test_sorts_settings_change_the_weights_as_they_say(tools: Tools) -> None:
    logp0, logp1 = torch.tensor([0.01, 0.5, 0.9]).log(), torch.tensor([0.81, 0.3, 0.9]).log()

    def weights(logp: torch.Tensor | None = logp1, **settings: Any) -> list[float]:
        method = make("sort", **settings)
        assert isinstance(method, Sort)
        return method.token_weights(logp0, logp, tools)

    assert weights(alpha=0.0) == pytest.approx([0.01, 0.5, 0.9])
    assert weights(alpha=1.0) == pytest.approx([0.81, 0.3, 0.9])
    assert weights(logp=None) == pytest.approx([0.01, 0.5, 0.9])
    assert weights(hard_mask=True) == pytest.approx([0.09, 0.0, 0.0])
    normalised = weights(normalise_weights=True)
    assert sum(normalised) == pytest.approx(3.0) and normalised[0] / normalised[2] == pytest.approx(0.1)
    assert sorted(weights(weights="random")) == pytest.approx(sorted(weights()))


def test_sort_repairs_all_wrong_groups_only(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0, 0]), group(policy, [0, 1, 0]), group(policy, [1, 1, 1]), group(policy, [0, 0.5, 0])]
    guided = make("sort", tools).guide(groups, tools)
    assert [len(g.demonstrations) for g in guided] == [1, 0, 0, 1]
    assert [len(g.demonstrations) for g in make("sort", tools, repair="all").guide(groups, tools)] == [1, 1, 1, 1]


def test_an_unverified_rollout_is_neither_wrong_nor_right(policy: TransformersPolicy, tools: Tools) -> None:
    def judged(*verdicts: bool | None) -> Group:
        bare = group(policy, [0.1] * len(verdicts))
        members = [replace(member, correct=verdict) for member, verdict in zip(bare.trajectories, verdicts, strict=True)]
        return replace(bare, trajectories=members)

    def kind(found: Group) -> list[bool]:
        return [found.all_wrong, found.mixed, found.all_right]

    assert kind(judged(False, None)) == [True, False, False]
    assert kind(judged(True, None)) == [False, False, True]
    assert kind(judged(True, False, None)) == [False, True, False]
    assert kind(judged(None, None)) == kind(judged()) == [False] * 3
    guided = make("sort", tools).guide([judged(False, None), judged(None, None)], tools)
    assert [len(g.demonstrations) for g in guided] == [1, 0]


def test_wrong_and_dead_are_two_things(policy: TransformersPolicy, tools: Tools) -> None:
    unequal, equal = group(policy, [0.1, 0.2]), group(policy, [0.1, 0.1])
    assert unequal.all_wrong and equal.all_wrong
    assert [unequal.dead, equal.dead] == [False, True]
    credited = make("grpo").credit([unequal, equal], tools)
    assert [g.has_signal for g in credited] == [True, False]
    assert [len(g.demonstrations) for g in make("sft-on-failures").guide([unequal, equal], tools)] == [1, 1]


def test_a_reference_without_a_verdict_neither_joins_a_group_nor_repairs_one(policy: TransformersPolicy, tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text("def verdict(problem, completion): return problem['answer']")
    with VerifierPool(VerifierConfig(name=f"{tmp_path}/raising.py:verdict", workers=1)) as raising:
        tools = Tools(policy, raising)
        groups = [group(policy, [0, 0])]
        assert len(make("luffy").guide(groups, tools)[0].trajectories) == 2
        assert make("sort", tools).guide(groups, tools)[0].demonstrations == []
    assert tools.counts["guide/reference_unverified"] == 2 and not tools.counts["guide/reference_rejected"]


def test_a_repair_is_its_all_wrong_groups_only_signal(policy: TransformersPolicy, tools: Tools) -> None:
    method = make("sort", tools)
    (repaired,) = method.credit(method.guide([group(policy, [0, 0, 0])], tools), tools)
    assert all(member.credit == [0.0] * len(member) for member in repaired.trajectories)
    assert repaired.demonstrations[0].has_signal and not repaired.demonstrations[0].credit


def test_sort_does_not_teach_a_reference_that_the_verifier_refuses(policy: TransformersPolicy, tools: Tools) -> None:
    wrong = replace(PROBLEM, references=("77 + 8 = 85 # 85",))
    (guided,) = make("sort", tools).guide([group(policy, [0, 0], wrong)], tools)
    assert guided.demonstrations == [] and tools.counts["guide/reference_rejected"] == 1


@pytest.mark.parametrize(
    ("plan", "count"), [("add then double , 70", "sort/leaking_plan"), ("reach 85", "sort/leaking_plan"), (None, "sort/no_plan")]
)
def test_a_leaking_or_missing_plan_falls_back_to_p0_and_is_counted(
    plan: str | None, count: str, policy: TransformersPolicy, tools: Tools
) -> None:
    problem = replace(PROBLEM, plan=plan)
    (found,) = weights_of(make("sort", planner="column"), [group(policy, [0, 0], problem)], tools)
    (expected,) = weights_of(make("sort", alpha=0.0), [group(policy, [0, 0])], tools)
    assert found == pytest.approx(expected)
    assert tools.counts[count] == 1


def test_the_plan_column_and_the_rule_agree_on_the_built_in_task(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0])]
    column, rule, nothing = (
        weights_of(make("sort", **settings), groups, tools)[0] for settings in ({"planner": "column"}, {"planner": "rule"}, {"alpha": 0.0})
    )
    assert column == rule != nothing


def test_a_shuffled_plan_is_another_problems(policy: TransformersPolicy, tools: Tools) -> None:
    both = [group(policy, [0, 0]), group(policy, [0, 0], OTHER)]
    swapped = [
        group(policy, [0, 0], replace(PROBLEM, plan=OTHER.plan)),
        group(policy, [0, 0], replace(OTHER, plan=PROBLEM.plan)),
    ]
    shuffled = weights_of(make("sort", weights="shuffled-plan"), both, tools)
    for found, expected in zip(shuffled, weights_of(make("sort"), swapped, tools), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_other_ablations_of_the_weights(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0])]
    (uniform,) = weights_of(make("sort", weights="uniform"), groups, tools)
    assert set(uniform) == {1.0}
    (solution,) = weights_of(make("sort", weights="solution"), groups, tools)
    shown = [policy.encode_prompt(PROBLEM), policy.encode_prompt(PROBLEM, PROBLEM.references[0])]
    logp0, logp1 = policy.score(shown, [policy.encode_completion(PROBLEM.references[0])] * 2)
    assert solution == pytest.approx(((logp0 + logp1) / 2).exp().tolist())
    (early,) = weights_of(make("sort", weights_at="rollout"), groups, tools)
    (late,) = weights_of(make("sort"), groups, tools)
    assert early == pytest.approx(late)


def test_dft_weighs_each_token_by_its_probability(policy: TransformersPolicy, tools: Tools) -> None:
    method = make("dft")
    (found,) = weights_of(method, method.rollout([PROBLEM], tools), tools)
    (logp,) = policy.score([policy.encode_prompt(PROBLEM)], [policy.encode_completion(PROBLEM.references[0])])
    assert found == pytest.approx(logp.exp().tolist())


def test_imitation_baselines_choose_whom_to_imitate(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0]), group(policy, [0, 1])]
    assert [len(g.demonstrations) for g in make("sft-on-failures").guide(groups, tools)] == [1, 0]
    assert [len(g.demonstrations) for g in make("grpo+sft").guide(groups, tools)] == [1, 1]
    credited = make("sft-on-failures").credit(make("sft-on-failures").guide(groups, tools), tools)
    assert not any(member.has_signal for g in credited for member in g.trajectories)
    assert make("sft").rollout([PROBLEM], tools)[0].trajectories == []


def test_luffy_leaves_room_for_the_reference_and_lets_the_verifier_judge_it(policy: TransformersPolicy, tools: Tools) -> None:
    bare, wrong = replace(PROBLEM, id="bare", references=()), replace(PROBLEM, references=("77 # 77",))
    method = make("luffy")
    torch.manual_seed(0)
    groups = method.rollout([PROBLEM, bare, wrong], tools)
    assert [len(g.trajectories) for g in groups] == [3, 4, 3]
    guided = method.guide(tools.verify(groups), tools)
    assert [len(g.trajectories) for g in guided] == [4, 4, 4]
    assert [g.trajectories[-1].reward for g in guided][::2] == [1.0, 0.0]
    assert tools.counts["guide/no_reference"] == 1 and tools.counts["guide/reference_rejected"] == 1
    assert guided[0].trajectories[-1].behaviour == [None] * len(guided[0].trajectories[-1])
    assert guided[0].trajectories[-1].completion[-1] == policy.tokenizer.eos_token_id


def test_one_of_several_references_is_drawn(tools: Tools) -> None:
    problem = replace(PROBLEM, references=("# 70", "85 # 70"))
    drawn = {replace(tools, rng=random.Random(seed)).reference(problem).text for seed in range(20)}  # type: ignore[union-attr]
    assert drawn == set(problem.references)


def test_dapo_leaves_dead_groups_out_of_the_normaliser(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0]), group(policy, [0, 1]), group(policy, [1, 1])]
    assert len(make("grpo").credit(groups, tools)) == 3
    assert len(make("grpo", skip_dead_groups=True).credit(groups, tools)) == 1


def test_skipping_dead_groups_keeps_those_with_a_reference_to_imitate(policy: TransformersPolicy, tools: Tools) -> None:
    method = make("grpo+sft", skip_dead_groups=True)
    assert len(method.credit(method.guide([group(policy, [0, 0])], tools), tools)) == 1


def test_a_lone_repair_has_no_other_problems_plan_to_be_shuffled_with(policy: TransformersPolicy, tools: Tools) -> None:
    groups = [group(policy, [0, 0])]
    (shuffled,) = weights_of(make("sort", weights="shuffled-plan"), groups, tools)
    (without,) = weights_of(make("sort", alpha=0.0), groups, tools)
    assert shuffled == pytest.approx(without, abs=1e-5)


def test_every_method_states_its_verbs_source_and_status() -> None:
    for name, cls in METHODS.items():
        assert cls.name == name and cls.source != Method.source and cls.status in ("published", "secondary", "reconstruction")
        assert all(f"{verb}:" in (cls.__doc__ or "") for verb in ("rollout", "guide", "credit", "surrogate")), name
        for key, field in cls.Settings.model_fields.items():
            assert key == "name" or field.description, f"{name}.{key} is not described"


def test_a_group_of_one_is_refused_by_methods_that_compare_its_members() -> None:
    for name in METHODS:
        if name in ("sft", "dft", "sft-on-failures"):
            assert build({"name": name}, RolloutConfig(group_size=1)).rollout_config.group_size == 1
        else:
            with pytest.raises(UserError, match=f"rollout.group_size is 1, and {re.escape(name)} compares .*; set it to 2 or more"):
                build({"name": name}, RolloutConfig(group_size=1))
        assert build({"name": name}, RolloutConfig(group_size=2))

    class Mine(Method):
        pass

    with pytest.raises(UserError, match="and Mine compares"):
        build({}, RolloutConfig(group_size=1), Mine)


def test_unknown_methods_and_settings_are_named() -> None:
    with pytest.raises(UserError, match="there is no method 'lufy'; did you mean 'luffy'"):
        make("lufy")
    with pytest.raises(UserError, match=r"there is no setting method.gama; did you mean 'gamma'"):
        make("luffy", gama=0.2)
    with pytest.raises(UserError, match="is not a subclass of handrail.Method"):
        make("handrail.types:Group")
