"""SCOPE: which rollouts are repaired and from where, the tokens of a repair, and their credit and
gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from handrail import train
from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.engines.local import LocalEngine
from handrail.experts.correctors import Correction, Draft
from handrail.experts.judges import Scores
from handrail.experts.steps import Prefixes, split_steps
from handrail.methods import build
from handrail.methods.batch import Sample, token_batch
from handrail.methods.normalizers import Normalizers
from handrail.methods.requests import drive
from handrail.methods.scope import Scope
from handrail.models.config import RolloutConfig
from handrail.models.hf import TransformersPolicy
from handrail.training.policies import load_experts, load_policy
from handrail.training.samples import sample_rows
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from tests.conftest import EASY, HARD, config
from tests.tiny_models import save_chat_model

POLICY, REFERENCE = int(Author.POLICY), int(Author.REFERENCE)


class TrueSteps:
    """A judge that knows the right steps of a house-rules problem."""

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        return [self.scores(problem.metadata["steps"], steps) for problem, steps in attempts]

    @staticmethod
    def scores(right: list[str], steps: list[str]) -> Scores:
        return [
            float(at < len(right) and step.split("#")[0].strip(" ;") == right[at])
            for at, step in enumerate(steps)
        ]


class Silent:
    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        return [None for _ in attempts]


TRUE_STEPS = "tests.methods.test_scope:TrueSteps"


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Return a problem of three known rules, which the backbone follows with hardly an error."""
    return next(
        problem
        for problem in load_problems(f"{EASY}&n=64")
        if len(problem.metadata["steps"]) == 3 and "99" not in problem.answer
    )


def make(**settings: Any) -> Scope:
    method = build(
        {"name": "scope", "judge": TRUE_STEPS, **settings}, RolloutConfig(group_size=4, max_tokens=48)
    )
    assert isinstance(method, Scope)
    return method


@pytest.mark.parametrize("name", ["scope", "int", "cso"])
def test_a_step_of_more_than_step_tokens_is_dropped(name: str, problem: Problem, engine: LocalEngine) -> None:
    """The step has five tokens, its ending is not counted; the reference's steps and whole ends pass."""
    ctx = engine.context(0, problem, "guide")

    def corrected(longest: int, author: Author = Author.TEACHER, whole: bool = False) -> bool:
        method = build({"name": name, "step_tokens": longest}, RolloutConfig())
        written = Correction("1 + 1 = 2 ; ", complete=False, author=author)
        flow = method.correction(Draft(problem, []), 0, ctx, "own", whole=whole)  # type: ignore[attr-defined]
        return drive([((), flow)], lambda asked: [written] * len(asked)) == [written]

    assert corrected(5) and not ctx.counts[f"{name}/step_too_long"]
    assert not corrected(4) and ctx.counts[f"{name}/step_too_long"] == 1
    assert corrected(4, Author.REFERENCE) and corrected(4, whole=True)


def guide(method: Scope, members: list[Trajectory], problem: Problem, engine: LocalEngine) -> Group:
    ((group,),) = engine.guide(method, [Group(problem, members)])
    return group


def rollout(
    engine: LocalEngine, problem: Problem, text: str, reward: float = 0.0, finished: bool = True
) -> Trajectory:
    completion = engine.policy.renderer.completion(text, end=finished)
    bare = Trajectory.by(Author.POLICY, engine.policy.renderer.prompt(problem), completion, text, finished)
    logp = torch.tensor([-0.25 - at for at in range(len(completion))])
    return replace(bare.with_columns(sampling_logp=logp, old_logp=logp), reward=reward, correct=reward == 1)


def wrong_from(problem: Problem, step: int) -> str:
    """Return the problem's reference with every result from a step on replaced by 99."""
    steps = split_steps(problem.references[0])
    spoilt = [
        " ".join("99" if before == "=" else word for before, word in pairwise(["", *words]))
        for words in map(str.split, steps[step:])
    ]
    return "".join(steps[:step]) + " ".join(spoilt).split("#")[0] + "# 99 99 99"


def test_a_repair_has_kept_steps_a_reference_step_and_the_policys_continuation(
    engine: LocalEngine, problem: Problem
) -> None:
    failed = rollout(engine, problem, wrong_from(problem, 1))
    group = guide(make(), [failed, replace(failed)], problem, engine)
    repaired, untouched = group.trajectories
    assert untouched.judged == list(zip(split_steps(failed.text), [1.0, 0.0, 0.0], strict=True))
    assert untouched.is_rollout and untouched.tokens == failed.tokens and not untouched.reward
    assert repaired.judged == [(split_steps(failed.text)[0], 1.0)]
    assert repaired.text == problem.references[0] and repaired.reward == 1 and repaired.finished
    assert repaired.tokens == engine.policy.renderer.completion(problem.references[0])
    first, second, _ = (len(step.split()) for step in split_steps(problem.references[0]))
    third = len(repaired) - first - second
    assert repaired.author.tolist() == [POLICY] * first + [REFERENCE] * second + [POLICY] * third
    sampled = repaired.column("sampling_logp")
    assert sampled[:first].equal(failed.column("sampling_logp")[:first])
    assert sampled[first : first + second].isnan().all()
    expected = engine.policy.score([repaired.prompt_ids], [repaired.token_ids])[0][first + second :]
    assert sampled[first + second :].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (
        engine.counts["scope/repaired"] == 1
        and engine.counts["scope/failed"] == 2
        and engine.counts["tokens/resampled"] == third
    )


def test_suffix_mode_copies_to_the_end(engine: LocalEngine, problem: Problem) -> None:
    group = guide(
        make(mode="suffix", placing="append"),
        [rollout(engine, problem, wrong_from(problem, 2))],
        problem,
        engine,
    )
    failed, repaired = group.trajectories
    start = sum(len(step.split()) for step in split_steps(problem.references[0])[:2])
    assert repaired.author.tolist() == [POLICY] * start + [REFERENCE] * (len(repaired) - start)
    assert failed.reward == 0 and repaired.reward == 1 and engine.counts["tokens/resampled"] == 0


def test_attempts_with_the_largest_right_share_are_repaired(engine: LocalEngine, problem: Problem) -> None:
    texts = [wrong_from(problem, 1), wrong_from(problem, 2), wrong_from(problem, 0)]
    members = [rollout(engine, problem, text) for text in texts]
    one = guide(make(), members, problem, engine)
    assert [member.reward for member in one.trajectories] == [0, 1, 0]
    two = guide(make(repairs=2), members, problem, engine)
    assert [member.reward for member in two.trajectories] == [1, 1, 0]
    picky = guide(make(repairs=2, min_correct_prefix=0.5), members, problem, engine)
    assert [member.reward for member in picky.trajectories] == [0, 1, 0]


def outcome(
    engine: LocalEngine, problem: Problem, text: str, finished: bool = True, **settings: Any
) -> tuple[dict[str, int], Trajectory]:
    engine.counts.clear()
    group = guide(make(**settings), [rollout(engine, problem, text, finished=finished)], problem, engine)
    return {name.removeprefix("scope/"): n for name, n in engine.counts.items() if n}, group.trajectories[0]


def test_every_edge_case_is_counted_and_leaves_the_rollout_unchanged(
    engine: LocalEngine, problem: Problem
) -> None:
    counts, member = outcome(engine, problem, wrong_from(problem, 0))
    assert counts == {"failed": 1, "no_prefix": 1} and member.is_rollout
    counts, member = outcome(engine, problem, wrong_from(problem, 1), min_correct_prefix=0.4)
    assert counts == {"failed": 1, "partly_right": 1, "short_prefix": 1} and member.is_rollout
    counts, member = outcome(engine, problem, wrong_from(problem, 1), finished=False)
    assert counts == {"failed": 1, "truncated": 1} and member.is_rollout
    right_steps = problem.references[0].split("#")[0] + "# 99 99 99"
    counts, member = outcome(engine, problem, right_steps)
    assert counts == {"failed": 1, "no_error_found": 1} and member.is_rollout
    unhelped = replace(problem, references=())
    counts, member = outcome(engine, unhelped, wrong_from(problem, 1))
    assert (
        counts == {"failed": 1, "partly_right": 1, "tried": 1, "no_correction": 4, "repair_failed": 1}
        and member.is_rollout
    )
    misled = replace(problem, references=(wrong_from(problem, 0),))
    counts, member = outcome(engine, misled, wrong_from(problem, 1), max_attempts=2, mode="suffix")
    assert (
        counts == {"failed": 1, "partly_right": 1, "tried": 1, "repair_failed": 1}
        and member.is_rollout
        and member.reward == 0
    )


def test_a_wrong_first_step_can_fall_back_to_the_whole_reference(
    engine: LocalEngine, problem: Problem
) -> None:
    counts, member = outcome(engine, problem, wrong_from(problem, 0), no_prefix="reference")
    assert member.author.tolist() == [REFERENCE] * len(member) and member.reward == 1
    assert counts == {"failed": 1, "no_prefix": 1, "tried": 1, "replaced": 1}


def test_in_reference_mode_a_step_that_leaks_the_answer_is_dropped(
    engine: LocalEngine, problem: Problem
) -> None:
    counts, _ = outcome(engine, problem, wrong_from(problem, 1), mode="reference")
    assert counts["repaired"] == 1
    counts, member = outcome(engine, problem, wrong_from(problem, 2), mode="reference", max_attempts=1)
    assert counts["leaking_step"] == 1 and counts["repair_failed"] == 1 and member.is_rollout


def test_an_attempt_that_could_not_be_judged_is_counted(engine: LocalEngine, problem: Problem) -> None:
    silent = make(judge="tests.methods.test_scope:Silent")
    guide(silent, [rollout(engine, problem, wrong_from(problem, 1))], problem, engine)
    assert engine.counts["scope/not_judged"] == 1 and engine.counts["scope/no_error_found"] == 0


def test_samples_have_the_judges_score_for_every_token_of_a_step(
    engine: LocalEngine, policy: TransformersPolicy, problem: Problem
) -> None:  # fmt: skip
    members = [
        rollout(engine, problem, wrong_from(problem, 1)),
        rollout(engine, problem, problem.references[0], reward=1),
    ]
    method = make(placing="append")
    groups = engine.credit(method, [guide(method, members, problem, engine)])
    failed, right, repaired = sample_rows(1, groups, method, policy)
    first, second, third = (len(step.split()) for step in split_steps(failed["text"]))
    assert failed["judged"] == [1.0] * first + [0.0] * (
        second + third + 1
    )  # the end of the sequence is part of the last step
    assert "judged" not in right
    assert repaired["judged"] == [1.0] * first + [None] * (len(repaired["tokens"]) - first)
    assert all(row["plan"] == problem.plan for row in (failed, right, repaired))
    (bare,) = sample_rows(1, [Group(replace(problem, plan=None), members[1:])], method, policy)
    assert "plan" not in bare


def test_a_random_step_is_never_the_first(engine: LocalEngine, problem: Problem) -> None:
    method = make(judge="random", min_correct_prefix=0.0)
    found = guide(
        method, [rollout(engine, problem, wrong_from(problem, 0)) for _ in range(20)], problem, engine
    )
    judged = [
        [score for _, score in member.judged or []] for member in found.trajectories if member.is_rollout
    ]
    assert {scores.index(0.0) for scores in judged} == {1, 2}


def test_the_policy_with_the_reference_in_its_prompt_can_be_the_corrector(engine: LocalEngine) -> None:
    hard = load_problems(f"{HARD}&n=1")[0]
    planned = replace(hard, references=(hard.plan or "",))  # the backbone can follow a plan
    counts, member = outcome(engine, planned, wrong_from(hard, 2), corrector="policy")
    assert counts["repaired"] == 1 and int(Author.TEACHER) in member.author.tolist() and member.reward == 1


def test_another_model_can_be_the_corrector(engine: LocalEngine) -> None:
    hard = load_problems(f"{HARD}&n=1")[0]
    planned = replace(hard, references=(hard.plan or "",))
    method = make(mode="reference", corrector="model", step_tokens=24)
    experts = load_experts(
        config(experts={"teacher": "builtin:house-tiny"}), Accelerator(cpu=True), engine.policy
    )
    engine = LocalEngine(engine.policy, engine.verifier, experts)
    guide(method, [rollout(engine, planned, wrong_from(hard, 1))], planned, engine)
    assert (
        engine.counts["scope/tried"] == 1
        and engine.counts["scope/no_correction"] == engine.counts["scope/leaking_step"] == 0
    )
    assert experts.teacher is not engine.policy


def test_credit_of_a_repaired_group_by_hand(engine: LocalEngine, problem: Problem) -> None:
    members = [rollout(engine, problem, wrong_from(problem, 1)) for _ in range(4)]
    method = make()
    (credited,) = engine.credit(method, [guide(method, members, problem, engine)])
    assert [set(member.column("advantage").tolist()) for member in credited.trajectories] == [
        {0.75},
        {-0.25},
        {-0.25},
        {-0.25},
    ]
    appended = make(placing="append", normalize_std=True)
    (credited,) = engine.credit(appended, [guide(appended, members, problem, engine)])
    deviation = (4 * 0.2**2 + 0.8**2) ** 0.5 / 2
    assert [float(member.column("advantage")[0]) for member in credited.trajectories] == pytest.approx(
        [-0.2 / (deviation + 1e-4)] * 4 + [0.8 / (deviation + 1e-4)]
    )


def test_gradient_of_a_repair_that_begins_in_the_middle_by_hand(engine: LocalEngine) -> None:
    """Two of the policy's own tokens, two of the corrector's, one of its own: the clipped ratio on its own,
    γp/(p+γ)² on the corrector's."""
    author = [POLICY, POLICY, REFERENCE, REFERENCE, POLICY]
    old, new = [0.5, 0.2, torch.nan, torch.nan, 0.4], [0.75, 0.22, 0.1, 0.5, 0.4]
    bare = Trajectory([1], torch.tensor([2, 3, 4, 5, 6]), torch.tensor(author))
    trajectory = bare.with_columns(old_logp=torch.tensor(old).log()).with_advantage(0.75)
    method = make()
    scale = method.advantage_scale(trajectory, Normalizers(1, 4, 20, 0, 0, 0))
    assert scale == 1 / 20
    logp = torch.tensor([new]).log().requires_grad_()
    total = method.surrogate(logp, token_batch([Sample(trajectory, scale)])).sum()
    total.backward()
    value = [1.28 * 0.75, 1.1 * 0.75, 0.5 * 0.75, 0.5 / 0.6 * 0.75, 0.75]  # the first is clipped at 1 + 0.28
    slope = [0.0, 1.1 * 0.75, 0.25 * 0.75, 0.05 / 0.36 * 0.75, 0.75]
    assert total.item() == pytest.approx(sum(value) / 20)
    assert logp.grad is not None and logp.grad[0].tolist() == pytest.approx([each / 20 for each in slope])


def test_tokens_that_reach_beyond_the_kept_text_are_not_kept(tmp_path: Path) -> None:
    policy = load_policy(config(model={"path": str(save_chat_model(tmp_path))}), Accelerator(cpu=True))
    tokens = policy.renderer.completion("what is two and three", end=False)
    assert len(tokens) < len("what is two and three")
    for length in range(len("what is two and three") + 1):
        text = "what is two and three"[:length]
        count = Prefixes(tokens, policy.renderer).count(text)
        assert (
            text.startswith(policy.renderer.text(tokens[:count]))
            and len(policy.renderer.text(tokens[: count + 1])) >= length
        )
    emoji = policy.renderer.completion("a😀b", end=False)
    assert [Prefixes(emoji, policy.renderer).count(text) for text in ("", "a", "a😀", "a😀b")] == [
        0,
        1,
        5,
        6,
    ]


def test_a_process_reward_model_finds_the_misapplied_rule(tmp_path: Path) -> None:
    """The built-in model, in the real loop, on problems whose rules the backbone does not know."""
    train(
        config(
            rollout={"group_size": 8},
            train={"steps": 2, "problems_per_step": 8},
            method={"name": "scope", "judge": "prm", "mode": "suffix"},
            experts={"prm": "builtin:house-prm"},
        ),
        tmp_path / "run",
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    counts = {
        name: sum(row.get(f"scope/{name}", 0) for row in rows)
        for name in ("failed", "no_error_found", "no_prefix", "repaired")
    }
    assert (
        counts["repaired"] > 0
        and counts["no_prefix"] > counts["failed"] / 2
        and counts["no_error_found"] < counts["failed"] / 10
    )


def test_scope_learns_through_the_real_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic judge treats the backbone's modular arithmetic, such as 85 * 2 = 70, as errors. Checks
    repairs, metrics and samples."""
    monkeypatch.setattr("handrail.training.update.AUTHORS_EVERY", 1)
    summary = train(
        config(
            data={"train": f"{EASY}&n=64"},
            rollout={"temperature": 1.6, "group_size": 8},
            train={"steps": 3, "problems_per_step": 8},
            method={"name": "scope", "min_correct_prefix": 0.0, "mode": "suffix", "placing": "append"},
        ),
        tmp_path / "run",
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    assert summary["status"] == "reconstruction"
    assert any("scope/repaired" in row for row in rows)
    repaired = [row for row in rows if "scope/repaired" in row]
    assert all(row["tokens/off_policy"] > 0 and row["grad_norm/repaired"] > 0 for row in repaired)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert any(len(set(row["author"])) == 2 for row in samples)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"judge": "prm"}, "experts.prm"),
        ({"judge": "llm"}, r"\[endpoint\]"),
        ({"corrector": "model"}, "experts.teacher"),
        ({"corrector": "endpoint"}, r"\[endpoint\]"),
    ],
)
def test_an_expert_that_is_not_configured_is_refused_before_anything_is_written(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(config(method={"name": "scope", **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
