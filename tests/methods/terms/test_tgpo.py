"""TGPO: a teacher's likeliest tokens, as a bonus and as targets, by hand and against plain autograd."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from handrail import (
    Author,
    Group,
    LocalEngine,
    Score,
    TopTokens,
    TrainablePolicy,
    UserError,
    gather,
    load_problems,
    train,
)  # fmt: skip
from handrail.experts.config import ExpertsConfig
from handrail.experts.registry import Experts
from handrail.methods import build
from handrail.methods.batch import Sample, token_batch
from handrail.methods.losses import token_loss
from handrail.methods.requests import Request
from handrail.methods.terms import build_term
from handrail.methods.terms.tgpo import faded
from handrail.methods.tgpo import Tgpo
from handrail.models.config import RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.training.samples import sample_rows
from tests.conftest import HARD, config
from tests.methods.terms.scripted import PROBLEM, advantages, close, grpo, lines, member, verb
from tests.methods.test_terms import live
from tests.tiny_models import save_chat_model
from tests.training.test_update import assert_equal, gradients

TINY = Path("handrail/models/builtin/house-tiny")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone with other weights, and with a token more, which it likes best of all."""
    directory = tmp_path_factory.mktemp("teacher")
    model, words = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        words.add_tokens(["<|more|>"])
        model.resize_token_embeddings(len(words), mean_resizing=False)
        model.get_output_embeddings().weight[-1] *= 1000
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


@pytest.fixture
def taught(engine: LocalEngine, teacher: Path) -> LocalEngine:
    engine.experts = Experts(
        ExpertsConfig(teacher=str(teacher)),
        load=lambda path, field: TransformersPolicy(path, config().rollout, field=field),
        policy=engine.policy,
    )
    return engine


@pytest.mark.parametrize(
    ("step", "reg", "adv"),
    [(1, 0.002, 0.02), (51, 0.0015, 0.015), (101, 0.001, 0.01), (201, 0.0, 0.0), (900, 0, 0)],
)
def test_the_coefficient_falls(step: int, reg: float, adv: float) -> None:
    assert faded(0.002, 1e-5, step) == pytest.approx(reg, abs=1e-12)
    assert faded(0.02, 1e-4, step) == pytest.approx(adv, abs=1e-12)
    assert step < 201 or faded(0.02, 1e-4, step) == faded(0.002, 1e-5, step) == 0


def by_hand(request: Request) -> Tensor:
    """A teacher that would say token 3 everywhere, which the policy finds .3 likely."""
    assert isinstance(request, TopTokens | Score)
    if isinstance(request, TopTokens):
        return torch.full_like(request.token_ids, 3)
    assert request.targets is not None and request.targets.unique().tolist() == [3]
    return torch.full((len(request.token_ids),), 0.3).log()


def test_the_advantage_variant_by_hand(policy: TrainablePolicy, engine: LocalEngine) -> None:
    group = Group(PROBLEM, [member(policy, "77 8", float(place == 0)) for place in range(8)])
    method = grpo({"name": "tgpo"}, std_epsilon=1e-6)
    found, counts = verb(method, "credit", group, engine, by_hand, step=51)
    assert advantages(found) == [close([2.4794] * 2), *[close([-0.3491] * 2)] * 7]
    assert counts["tgpo/tokens"] == 16
    late, _ = verb(method, "credit", group, engine, by_hand, step=201)
    assert advantages(late) == [close([2.4749] * 2), *[close([-0.3536] * 2)] * 7]
    unverified = Group(PROBLEM, [member(policy, "77 8", float("nan"), correct=None)])
    found, counts = verb(method.terms[0], "credit", unverified, engine, by_hand)
    assert advantages(found) == [[0.0, 0.0]] and not counts["tgpo/tokens"]
    foreign = replace(member(policy, "77 8"), author=torch.tensor([0, int(Author.TEACHER)]))
    found, _ = verb(method.terms[0], "credit", Group(PROBLEM, [foreign]), engine, by_hand)
    assert advantages(found) == [close([0.006, 0.0], 1e-7)]


def test_a_group_of_one_has_mean_0_and_deviation_1(policy: TrainablePolicy) -> None:
    method = build({"name": "tgpo"}, RolloutConfig(group_size=1))
    for reward in (1.0, 0.0):
        found = method.advantages(Group(PROBLEM, [member(policy, "77", reward)]))
        assert advantages(found) == [close([reward], 2e-6)]
    unverified = method.advantages(Group(PROBLEM, [member(policy, "77", float("nan"), correct=None)]))
    assert advantages(unverified) == [[0.0]]


def test_the_regularizer_by_hand(policy: TrainablePolicy, taught: LocalEngine) -> None:
    """Three tokens and a pad: mean −1.5, times .002."""
    method = build({"name": "tgpo"}, RolloutConfig(group_size=2))
    taught.begin(1)
    ((found,),) = taught.guide(method, [Group(PROBLEM, [member(policy, "77"), member(policy, "8 9")])])
    added = found.imitated
    batch = token_batch([Sample(each, 0.0, 1 / 3) for each in added])
    logp = torch.tensor([[-0.5, 99.0], [-1.0, -3.0]])
    assert token_loss(method, logp, batch).item() == pytest.approx(0.0030, abs=1e-7)


def test_the_teachers_tokens_are_those_of_a_plain_forward_pass(
    policy: TrainablePolicy, taught: LocalEngine, teacher: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    members = [member(policy, text, end=True) for text in ("77 + 8 = 85 ; 85 * 2 = 70 # 70", "8")]

    async def asked() -> Any:
        requests = [
            request
            for each in members
            for request in (
                TopTokens(each.prompt_ids, each.token_ids, "teacher"),
                Score(each.prompt_ids, each.token_ids, "teacher"),
                TopTokens(each.prompt_ids, each.token_ids),
            )
        ]
        return await gather(*requests)

    (found,) = taught.run([((), asked())])
    known, foreign = len(policy.tokenizer), 0
    for each, (top, logp, own) in zip(members, (found[:3], found[3:]), strict=True):
        ids = torch.tensor([each.prompt_ids + each.tokens])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1]
            ours = policy.model(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1]
        assert top.tolist() == logits[:, :known].argmax(-1).tolist() and top.dtype == torch.int64
        foreign += int((logits.argmax(-1) >= known).sum())
        assert logp.tolist() == close(
            logits.log_softmax(-1)[torch.arange(len(each)), each.token_ids].tolist(), 2e-3
        )
        assert own.tolist() == ours.argmax(-1).tolist()
    assert foreign  # the token that the policy lacks would have been the likeliest at some positions


@pytest.mark.parametrize("budget", [10**6, 30])
def test_the_regularizers_gradient_is_that_of_direct_autograd(
    budget: int, policy: TrainablePolicy, taught: LocalEngine
) -> None:
    """Rollouts of equal rewards have no other gradient; the mean is over all tokens of the update."""
    method = build({"name": "tgpo", "entropy_bonus": 0.0, "coef": 1.0}, RolloutConfig(group_size=2))
    texts = ("77 + 8 = 85 ; 85 * 2 = 70 # 70", "# 70", "77 * 2 = 54")
    groups = [Group(PROBLEM, [member(policy, text) for text in texts[:2]])]
    groups.append(Group(replace(PROBLEM, id="q"), [member(policy, texts[2], end=True)] * 2))
    taught.begin(1)
    guided = [each for found in taught.guide(method, groups) for each in found]
    credited = taught.credit(method, guided)
    found, _ = gradients(method, policy, credited, budget)
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model)
    rows = [live(twin, each) for group in credited for each in group.imitated]
    (-torch.cat(rows).mean()).backward()
    assert_equal(found, [parameter.grad for parameter in twin.model.parameters()])


def test_targets_follow_a_trajectory_that_is_cut_and_joined(policy: TrainablePolicy) -> None:
    whole = replace(member(policy, "77 8 9"), targets=torch.tensor([1, 2, 3]))
    cut = whole.truncate(2)
    assert cut.targets is not None and cut.targets.tolist() == [1, 2]
    joined = cut.append([7], Author.TEACHER, False)
    assert joined.targets is not None and joined.targets.tolist() == [1, 2, 7]
    assert member(policy, "77").append([7], Author.TEACHER, False).targets is None
    assert joined.predicted.tolist() == [1, 2, 7] and member(policy, "77").predicted.tolist() != [7]


def test_what_is_trained_is_in_the_samples(policy: TrainablePolicy, taught: LocalEngine) -> None:
    method = build({"name": "tgpo"}, RolloutConfig(group_size=2))
    taught.begin(1)
    ((guided,),) = taught.guide(method, [Group(PROBLEM, [member(policy, "77 8")])])
    plain, row = sample_rows(1, taught.credit(method, [guided]), method, policy)
    assert "targets" not in plain and len(row["targets"]) == 2 and row["author"] == ["teacher"] * 2
    assert row["gradient_weight"] == close([0.002, 0.002], 1e-6)


def test_through_the_loop_the_policy_comes_to_say_what_its_teacher_would(
    policy: TrainablePolicy, teacher: Path, tmp_path: Path
) -> None:
    """Both variants at once. The problems are never solved, so that there is hardly another gradient."""
    settings = config(
        method={"name": "tgpo", "coef": 1.0, "entropy_bonus": 0.0, "terms": [{"name": "tgpo"}]},
        experts={"teacher": str(teacher)},
        rollout={"max_tokens": 24},
        train={"steps": 3, "samples_every": 0},
    )
    train(settings, tmp_path / "run")
    rows = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert all(0 < row["tgpo/agreeing"] <= row["tgpo/tokens"] == 2 * row["tokens/sampled"] for row in rows)
    expert = TransformersPolicy(str(teacher))
    problems = load_problems(f"{HARD}&n=8")
    prompts = [policy.renderer.prompt(problem) for problem in problems]
    completions = [policy.renderer.completion(problem.references[0]) for problem in problems]
    top = expert.top_tokens(prompts, completions, vocabulary=len(policy.tokenizer))
    before, after = (
        torch.cat(model.score(prompts, completions, targets=top)).mean()
        for model in (policy, TransformersPolicy(str(tmp_path / "run/model")))
    )
    assert after > before + 0.05


def test_a_teacher_is_needed_and_must_have_the_policys_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs experts.teacher, a local causal language model"):
        train(config(method={"name": "tgpo"}), tmp_path / "run")
    other = save_chat_model(tmp_path / "other")
    settings = config(method={"name": "grpo", "terms": [{"name": "tgpo"}]}, experts={"teacher": str(other)})
    with pytest.raises(UserError, match="experts.teacher: .*other does not have .* by the same id"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_only_the_policy_and_the_teacher_are_asked_for_tokens(taught: LocalEngine) -> None:
    async def asked() -> Any:
        return await TopTokens([5], torch.tensor([6]), "reference")

    with pytest.raises(UserError, match="no likeliest tokens of 'reference'"):
        taught.run([((), asked())])


def test_the_term_needs_the_teacher() -> None:
    assert build_term({"name": "tgpo"}, 1).models == {"teacher"}
    assert Tgpo().models == {"teacher"}
