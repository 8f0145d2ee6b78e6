"""What each method does with groups: which groups are guided, with what weights, and what is counted."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from handrail._util.errors import UserError
from handrail.engines.local import LocalEngine
from handrail.methods import METHODS, build
from handrail.methods.base import GrpoSettings, Method, MethodSettings
from handrail.methods.batch import Sample, token_batch
from handrail.methods.grpo import Grpo
from handrail.models.config import RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.training.samples import batch_rows, gradient_weights, sample_rows
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool


class DapoSettings(GrpoSettings):
    clip_high: float = 0.28
    kl: float = 0.1
    skip_dead_groups: bool = True


PROBLEM = Problem("p", "77 A 8 ?", "70", ("77 + 8 = 85 , 85 * 2 = 70 # 70",), "add then double")
OTHER = Problem("q", "9 B 3 ?", "15", ("9 * 2 = 18 , 18 - 3 = 15 # 15",), "double then subtract")


def make(name: str, **settings: Any) -> Method[Any]:
    return build({"name": name, **settings}, RolloutConfig(group_size=4, max_tokens=48))


def group(policy: TransformersPolicy, rewards: list[float], problem: Problem = PROBLEM) -> Group:
    prompt, completion = policy.renderer.prompt(problem), policy.renderer.completion("# 1")
    rollout = Trajectory.by(Author.POLICY, prompt, completion, "# 1")
    known = rollout.with_columns(sampling_logp=torch.zeros(len(rollout)), old_logp=torch.zeros(len(rollout)))
    return Group(problem, [replace(known, reward=reward, correct=reward == 1) for reward in rewards])


def guide(method: Method[Any], groups: list[Group], engine: LocalEngine) -> list[Group]:
    return [each for found in engine.guide(method, groups) for each in found]


def weights_of(method: Method[Any], groups: list[Group], engine: LocalEngine) -> list[list[float]]:
    """Gradient of the surrogate for every token of the imitated trajectories."""
    credited = engine.credit(method, guide(method, groups, engine))
    imitated = [member for group in credited for member in group.imitated]
    return gradient_weights(imitated, method, engine.policy)


def test_sort_repairs_all_wrong_groups_only(policy: TransformersPolicy, engine: LocalEngine) -> None:
    groups = [
        group(policy, [0, 0, 0]),
        group(policy, [0, 1, 0]),
        group(policy, [1, 1, 1]),
        group(policy, [0, 0.5, 0]),
    ]
    guided = guide(make("sort"), groups, engine)
    assert [len(g.imitated) for g in guided] == [1, 0, 0, 1]
    assert [len(g.imitated) for g in guide(make("sort", repair="all"), groups, engine)] == [1, 1, 1, 1]


def test_an_unverified_rollout_is_neither_wrong_nor_right(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    def judged(*verdicts: bool | None) -> Group:
        bare = group(policy, [0.1] * len(verdicts))
        members = [
            replace(member, correct=verdict)
            for member, verdict in zip(bare.trajectories, verdicts, strict=True)
        ]
        return replace(bare, trajectories=members)

    def kind(found: Group) -> list[bool]:
        return [found.all_wrong, found.mixed, found.all_right]

    assert kind(judged(False, None)) == [True, False, False]
    assert kind(judged(True, None)) == [False, False, True]
    assert kind(judged(True, False, None)) == [False, True, False]
    assert kind(judged(None, None)) == kind(judged()) == [False] * 3
    guided = guide(make("sort"), [judged(False, None), judged(None, None)], engine)
    assert [len(g.imitated) for g in guided] == [1, 0]


def test_all_wrong_and_dead_are_independent(policy: TransformersPolicy, engine: LocalEngine) -> None:
    unequal, equal = group(policy, [0.1, 0.2]), group(policy, [0.1, 0.1])
    assert unequal.all_wrong and equal.all_wrong
    assert [unequal.dead, equal.dead] == [False, True]
    credited = engine.credit(make("grpo"), [unequal, equal])
    assert [g.has_signal for g in credited] == [True, False]
    assert [len(g.imitated) for g in guide(make("sft-on-failures"), [unequal, equal], engine)] == [1, 1]


def test_a_reference_without_a_verdict_neither_joins_a_group_nor_repairs_one(
    policy: TransformersPolicy, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text("def verdict(problem, completion): return problem['answer']")
    with VerifierPool(VerifierConfig(name=f"{tmp_path}/raising.py:verdict", workers=1)) as raising:
        engine = LocalEngine(policy, raising)
        groups = [group(policy, [0, 0])]
        assert len(guide(make("luffy"), groups, engine)[0].trajectories) == 2
        assert guide(make("sort"), groups, engine)[0].imitated == []
    assert engine.counts["guide/reference_unverified"] == 2 and not engine.counts["guide/reference_rejected"]


def test_the_repair_is_the_only_signal_of_an_all_wrong_group(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    method = make("sort")
    (repaired,) = engine.credit(method, guide(method, [group(policy, [0, 0, 0])], engine))
    assert not any(member.column("advantage").any() for member in repaired.trajectories)
    assert repaired.imitated[0].has_signal and not any(member.has_signal for member in repaired.baseline)


def test_sort_does_not_use_a_reference_that_the_verifier_refuses(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    wrong = replace(PROBLEM, references=("77 + 8 = 85 # 85",))
    (guided,) = guide(make("sort"), [group(policy, [0, 0], wrong)], engine)
    assert guided.imitated == [] and engine.counts["guide/reference_rejected"] == 1


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        ("add then double , 70", "planner/leaking"),
        ("reach 85", "planner/leaking"),
        (None, "planner/no_answer"),
    ],
)
def test_a_leaking_or_missing_plan_falls_back_to_p0_and_is_counted(
    plan: str | None, count: str, policy: TransformersPolicy, engine: LocalEngine
) -> None:
    problem = replace(PROBLEM, plan=plan)
    (found,) = weights_of(make("sort", planner="column"), [group(policy, [0, 0], problem)], engine)
    (expected,) = weights_of(make("sort", alpha=0.0), [group(policy, [0, 0])], engine)
    assert found == pytest.approx(expected)
    assert engine.experts.counts[count] == 1


def test_the_plan_column_and_the_rule_agree_on_the_built_in_task(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    groups = [group(policy, [0, 0])]
    column, rule, nothing = (
        weights_of(make("sort", **settings), groups, engine)[0]
        for settings in ({"planner": "column"}, {"planner": "rule"}, {"alpha": 0.0})
    )
    assert column == rule != nothing


THIRD = Problem("r", "5 A 5 ?", "20", ("5 + 5 = 10 , 10 * 2 = 20 # 20",), "add then subtract")


def test_a_shuffled_plan_is_another_problems_whatever_else_is_asked(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    problems = [PROBLEM, OTHER, THIRD]
    engine.experts.problems = [replace(PROBLEM, id="bare", references=()), *problems]
    shuffled = make("sort", weights="shuffled-plan")
    together = weights_of(shuffled, [group(policy, [0, 0], each) for each in problems], engine)
    taken = []
    for problem, found in zip(problems, together, strict=True):
        others = [other for other in problems if other is not problem]
        swapped = [
            weights_of(make("sort"), [group(policy, [0, 0], replace(problem, plan=other.plan))], engine)[0]
            for other in others
        ]
        taken += [
            other.id
            for other, weights in zip(others, swapped, strict=True)
            if found == pytest.approx(weights, rel=1e-4)
        ]
    assert sorted(taken) == ["p", "q", "r"]  # each plan serves once, and never its own problem
    engine.experts.problems = engine.experts.problems[::-1]
    for problem, found in zip(problems, together, strict=True):
        (alone,) = weights_of(shuffled, [group(policy, [0, 0], problem)], engine)
        assert alone == pytest.approx(found, rel=1e-4)


def test_other_ablations_of_the_weights(policy: TransformersPolicy, engine: LocalEngine) -> None:
    groups = [group(policy, [0, 0])]
    (uniform,) = weights_of(make("sort", weights="uniform"), groups, engine)
    assert set(uniform) == {1.0}
    (solution,) = weights_of(make("sort", weights="solution"), groups, engine)
    shown = [policy.renderer.prompt(PROBLEM), policy.renderer.prompt(PROBLEM, PROBLEM.references[0])]
    logp0, logp1 = policy.score(shown, [policy.renderer.completion(PROBLEM.references[0])] * 2)
    assert solution == pytest.approx(((logp0 + logp1) / 2).exp().tolist())
    (early,) = weights_of(make("sort", weights_at="rollout"), groups, engine)
    (late,) = weights_of(make("sort"), groups, engine)
    assert early == pytest.approx(late)


def test_dft_weights_each_token_by_its_probability(policy: TransformersPolicy, engine: LocalEngine) -> None:
    method = make("dft")
    (found,) = weights_of(method, engine.rollout(method, [PROBLEM]), engine)
    (logp,) = policy.score(
        [policy.renderer.prompt(PROBLEM)], [policy.renderer.completion(PROBLEM.references[0])]
    )
    assert found == pytest.approx(logp.exp().tolist())


def test_imitation_baselines_imitate_the_groups_that_they_should(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    groups = [group(policy, [0, 0]), group(policy, [0, 1])]
    assert [len(g.imitated) for g in guide(make("sft-on-failures"), groups, engine)] == [1, 0]
    assert [len(g.imitated) for g in guide(make("grpo+sft"), groups, engine)] == [1, 1]
    method = make("sft-on-failures")
    credited = engine.credit(method, guide(method, groups, engine))
    assert not any(member.has_signal for g in credited for member in g.baseline)
    assert engine.rollout(make("sft"), [PROBLEM])[0].trajectories == []


def test_luffy_samples_one_rollout_less_and_grades_the_reference(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    bare, wrong = replace(PROBLEM, id="bare", references=()), replace(PROBLEM, references=("77 # 77",))
    method = make("luffy")
    groups = engine.rollout(method, [PROBLEM, bare, wrong])
    assert [len(g.trajectories) for g in groups] == [3, 4, 3]
    found = guide(method, engine.reward(method, groups), engine)
    assert [len(g.trajectories) for g in found] == [4, 4, 4]
    assert [g.trajectories[-1].reward for g in found][::2] == [1.0, 0.0]
    assert engine.counts["guide/no_reference"] == 1 and engine.counts["guide/reference_rejected"] == 1
    reference = found[0].trajectories[-1]
    assert reference.column("old_logp").isnan().all() and set(reference.author.tolist()) == {Author.REFERENCE}
    assert reference.tokens[-1] == policy.tokenizer.eos_token_id


def test_a_reference_that_a_guide_adds_ungraded_is_not_a_wrong_answer(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    graded = group(policy, [0, 1, 1])
    reference = engine.context(0, PROBLEM, "guide").reference(PROBLEM)
    assert reference is not None
    (alone,), (mixed,) = (engine.credit(make("grpo"), [each]) for each in (graded, graded.add(reference)))
    *rollouts, added = [member.column("advantage").tolist() for member in mixed.trajectories]
    assert rollouts == [member.column("advantage").tolist() for member in alone.trajectories]
    assert set(added) == {0.0} and mixed.rewards == [0, 1, 1]


def test_one_of_several_references_is_drawn(engine: LocalEngine) -> None:
    problem = replace(PROBLEM, references=("# 70", "85 # 70"))
    context = engine.context(0, problem, "guide")
    drawn = {replace(context, rng=random.Random(seed)).reference(problem).text for seed in range(20)}  # type: ignore[union-attr]
    assert drawn == set(problem.references)


def test_dapo_leaves_dead_groups_out_of_the_normalizer(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    groups = [group(policy, [0, 0]), group(policy, [0, 1]), group(policy, [1, 1])]
    assert len(engine.credit(make("grpo"), groups)) == 3
    assert len(engine.credit(make("grpo", skip_dead_groups=True), groups)) == 1


def test_a_method_decides_which_credited_groups_enter_the_update(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    class RightOnly(Grpo):
        def keeps(self, group: Group) -> bool:
            return not group.all_wrong

    groups = [group(policy, [0, 0]), group(policy, [0, 1]), group(policy, [1, 1])]
    assert [g.all_wrong for g in engine.credit(RightOnly(), groups)] == [False, False]


@pytest.mark.parametrize("settings", [MethodSettings, GrpoSettings, DapoSettings])
def test_building_blocks_read_grpos_settings_or_their_defaults(
    settings: type[MethodSettings], policy: TransformersPolicy, engine: LocalEngine
) -> None:
    class Mine(Method[Any]):
        Settings = settings

    mine, dapo = Mine(), settings is DapoSettings
    assert mine.grpo == (DapoSettings() if dapo else GrpoSettings())
    assert mine.keeps(group(policy, [0, 0])) != dapo and mine.kl == (0.1 if dapo else 0.0)
    batch = token_batch(
        [Sample(group(policy, [1]).map(lambda m: m.with_advantage(1.0)).trajectories[0], 1.0)]
    )
    found = mine.policy_gradient(torch.full_like(batch.mask, 9.0), batch)  # far above the old probability, 1
    assert found[0, 0].item() == pytest.approx(1.28 if dapo else 1.2)


def test_skipping_dead_groups_keeps_those_with_a_reference_to_imitate(
    policy: TransformersPolicy, engine: LocalEngine
) -> None:
    method = make("grpo+sft", skip_dead_groups=True)
    assert len(engine.credit(method, guide(method, [group(policy, [0, 0])], engine))) == 1


def test_a_lone_problem_has_no_others_plan_to_take(policy: TransformersPolicy, engine: LocalEngine) -> None:
    engine.experts.problems = [PROBLEM]
    with pytest.raises(UserError, match="no other training problem with a reference"):
        weights_of(make("sort", weights="shuffled-plan"), [group(policy, [0, 0])], engine)


def test_every_method_states_its_verbs_source_and_status() -> None:
    for name, cls in METHODS.items():
        assert (
            cls.name == name
            and cls.source != Method.source
            and cls.status in ("published", "secondary", "reconstruction")
        )
        assert all(
            f"{verb}:" in (cls.__doc__ or "") for verb in ("rollout", "guide", "credit", "surrogate")
        ), name
        for key, field in cls.Settings.model_fields.items():
            assert key in ("name",) or field.description, f"{name}.{key} is not described"


def test_a_group_of_one_is_refused_by_methods_that_compare_its_members() -> None:
    for name in METHODS:
        if name in ("sft", "dft", "sft-on-failures", "tgpo"):
            assert build({"name": name}, RolloutConfig(group_size=1)).group_size == 1
        else:
            with pytest.raises(
                UserError,
                match=f"rollout.group_size is 1, and {re.escape(name)} compares .*; set it to 2 or more",
            ):
                build({"name": name}, RolloutConfig(group_size=1))
        if name != "npo":  # which needs a file
            assert build({"name": name}, RolloutConfig(group_size=2))

    class Mine(Method[Any]):
        pass

    with pytest.raises(UserError, match="and Mine compares"):
        build({}, RolloutConfig(group_size=1), Mine)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"name": "scope"}, True),
        ({"name": "scope", "corrector": "endpoint"}, False),
        ({"name": "scope", "corrector": "endpoint", "judge": "reference"}, True),
        ({"name": "scope", "corrector": "endpoint", "mode": "reference"}, True),
        ({"name": "cso"}, True),
        ({"name": "cso", "corrector": "model"}, False),
        ({"name": "int"}, True),
        ({"name": "int", "corrector": "endpoint"}, True),
        ({"name": "stride"}, False),
        ({"name": "stride", "judge": "reference"}, True),
    ],
)
def test_repairs_by_the_reference_are_refused_for_problems_without_one(
    settings: dict[str, Any], needs: bool
) -> None:
    method, bare = make(**settings), replace(PROBLEM, references=())
    method.check([bare, PROBLEM])
    if not needs:
        return method.check([bare])
    with pytest.raises(UserError, match=f"^{settings['name']} learns from references, and no training"):
        method.check([bare])


def test_unknown_methods_and_settings_are_named() -> None:
    with pytest.raises(UserError, match="there is no method 'lufy'; did you mean 'luffy'"):
        make("lufy")
    with pytest.raises(UserError, match=r"there is no setting method.gama; did you mean 'gamma'"):
        make("luffy", gama=0.2)
    with pytest.raises(UserError, match="is not a subclass of handrail.Method"):
        make("handrail.types.trajectory:Group")


def test_samples_show_the_weights_of_coupled_objectives_and_are_scored_together(
    policy: TransformersPolicy, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per advantage A of a token with ratio 1 and linear weight w: (A + w)/A, and w without an advantage."""
    on_policy = group(policy, [0, 1]).map(
        lambda member: member.with_columns(old_logp=torch.full((len(member),), torch.nan))
    )
    (credited,) = engine.credit(make("dmpo"), [on_policy])
    pair = credited.trajectories[0].with_advantage(0.0)
    calls = []
    score = policy.score

    def counted(*arguments: Any, **named: Any) -> list[torch.Tensor]:
        calls.append(arguments)
        return score(*arguments, **named)

    monkeypatch.setattr(policy, "score", counted)
    rows = list(sample_rows(1, [credited, Group(PROBLEM, [pair])], make("dmpo"), policy))
    assert len(calls) == 1
    for row, member in zip(rows, [*credited.trajectories, pair], strict=True):
        a, w = member.column("advantage"), member.column("linear_weight")
        assert w.any() and row["gradient_weight"] == pytest.approx(
            ((a + w) / torch.where(a == 0, 1.0, a)).tolist(), abs=1e-4
        )
    assert list(batch_rows(1, [credited], policy))[1]["logp"] and len(calls) == 2


@pytest.mark.parametrize(("name", "scored"), [("dft", 0), ("sft", 0), ("grpo", 0), ("sort", 2)])
def test_numbers_that_the_loss_computes_anyway_are_not_scored_before(
    name: str, scored: int, policy: TransformersPolicy, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SORT scores each of its two repairs once, with the plan in the prompt; p0 is not scored."""
    prompts: list[list[int]] = []
    score = policy.score

    def counted(
        asked: list[list[int]], completions: Any, model: str, targets: Any = None
    ) -> list[torch.Tensor]:
        prompts.extend(asked)
        return score(asked, completions, model, targets)

    monkeypatch.setattr(policy, "score", counted)
    groups = [group(policy, [0, 0]), group(policy, [0, 0], OTHER)]
    method = make(name)
    engine.credit(method, guide(method, groups, engine))
    assert len(prompts) == scored
    assert all(
        prompt not in prompts for prompt in (policy.renderer.prompt(PROBLEM), policy.renderer.prompt(OTHER))
    )
