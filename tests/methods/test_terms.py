"""Terms and coupled objectives, by hand, against autograd, and through the real loop."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handrail import Term, UserError, train
from handrail.engines.local import LocalEngine
from handrail.methods import METHODS, build
from handrail.methods.batch import micro_batch
from handrail.methods.context import Context
from handrail.methods.dmpo import mismatch
from handrail.methods.imitating import imitated
from handrail.methods.linearize import linearized
from handrail.methods.requests import Pending, Score, drive
from handrail.methods.sft import GrpoSft
from handrail.methods.sort import Sort
from handrail.methods.terms import build_term
from handrail.methods.terms.ace import Ace
from handrail.methods.terms.arm import confidence
from handrail.models.config import RolloutConfig
from handrail.models.trainable import TrainablePolicy
from handrail.training.update import empty_sample
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from tests.conftest import EASY, config
from tests.training.test_update import assert_equal, gradients, rollout

PROBLEM = Problem("p", "77 A 8 ?", "70")


def member(
    advantage: float,
    logp: Sequence[float] = (-1.0, -2.0),
    correct: bool = False,
    prompt: Sequence[int] = (5, 6),
) -> Trajectory:
    tokens = Trajectory.by(Author.POLICY, list(prompt), range(len(logp)))
    columns = {"sampling_logp": torch.tensor(list(logp)), "old_logp": torch.tensor(list(logp))}
    known = tokens.with_columns(**columns).with_advantage(advantage)
    return replace(known, reward=float(correct), correct=correct)


def applied(
    term: Term, group: Group, engine: LocalEngine, scores: dict[str, Tensor] | None = None
) -> list[list[float]]:
    """Return the advantages that ``term`` produces; ``scores`` by model replace the engine's."""

    def answer(pending: list[Pending]) -> Sequence[Any]:
        return [scores[each.request.model] for each in pending] if scores else engine.answer(pending)

    (found,) = drive([((), term.credit(group, engine.context(0, group.problem, "credit")))], answer)
    return [each.column("advantage").tolist() for each in found.trajectories]


@pytest.mark.parametrize(
    ("shift", "factor"), [(-5, 1.0067), (-2, 1.1269), (0, 1.6931), (1, 2.3133), (3, 4.0486)]
)
def test_ace_by_hand(shift: float, factor: float, engine: LocalEngine) -> None:
    group = Group(PROBLEM, [member(-0.5), member(0.5), member(0.0)])
    scores = {"policy": torch.tensor([-1.0, -3.0]), "reference": torch.tensor([-1.5, -2.5]) - shift}
    found = applied(build_term({"name": "ace"}, 1), group, engine, scores)
    assert found[0] == pytest.approx([-0.5 * factor] * 2, abs=1e-4) and found[1:] == [[0.5] * 2, [0.0] * 2]
    assert engine.counts["ace/penalized"] == 1
    assert applied(build_term({"name": "ace", "alpha": 0.0}, 1), group, engine, scores)[0] == [-0.5, -0.5]


def test_ace_reads_only_the_policys_tokens_and_leaves_other_trajectories_unchanged(
    engine: LocalEngine,
) -> None:
    tool = replace(
        member(-0.5, (-1.0, -1.0, -1.0)), author=torch.tensor([0, int(Author.ENVIRONMENT), 0])
    ).with_advantage(-0.5)
    foreign = replace(member(-0.5), author=torch.tensor([1, 1]))
    scores = {"policy": torch.tensor([-1.0, 50.0, -1.0]), "reference": torch.tensor([-2.0, 0.0, -2.0])}
    found = applied(build_term({"name": "ace"}, 1), Group(PROBLEM, [tool, foreign]), engine, scores)
    expected = -0.5 * (1 + math.log1p(math.e))
    assert found == [pytest.approx([expected, 0.0, expected]), [-0.5, -0.5]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.9, 0.8, 0.1, 0.95, 0.4, 0.99, 0.9, 0.7, 0.85, 0.6], 0.2),
        ([0.9, 0.5, 0.8, 0.7, 0.95, 0.99, 0.2], 0.3162),
        ([0.3], 0.3),
    ],
)
def test_confidence_is_that_of_the_least_likely_tokens(p: list[float], expected: float) -> None:
    assert confidence(torch.tensor(p).log(), 0.2) == pytest.approx(expected, abs=5e-5)
    exact = torch.tensor([-3.0] * 11 + [-1.0] * 9)  # 0.55 · 20 is 11, and a little more in floating point
    assert confidence(exact, 0.55) == pytest.approx(math.exp(-3))


@pytest.mark.parametrize(
    ("advantage", "sure", "expected"),
    [(1.0, 0.2, 1.15), (1.0, 0.9, 0.8), (-0.5, 0.2, -0.35), (-0.5, 0.9, -0.7)],
)
def test_arm_by_hand(advantage: float, sure: float, expected: float, engine: LocalEngine) -> None:
    group = Group(
        PROBLEM, [member(advantage, [math.log(sure)] * 3), member(0.0, [math.log(0.5)], correct=True)]
    )
    term = build_term({"name": "arm", "alpha": 0.5}, 1)
    assert applied(term, group, engine, {"policy": torch.tensor([math.log(0.5)])})[0] == pytest.approx(
        [expected] * 3
    )
    wrong = Group(PROBLEM, [member(advantage), member(0.0)])
    assert applied(term, wrong, engine, {})[0] == [advantage, advantage]
    unverified = replace(member(0.0), reward=math.nan, correct=None)
    third = Group(PROBLEM, [*group.trajectories, unverified])
    assert applied(term, third, engine, {"policy": torch.tensor([math.log(0.5)])})[2] == [0.0, 0.0]
    lone = Group(PROBLEM, [member(1.0, [math.log(0.2)], prompt=[5]), member(0.0, correct=True, prompt=[5])])
    assert applied(term, lone, engine, {})[0] == pytest.approx(
        [1.4]
    )  # a prompt of one token has confidence 1


def test_arm_scores_a_completion_that_was_sampled_with_a_hint_on_its_plain_prompt(
    engine: LocalEngine,
) -> None:
    """With the hint its tokens had probability .9, without it .2; the prompt has .5: 1 + .5·(.5 − .2)."""
    hinted = replace(member(1.0, [math.log(0.9)] * 2), hint="77 + 8 = 85")
    other = member(0.0, [math.log(0.5)], correct=True)

    def answer(pending: list[Pending]) -> list[Tensor]:
        requests = [each.request for each in pending]
        assert {len(each.prompt_ids) for each in requests} <= {1, 2}
        return [
            torch.full((len(each.token_ids),), 0.5 if len(each.prompt_ids) == 1 else 0.2).log()
            for each in requests
        ]

    term = build_term({"name": "arm", "alpha": 0.5}, 1)
    group = Group(PROBLEM, [hinted, other])
    (found,) = drive([((), term.credit(group, engine.context(0, PROBLEM, "credit")))], answer)
    assert found.trajectories[0].column("advantage").tolist() == pytest.approx([1.15] * 2)
    assert found.trajectories[1].column("advantage").tolist() == [0.0]


def test_arm_counts_the_rollouts_whose_log_probabilities_are_unknown(engine: LocalEngine) -> None:
    group = Group(PROBLEM, [member(1.0, [math.nan, -1.0]), member(0.0, [-1.0], correct=True)])
    found = applied(build_term({"name": "arm"}, 1), group, engine, {"policy": torch.tensor([-1.0])})
    assert found[0] == [1.0, 1.0]
    assert engine.counts["arm/unknown_logp"] == engine.counts["arm/shifted"] == 1


def test_terms_are_built_or_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.terms\[2\]: there is no term 'acee'; did you mean 'ace'"):
        build({"name": "grpo", "terms": [{"name": "ace"}, {"name": "acee"}]}, RolloutConfig())
    with pytest.raises(UserError, match=r"there is no setting method.terms\[1\].alfa; did you mean 'alpha'"):
        build({"name": "grpo", "terms": [{"name": "ace", "alfa": 2.0}]}, RolloutConfig())
    with pytest.raises(UserError, match="is not a subclass of handrail.Term"):
        build({"name": "grpo", "terms": [{"name": "handrail.types.trajectory:Group"}]}, RolloutConfig())
    (tmp_path / "half.py").write_text(HALF)
    method = build(
        {"name": "grpo", "terms": [{"name": f"{tmp_path}/half.py:Half", "factor": 0.5}]}, RolloutConfig()
    )
    assert method.terms[0].model_dump()["factor"] == 0.5


def test_a_term_asks_the_experts_that_its_settings_name() -> None:
    class Judging(Term):
        judge: str = "arithmetic"
        corrector: str | None = None

    assert Judging().experts == {"judge": "arithmetic"} and Term().experts == {}


def test_a_method_that_would_ignore_its_settings_is_refused() -> None:
    described = Sort.Settings(terms=[{"name": "ace"}])
    with pytest.raises(UserError, match="^method.terms: Sort does not build the terms of its settings; make"):
        Sort(described)
    assert Sort(described, terms=[Ace()]).models == {"reference"}
    with pytest.raises(UserError, match="^the setting method.cache is missing$"):
        METHODS["npo"]()


HALF = """
from handrail import Context, Group, Term

class Half(Term):
    factor: float = 0.5

    async def credit(self, group: Group, ctx: Context) -> Group:
        ctx.counts["half/groups"] += 1
        def scale(member):
            return member.with_columns(advantage=member.column("advantage") * self.factor)

        return group.map(scale)
"""


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def trained(directory: Path, **method: Any) -> list[dict[str, Any]]:
    """Return the trajectories of the first step of a run on problems that are sometimes solved."""
    hot = {"group_size": 4, "max_tokens": 48, "temperature": 2.0}
    train(config(data={"train": f"{EASY}&n=64"}, method=method, rollout=hot, train={"steps": 2}), directory)
    return [row for row in samples(directory) if row["step"] == 1]


def test_sort_and_ace_by_configuration_through_the_real_loop(tmp_path: Path) -> None:
    """Before the first update the policy equals the model before training, so every negative advantage is
    scaled by 1 + log 2."""
    plain = trained(tmp_path / "plain", name="sort")
    with_ace = trained(tmp_path / "ace", name="sort", terms=[{"name": "ace"}])
    changed = 0
    for before, after in zip(plain, with_ace, strict=True):
        assert before["tokens"] == after["tokens"]
        for one, other in zip(before["advantage"], after["advantage"], strict=True):
            assert other == pytest.approx(one * (1 + math.log(2)) if one < 0 else one, rel=1e-4)
            changed += one < 0
    assert changed
    halved = trained(tmp_path / "three", name="sort", terms=[{"name": "ace"}, {"name": "imentor"}])
    assert any(one["advantage"] != other["advantage"] for one, other in zip(with_ace, halved, strict=True))


@pytest.mark.parametrize(
    ("off", "key"),
    [
        ({"name": "dmpo", "matching_coef": 0.0}, "gradient_weight"),
        ({"name": "calibrl", "calibration_coef": 0.0}, "gradient_weight"),
        ({"name": "grpo", "terms": [{"name": "arm", "alpha": 0.0}]}, "advantage"),
        ({"name": "grpo", "terms": [{"name": "pacr", "step_coef": 0.0}]}, "advantage"),
    ],
)
def test_objectives_change_what_a_run_trains(off: dict[str, Any], key: str, tmp_path: Path) -> None:
    """Without its coefficient, the same rollouts have other gradients; a term changes only advantages."""
    on = {name: value for name, value in off.items() if not name.endswith("_coef")}
    on |= {"terms": [{"name": term["name"]} for term in off["terms"]]} if "terms" in off else {}
    before, after = trained(tmp_path / "off", **off), trained(tmp_path / "on", **on)
    assert [row["tokens"] for row in before] == [row["tokens"] for row in after]
    assert [row[key] for row in before] != [row[key] for row in after]


def test_a_users_term_through_the_real_loop(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(HALF)
    plain = trained(tmp_path / "plain", name="grpo")
    halved = trained(tmp_path / "half", name="grpo", terms=[{"name": f"{tmp_path}/half.py:Half"}])
    for before, after in zip(plain, halved, strict=True):
        assert after["advantage"] == pytest.approx([value / 2 for value in before["advantage"]], rel=1e-4)
    assert '"half/groups": 4' in (tmp_path / "half/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_object_pickles(name: str, tmp_path: Path) -> None:
    terms = [{"name": "ace", "alpha": 0.5}] if METHODS[name].uses_advantages else []
    (tmp_path / "answers.jsonl").write_text("{}\n")
    needed = {"npo": {"cache": str(tmp_path / "answers.jsonl")}}.get(name, {})
    method = build({"name": name, "terms": terms, **needed}, RolloutConfig(group_size=4))
    twin = pickle.loads(pickle.dumps(method))
    assert (twin.settings, twin.group_size, twin.terms) == (method.settings, 4, method.terms)


OWN = """
from handrail import Method
from handrail.methods.base import GrpoSettings

class MineSettings(GrpoSettings):
    strength: float = 1.0

class Mine(Method[MineSettings]):
    Settings = MineSettings
"""
ELSEWHERE = """
import pickle, sys
from handrail.methods import find
find(sys.argv[1])  # as any process of a run does, from its configuration
method = pickle.load(sys.stdin.buffer)
print(type(method).__name__, method.settings.strength, method.group_size)
"""


def test_a_method_from_a_file_pickles_into_a_process_that_has_loaded_the_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path}/own.py:Mine"
    method = build({"name": name, "strength": 0.5}, RolloutConfig(group_size=4))
    command = [sys.executable, "-c", ELSEWHERE, name]
    done = subprocess.run(command, input=pickle.dumps(method), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["Mine", "0.5", "4"]


# DMPO


def matching(rewards: Sequence[float], likelihoods: Sequence[float]) -> tuple[float, list[float]]:
    """Return (loss / λ, its gradient by mean log-probability) of a group of single tokens."""
    group = Group(
        PROBLEM,
        [
            replace(member(0.0, [value]), reward=reward)
            for reward, value in zip(rewards, likelihoods, strict=True)
        ],
    )
    logps = [torch.tensor([value], requires_grad=True) for value in likelihoods]
    loss = mismatch(group.trajectories, logps, 1 / 15)
    return loss.item(), [float(gradient[0]) for gradient in torch.autograd.grad(loss, logps)]


def test_dmpos_objective_by_hand() -> None:
    loss, gradient = matching([1, 0, 0, 1], [-0.5, -0.6, -0.7, -1.2])
    assert loss == pytest.approx(0.074766, abs=1e-6)
    assert gradient == pytest.approx([-0.03430, 0.03506, 0.02832, -0.02909], abs=1e-5)
    assert matching([0, 0, 0, 0], [-0.5, -0.6, -0.7, -1.2])[0] == pytest.approx(0.003455, abs=1e-6)
    loss, gradient = matching([1, 0], [-1.0, -0.5])
    assert loss == pytest.approx(0.38746, abs=1e-5) and gradient == pytest.approx(
        [-0.29256, 0.29256], abs=1e-5
    )
    assert matching([1] + [0] * 7, [-0.5] * 8)[1] == pytest.approx([-0.02734] + [0.00391] * 7, abs=1e-5)
    assert matching([1] + [0] * 7, [-3.0] + [-0.5] * 7)[1][0] == pytest.approx(-0.00324, abs=1e-5)


@pytest.mark.parametrize("budget", [10**6, 60])
def test_dmpos_gradient_is_that_of_direct_autograd(
    budget: int, policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """GRPO's part is removed by equal weights on both sides. DMPO's update minus GRPO's must equal autograd's
    gradient of −λ·mean (p − q)²."""
    texts = ("# 70", "77 + 8 = 85 ; 85 * 2 = 70 # 70", "77 * 2 = 54 # 54", "85")
    groups = [
        Group(
            PROBLEM,
            [rollout(policy, text, reward) for text, reward in zip(texts, (1.0, 1.0, 0.0, 0.0), strict=True)],
        )
    ]
    groups.append(
        Group(replace(PROBLEM, id="q"), [rollout(policy, text, float(text == "# 70")) for text in texts])
    )
    method = build({"name": "dmpo"}, RolloutConfig(group_size=4))
    credited = engine.credit(method, groups)
    bare = [group.map(lambda each: each.with_advantage(0.0)) for group in credited]
    found, _ = gradients(method, policy, bare, budget)
    model = copy.deepcopy(policy.model)
    twin = copy.copy(policy)
    twin.model = model
    for group in groups:
        logps = [live(twin, each) for each in group.trajectories]
        (2.0 * mismatch(group.trajectories, logps, 1 / 15) / len(groups)).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    scale = torch.nn.utils.get_total_norm(expected)
    difference = torch.nn.utils.get_total_norm(
        [one - other for one, other in zip(found, expected, strict=True)]
    )
    assert scale > 0 and difference / scale < 1e-5
    assert_equal(found, expected)


def test_dmpo_matches_only_members_of_the_baseline_with_a_known_reward(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """What is imitated or unverified changes neither p nor q, and has no gradient of the objective."""
    texts = ("# 70", "77 + 8 = 85 ; 85 * 2 = 70 # 70", "85")
    plain = [rollout(policy, text, reward) for text, reward in zip(texts, (1.0, 0.0, 0.5), strict=True)]
    unknown = replace(rollout(policy, "# 1", math.nan), correct=None)
    outside = imitated(rollout(policy, "# 2", 1.0))
    method = build({"name": "dmpo"}, RolloutConfig(group_size=4))
    (alone,) = engine.credit(method, [Group(PROBLEM, plain)])
    (beside,) = engine.credit(method, [Group(PROBLEM, [outside, plain[0], unknown, *plain[1:]])])
    found = [each.column("linear_weight") for each in beside.trajectories]
    assert not found[0].any() and not found[2].any()
    for one, other in zip(alone.trajectories, [found[1], *found[3:]], strict=True):
        assert one.column("linear_weight").any()
        torch.testing.assert_close(one.column("linear_weight"), other, rtol=1e-4, atol=1e-7)
    assert beside.trajectories[0].column("imitation_weight").all()
    (lonely,) = engine.credit(method, [Group(PROBLEM, [unknown, outside])])
    assert not lonely.trajectories[0].has_signal and not lonely.trajectories[1].column("linear_weight").any()


def live(policy: TrainablePolicy, each: Trajectory) -> Tensor:
    """Return log π [T] with gradient, by a plain forward pass over prompt and completion."""
    ids = torch.tensor([each.prompt_ids + each.tokens])
    logits = policy.model(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1].log_softmax(-1)
    return torch.as_tensor(logits[torch.arange(len(each)), each.predicted])


def test_groups_of_equal_rewards_are_skipped_by_default(policy: TrainablePolicy, engine: LocalEngine) -> None:
    groups = [Group(PROBLEM, [rollout(policy, text, 0.0) for text in ("# 1", "# 22")])]
    (masked,) = engine.credit(build({"name": "dmpo"}, RolloutConfig()), groups)
    (equalized,) = engine.credit(build({"name": "dmpo", "mask_uniform": False}, RolloutConfig()), groups)
    assert not masked.has_signal and equalized.has_signal


def test_a_model_that_was_not_declared_is_refused(engine: LocalEngine) -> None:
    async def undeclared() -> Any:
        return await Score([5], torch.tensor([6]), model="reference")

    with pytest.raises(UserError, match="no model 'reference' to score with; declare it"):
        engine.run([((), undeclared())])


def test_terms_are_refused_by_methods_without_advantages() -> None:
    with pytest.raises(UserError, match="method.terms: sft-on-failures has no advantages"):
        build({"name": "sft-on-failures", "terms": [{"name": "arm"}]}, RolloutConfig())


class CoupledSft(GrpoSft):
    """DMPO's objective on top of imitation, as a user's method might combine them."""

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        credited = await super().credit(group, ctx)
        assert credited is not None
        return await linearized(
            credited,
            credited.trajectories,
            lambda members, logps: torch.stack([each.mean() for each in logps]).prod(),
        )


@pytest.mark.parametrize("references", [(), ("77 + 8 = 85 ; 85 * 2 = 70 # 70",)])
def test_a_coupled_objective_is_exact_in_combination_with_imitation(
    references: tuple[str, ...], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """The update with the objective, minus the update without it, must equal autograd's gradient of the
    objective."""
    problem = replace(PROBLEM, references=references)
    groups = [Group(problem, [rollout(policy, text, 0.0) for text in ("# 70", "85")])]
    method = CoupledSft(CoupledSft.Settings(), group_size=2)
    guided = [each for found in engine.guide(method, groups) for each in found]
    credited = engine.credit(method, guided)
    found, _ = gradients(method, policy, credited, budget=60)
    bare = [
        group.map(lambda each: each.with_columns(linear_weight=torch.zeros(len(each)))) for group in credited
    ]
    without, _ = gradients(method, policy, bare, budget=60)
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model)
    means = [live(twin, each).mean() for group in credited for each in group.trajectories]
    (-torch.stack(means).prod()).backward()
    expected = [parameter.grad for parameter in twin.model.parameters()]
    ours = [one - other for one, other in zip(found, without, strict=True)] if without else found
    assert_equal(ours, expected)


def test_a_surrogate_gets_default_values_for_a_missing_column(
    policy: TrainablePolicy,
) -> None:
    batch = micro_batch([empty_sample(policy)]).tokens
    assert batch["mine"].tolist() == [[0.0]] and batch["plan_logp"].isnan().all()


def test_truncating_an_imitated_trajectory_keeps_it_out_of_the_baseline() -> None:
    whole = replace(
        member(1.0, (-1.0, -2.0, -3.0)), in_baseline=False, correct=True, reward=1.0, text="whole"
    )
    cut = whole.truncate(2)
    assert (len(cut), cut.in_baseline, cut.correct, cut.text) == (2, False, None, "")
    assert math.isnan(cut.reward)
    assert cut.column("sampling_logp").tolist() == [-1.0, -2.0]
