"""Groups that use a tool: the environment's tokens are read, but neither trained nor counted."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from handrail import Author, Context, Group, Problem, Score, Trajectory, train
from handrail.engines.local import LocalEngine
from handrail.experts.config import ExpertsConfig
from handrail.experts.registry import Experts
from handrail.methods import build
from handrail.methods.batch import Sample, micro_batch
from handrail.methods.losses import token_loss
from handrail.methods.normalizers import Normalizers
from handrail.methods.sort import Sort
from handrail.methods.terms import TERMS
from handrail.models.config import RolloutConfig
from handrail.models.trainable import TrainablePolicy
from handrail.training.policies import load_trainable_policy
from handrail.verifiers.pool import VerifierPool
from tests.conftest import HARD, config
from tests.training.test_update import assert_equal, gradients

PROBLEM = Problem("p", "77 A 8 ?", "70", ("77 + 8 = 85 ; 85 * 2 = 70 # 70",), "add double")
Turn = tuple[Author, str]
POLICY, TOOL = Author.POLICY, Author.ENVIRONMENT


def conversation(turns: Sequence[Turn], prompt_ids: list[int], encode: Any) -> Trajectory:
    out = Trajectory.by(POLICY, prompt_ids, [])
    for place, (author, text) in enumerate(turns):
        last = place == len(turns) - 1
        out = out.append(encode(text, end=last), author, finished=last)
    return replace(out, text=" ".join(text for _, text in turns))


def tool_group(policy: TrainablePolicy, answers: Sequence[str]) -> Group:
    members = []
    for answer in answers:
        turns = [(POLICY, "77 + 8 ="), (TOOL, "85 85 85 85 85 ;"), (POLICY, f"85 * 2 = 70 # {answer}")]
        bare = conversation(turns, policy.renderer.prompt(PROBLEM), policy.renderer.completion)
        (logp,) = policy.score([bare.prompt_ids], [bare.token_ids])
        sampled = torch.where(bare.trained, logp - 0.1, torch.nan)
        known = bare.with_columns(sampling_logp=sampled, old_logp=sampled)
        members.append(replace(known, correct=answer == "70", reward=float(answer == "70")))
    return Group(PROBLEM, members)


def test_environment_tokens_have_no_advantage_no_weight_and_no_share_in_a_normalizer(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    group = tool_group(policy, ["70", "1", "2"])
    assert len(group.rollouts) == 3 and group.mixed
    (credited,) = engine.credit(build({"name": "grpo"}, RolloutConfig()), [group])
    for member in credited.trajectories:
        tool = member.author == TOOL
        assert (
            tool.sum() == 6
            and (member.column("advantage")[tool] == 0).all()
            and (member.column("advantage")[~tool] != 0).all()
        )
        assert member.trained_tokens == len(member) - 6
    assert Normalizers.of([group]).tokens == sum(len(member) - 6 for member in group.trajectories)
    batch = micro_batch(
        [Sample(member, 1.0, entropy_coef=0.1, kl_coef=0.1) for member in credited.trajectories]
    ).tokens
    at_tool = batch.author == TOOL
    for column in (batch.mask, batch.advantage, batch.imitation_weight, batch.entropy_coef, batch.kl_coef):
        assert (column[at_tool] == 0).all()


WITH_SMALL_NETWORKS = {"name": "imentor", "prompt_tokens": 8, "response_tokens": 48}


@pytest.mark.parametrize(
    "settings",
    [
        *({"name": "grpo", "terms": [{"name": name}]} for name in TERMS if name != "imentor"),
        {"name": "grpo", "terms": [WITH_SMALL_NETWORKS]},
        {"name": "dmpo"},
        {"name": "calibrl"},
        {"name": "tgpo"},
    ],
    ids=lambda settings: "-".join([settings["name"], *(term["name"] for term in settings.get("terms", []))]),
)
def test_no_term_and_no_method_gives_environment_tokens_credit_or_a_share(
    settings: dict[str, Any], verifier: VerifierPool
) -> None:
    """The teacher and the model before training are the policy itself."""
    policy = load_trainable_policy(config(), Accelerator(cpu=True), keep_start=True)
    engine = LocalEngine(policy, verifier, Experts(ExpertsConfig(), policy=policy))
    engine.experts.white_box = lambda policy: policy  # type: ignore[method-assign]
    method = build(settings, RolloutConfig(group_size=3))
    engine.begin(1)
    graded = engine.reward(method, [tool_group(policy, ["70", "1", "2"])])
    guided = [group for found in engine.guide(method, graded) for group in found]
    for term in method.terms:
        term.learn([term.observe(group) for group in guided])
    (credited,) = engine.credit(method, guided)
    assert any(member.has_signal for member in credited.trajectories)
    for member in credited.trajectories:
        for name in ("advantage", "imitation_weight", "linear_weight"):
            assert (member.column(name)[~member.trained] == 0).all(), name
        assert member.trained_tokens == len(member) - 6
    members = credited.trajectories
    batch = micro_batch([Sample(each, 1.0, 1.0, 1.0) for each in members]).tokens
    at_tool = batch.author == TOOL
    logp = torch.full(batch.mask.shape, -1.0)
    assert at_tool.sum() == 6 * len(members) and not batch.mask[at_tool].any()
    # What the model says of the tool's tokens changes no objective.
    other = torch.where(at_tool, -9.0, logp)
    assert token_loss(method, other, batch) == token_loss(method, logp, batch)


@pytest.mark.parametrize(
    "settings", [{}, {"loss_normalizer": "token"}, {"ratio": "sequence", "clip_low": 0.3, "clip_high": 0.4}]
)
def test_the_gradient_is_that_of_the_policys_tokens_alone(
    settings: dict[str, Any], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    method = build({"name": "grpo", **settings}, RolloutConfig())
    credited = engine.credit(method, [tool_group(policy, ["70", "1", "2"])])
    model = copy.deepcopy(policy.model).double()
    members = credited[0].trajectories
    own = [int((member.author == POLICY).sum()) for member in members]
    for member, length in zip(members, own, strict=True):
        ids = torch.tensor([member.prompt_ids + member.tokens])
        logits = model(input_ids=ids).logits[0, len(member.prompt_ids) - 1 : -1].log_softmax(-1)
        kept = member.author == POLICY
        logp = logits[torch.arange(len(member)), member.token_ids][kept]
        log_ratio = logp - member.column("sampling_logp")[kept].double()
        if settings.get("ratio"):
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        advantage = member.column("advantage")[kept].double()
        low, high = settings.get("clip_low", 0.2), settings.get("clip_high", 0.2)
        value = torch.minimum(
            log_ratio.exp() * advantage, log_ratio.exp().clamp(1 - low, 1 + high) * advantage
        )
        scale = sum(own) if settings.get("loss_normalizer") else 3 * length
        (-value.sum() / scale).backward()
    expected = [parameter.grad.float() for parameter in model.parameters()]
    found, _ = gradients(method, policy, credited, budget=100)
    assert_equal(found, expected)


class ToolUsing(Sort):
    """SORT on rollouts that call a tool and still fail."""

    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        members = []
        for answer in ("1", "2"):
            turns = [(POLICY, "1 + 1 ="), (TOOL, "2 2 2 ;"), (POLICY, f"# {answer}")]
            bare = conversation(turns, ctx.renderer.prompt(group.problem), ctx.renderer.completion)
            logp = await Score(bare.prompt_ids, bare.token_ids)
            members.append(bare.with_columns(sampling_logp=logp, old_logp=logp))
        return await super().reward(replace(group, trajectories=members), ctx)


def test_sort_acts_on_a_tool_using_group_that_is_all_wrong_through_the_real_loop(tmp_path: Path) -> None:
    train(config(data={"train": f"{HARD}&n=8"}, train={"steps": 1}), tmp_path / "run", method=ToolUsing)
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert metrics["groups/all_wrong"] == metrics["groups/guided"] == 4 and metrics["rollouts"] == 8
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    rollouts = [row for row in rows if row["role"] == "trajectory"]
    assert {row["author"].count("environment") for row in rollouts} == {4}
    assert (
        metrics["tokens/sampled"]
        == sum(len(row["tokens"]) - 4 for row in rollouts)
        == metrics["tokens/dropped"]
    )
    references = [row for row in rows if row["role"] == "imitated"]
    assert metrics["tokens/trained"] == sum(len(row["tokens"]) for row in references) > 0
