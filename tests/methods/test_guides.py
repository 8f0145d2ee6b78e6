"""Methods that add other completions to a group: ActGuide-RL, NPO, InT, CSO, STRIDE, CalibRL."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from handrail import train
from handrail._util.errors import UserError
from handrail._util.files import locked_file
from handrail.data.answers import Answer
from handrail.data.load import load_problems
from handrail.engines.local import LocalEngine
from handrail.experts.judges import Scores
from handrail.experts.steps import split_steps
from handrail.methods import build as build_method
from handrail.methods.base import Method
from handrail.methods.batch import Sample, token_batch
from handrail.methods.context import Context
from handrail.methods.cso import Cso
from handrail.methods.grpo import Grpo
from handrail.methods.hints import leading_steps, shortest_that_helps
from handrail.methods.preferences import preference
from handrail.methods.repairing import Attempt
from handrail.methods.requests import Generate, Pending, drive
from handrail.methods.stride import Stride
from handrail.models.config import RolloutConfig
from handrail.models.trainable import TrainablePolicy
from handrail.training.contents import harvested_from_another_model, model_digest
from handrail.training.policies import load_trainable_policy
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from handrail.verifiers.pool import VerifierPool
from tests.conftest import EASY, HARD, Handrail, config
from tests.methods.test_scope import TRUE_STEPS, wrong_from
from tests.methods.test_scope import rollout as attempted
from tests.training.test_update import PROBLEM, assert_equal, gradients, rollout


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Return a problem of three known rules, which the backbone follows with hardly an error."""
    return next(
        problem
        for problem in load_problems(f"{EASY}&n=64")
        if len(problem.metadata["steps"]) == 3 and "99" not in problem.answer
    )


def build(name: str, group_size: int = 4, **settings: Any) -> Method[Any]:
    return build_method({"name": name, **settings}, RolloutConfig(group_size=group_size, max_tokens=48))


def guide(method: Method[Any], group: Group, engine: LocalEngine) -> Group:
    ((guided,),) = engine.guide(method, [group])
    return guided


def objective(
    method: Method[Any], member: Trajectory, logp: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the objective of every token, and its gradient by log π."""
    current = torch.tensor([list(logp)], requires_grad=True)
    values = method.surrogate(current, token_batch([Sample(member, 1.0, 1.0)]))
    values.sum().backward()
    assert current.grad is not None
    return values[0].tolist(), current.grad[0].tolist()


def token(old_logp: float, advantage: float, author: Author = Author.POLICY, **columns: float) -> Trajectory:
    """Make a trajectory of one token."""
    bare = Trajectory.by(author, [5], [6]).with_advantage(advantage)
    named = {"old_logp": old_logp, **columns}
    return bare.with_columns(**{name: torch.tensor([value]) for name, value in named.items()})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def total(rows: list[dict[str, Any]], name: str) -> float:
    return sum(float(row.get(name, 0)) for row in rows)


# Rewards of what a guide adds


HALVING = """
from handrail import Context, Group, Term
from dataclasses import replace

class Halving(Term):
    async def reward(self, group: Group, ctx: Context) -> Group:
        return group.map(lambda member: replace(member, reward=member.reward / 2))
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "luffy"},
        {"name": "npo"},
        {"name": "actguide", "share": 1.0},
        {"name": "scope", "judge": TRUE_STEPS, "max_attempts": 8},
        {"name": "scope", "judge": TRUE_STEPS, "max_attempts": 8, "placing": "append"},
        {"name": "stride", "judge": TRUE_STEPS, "first": 1, "go_on": "", "correct_it": "", "kl": 0.0},
    ],
    ids=lambda settings: str(settings["name"]),
)
def test_terms_change_the_rewards_of_what_a_guide_adds(
    settings: dict[str, Any], engine: LocalEngine, problem: Problem, cache: Path, tmp_path: Path
) -> None:
    text = wrong_from(problem, 2)
    if settings["name"] == "actguide":  # the backbone can follow a plan, but no steps of a solution
        hard = load_problems(f"{HARD}&n=1")[0]
        problem = replace(hard, references=(hard.plan or "",))
    (tmp_path / "halving.py").write_text(HALVING)
    needed: dict[str, Any] = {"cache": str(cache)} if settings["name"] == "npo" else {}
    method = build(**settings, **needed, terms=[{"name": f"{tmp_path}/halving.py:Halving"}])
    engine.begin(1)
    (group,) = engine.reward(method, [Group(problem, [attempted(engine, problem, text)])])
    (guided,) = engine.guide(method, [group])
    added = [each for found in guided for each in found.trajectories if each is not group.trajectories[0]]
    right = [each for each in added if each.correct]
    assert right and all(each.reward == 0.5 for each in right)


def test_tokens_that_a_guide_samples_are_counted_by_the_engine(engine: LocalEngine, problem: Problem) -> None:
    """The token budget includes them, also if a method of the user's own does not count them."""

    class Sampling(Grpo):
        async def guide(self, group: Group, ctx: Context) -> Group:
            return group.add(*await Generate(ctx.renderer.prompt(problem), 2))

    engine.begin(1)
    (own,) = engine.rollout(build("grpo", group_size=2), [problem])
    assert engine.counts["tokens/resampled"] == 0
    ((guided,),) = engine.guide(Sampling(), [own])
    assert engine.counts["tokens/resampled"] == sum(map(len, guided.trajectories[2:])) > 0


# ActGuide-RL


@pytest.mark.parametrize(
    ("steps", "needed", "probes", "tried", "found", "unfinished"),
    [
        (4, 3, 5, [2, 3], 3, 0),
        (4, 0, 5, [2, 1, 0], 0, 0),
        (4, 99, 5, [2, 3], 4, 0),
        (40, 33, 5, [20, 30, 35, 33, 32], 33, 0),
        (40, 33, 4, [20, 30, 35, 33], 31, 1),
    ],
)
def test_actguide_searches_for_the_shortest_hint_that_helps(
    steps: int, needed: int, probes: int, tried: list[int], found: int, unfinished: int, engine: LocalEngine
) -> None:
    hints = [None, *(" ".join(["1"] * length) for length in range(1, steps + 1))]
    asked = []

    def answer(pending: list[Pending]) -> list[Any]:
        requests = [each.request for each in pending]
        if isinstance(requests[0], Generate):
            return [[Trajectory.by(Author.POLICY, each.prompt_ids, [7])] * each.n for each in requests]
        lengths = [hints.index(each.trajectory.hint) for each in requests]
        asked.append(lengths[0])
        return [
            replace(each.trajectory, reward=float(at >= needed))
            for each, at in zip(requests, lengths, strict=True)
        ]

    ctx = engine.context(0, PROBLEM, "guide")
    assert drive([((), shortest_that_helps(PROBLEM, hints, probes, 2, ctx))], answer) == [found]
    assert asked == tried and ctx.counts["actguide/search_unfinished"] == unfinished


@pytest.mark.parametrize(
    ("logp", "old", "advantage", "value", "slope"),
    [
        (-2.0, -0.5, 1.0, 0.2231, 0.2231),
        (-2.0, -0.5, -1.0, -0.8, 0.0),
        (math.log(5), 0.0, 1.0, 1.2, 0.0),
        (math.log(5), 0.0, -1.0, -3.0, 0.0),
    ],
)
def test_actguides_objective_by_hand(
    logp: float, old: float, advantage: float, value: float, slope: float
) -> None:
    values, gradient = objective(build("actguide"), token(old, advantage), [logp])
    assert values == pytest.approx([value], abs=1e-4) and gradient == pytest.approx([slope], abs=1e-4)


def test_actguides_soft_ratio_by_hand() -> None:
    method = build("actguide", gamma=0.1)
    values, gradient = objective(method, token(-0.5, 2.0, hinted=1.0), [-2.0])
    assert values == gradient == pytest.approx([2 * 0.6905], abs=1e-4)
    assert objective(method, token(-0.5, 2.0), [-2.0])[0] == pytest.approx([2 * 0.2231], abs=1e-4)


def test_actguide_trains_the_plain_prompt_on_what_was_sampled_with_the_hint(
    engine: LocalEngine, policy: TrainablePolicy
) -> None:
    """The backbone can follow a plan, so a plan replaces the leading steps of a solution here."""
    hard = load_problems(f"{HARD}&n=1")[0]
    hinted = replace(hard, references=(hard.plan or "",))
    failed = [replace(attempted(engine, hard, "# 1"), reward=0.0, correct=False) for _ in range(4)]
    guided = guide(build("actguide", share=1.0), Group(hinted, failed), engine)
    renderer = policy.renderer
    assert len(guided.trajectories) == 4 and any(member.correct for member in guided.trajectories)
    for member in guided.trajectories:
        assert member.prompt_ids == renderer.prompt(hard) and member.is_rollout
        (expected,) = policy.score([renderer.prompt(hard, member.hint)], [member.token_ids])
        assert member.column("old_logp").tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert engine.counts["tokens/resampled"] == sum(map(len, guided.trajectories))
    alive = Group(hinted, [replace(failed[0], reward=0.5), *failed[1:]])
    assert guide(build("actguide"), alive, engine) is alive


def test_actguide_keeps_a_right_rollout_that_fapo_pays_nothing_for(
    engine: LocalEngine, problem: Problem
) -> None:
    """The arithmetic judge finds a flaw in the right rollout: rewards are 0 and −1, and no group is hard."""
    method = build("actguide", share=1.0, terms=[{"name": "fapo"}])
    flawed = attempted(engine, problem, f"1 + 1 = 3 ; # {problem.answer}", reward=1)
    wrong = attempted(engine, problem, "# 99 99 99")
    (graded,) = engine.reward(method, [Group(problem, [flawed, wrong])])
    assert graded.rewards == [0, -1] and graded.trajectories[0].correct
    assert guide(method, graded, engine) is graded


def test_actguides_hints_contain_no_answer_and_fit_the_context(engine: LocalEngine, problem: Problem) -> None:
    ctx = engine.context(0, problem, "guide")
    steps = split_steps(problem.references[0])
    whole = leading_steps(problem, None, ctx)
    assert whole == [None, steps[0].rstrip(), "".join(steps[:2]).rstrip()]
    shorter = replace(ctx, longest=ctx.max_tokens + len(ctx.renderer.prompt(problem, whole[1])))
    assert leading_steps(problem, None, shorter) == whole[:2]
    assert leading_steps(replace(problem, references=()), None, ctx) == [None]
    assert ctx.counts["actguide/no_hint"] == ctx.counts["guide/no_reference"] == 1


def test_actguides_hints_end_before_the_first_step_that_names_the_answer(engine: LocalEngine) -> None:
    """The second of four steps names the answer, 70; the problem names 77."""
    steps = ("77 + 8 = 85 ; ", "85 - 15 = 70 ; ", "9 + 9 = 18 ; ", "# 70")
    problem = replace(PROBLEM, references=("".join(steps),))
    ctx = engine.context(0, problem, "guide")
    assert leading_steps(problem, None, ctx) == [None, "77 + 8 = 85 ;"]
    assert ctx.counts["actguide/leaking_step"] == 1
    named = replace(problem, answer="77", references=("77 + 8 = 85 ; 85 - 8 = 70 ; 70 + 7 = 77 ; # 77",))
    assert leading_steps(named, None, ctx) == [None, "77 + 8 = 85 ;", "77 + 8 = 85 ; 85 - 8 = 70 ;"]
    assert ctx.counts["actguide/leaking_step"] == 1


def test_actguide_shows_exactly_the_share_of_the_steps(engine: LocalEngine, problem: Problem) -> None:
    """0.55 of 20 steps are 11, also in floating point, where the product is a little more."""
    long = replace(problem, references=(" ; ".join(f"{step}" for step in range(1, 21)),), answer="none")
    failed = [attempted(engine, long, "# 1") for _ in range(4)]
    guide(build("actguide", share=0.55), Group(long, failed), engine)
    assert engine.counts["actguide/steps_shown"] == 11


def test_actguide_through_the_real_loop(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(write_hinted(tmp_path)).read_text().splitlines()]
    assert rows
    train(
        config(
            data={"train": str(tmp_path / "hinted.jsonl")},
            method={"name": "actguide", "kl": 0.0},
            train={"steps": 3, "problems_per_step": 4},
        ),
        tmp_path / "run",
    )
    found = metrics(tmp_path / "run")
    assert total(found, "actguide/guided") > 0 and total(found, "actguide/still_wrong") < total(
        found, "actguide/guided"
    )
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    hinted = [row for row in samples if "hint" in row]
    assert hinted and all(row["hint"] not in row["prompt"] for row in hinted)
    assert total(found, "tokens/resampled") > 0 and total(found, "grad_norm/all") > 0


def write_hinted(directory: Path) -> Path:
    """Write hard problems whose reference begins with the plan, which the backbone can follow."""
    rows = [
        {
            "prompt": each.prompt,
            "answer": each.answer,
            "id": each.id,
            "reference": f"{each.plan}\n{each.references[0]}",
        }
        for each in load_problems(f"{HARD}&n=16")
    ]
    file = directory / "hinted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# NPO


@pytest.fixture
def cache(tmp_path: Path, policy: TrainablePolicy, problem: Problem) -> Path:
    """Write a cache with one answer, the reference, with probability exp(−0.2) per token."""
    tokens = policy.renderer.completion(problem.references[0])
    answer = {"tokens": tokens, "logp": [-0.2] * len(tokens), "text": problem.references[0]}
    file = tmp_path / "answers.jsonl"
    file.write_text("{}\n" + json.dumps({"id": problem.id, "answers": [answer]}) + "\n")
    return file


def group_of(engine: LocalEngine, problem: Problem, right: int, wrong: int) -> Group:
    good = [attempted(engine, problem, problem.references[0], reward=1) for _ in range(right)]
    return Group(problem, good + [attempted(engine, problem, wrong_from(problem, 0)) for _ in range(wrong)])


def test_npo_replays_an_answer_if_few_rollouts_are_right(
    engine: LocalEngine, problem: Problem, cache: Path
) -> None:
    method = build("npo", cache=str(cache))
    for right, wrong, replaced in ((3, 2, True), (4, 2, False)):
        group = group_of(engine, problem, right, wrong)
        guided = guide(method, group, engine)
        last = guided.trajectories[-1]
        assert (last.author[0] == Author.REPLAY) == replaced and len(guided.trajectories) == right + wrong
        if replaced:
            assert last.correct and last.column("old_logp").tolist() == pytest.approx([-0.2] * len(last))
    right_at_the_end = Group(problem, group_of(engine, problem, 1, 2).trajectories[::-1])
    kept = guide(build("npo", cache=str(cache), slot="wrong"), right_at_the_end, engine)
    assert [member.author[0] == Author.REPLAY for member in kept.trajectories] == [False, True, False]
    free = guide(build("npo", cache=str(cache), ratio_from="policy"), group_of(engine, problem, 0, 2), engine)
    assert free.trajectories[-1].column("old_logp").isnan().all()


def test_npos_credit_and_ratio_by_hand(engine: LocalEngine, problem: Problem, cache: Path) -> None:
    method = build("npo", cache=str(cache))
    for size, wrong, right in ((4, -0.4999, 1.4997), (8, -0.3535, 2.4742)):
        (credited,) = engine.credit(method, [guide(method, group_of(engine, problem, 0, size), engine)])
        found = [float(member.column("advantage")[0]) for member in credited.trajectories]
        assert found == pytest.approx([wrong] * (size - 1) + [right], abs=1e-4)
    values, slope = objective(method, token(-1.0, 1.4997, Author.REPLAY), [-0.8])
    assert values == pytest.approx([1.7996], abs=1e-4) and slope == [0]
    assert objective(method, token(-1.0, 1.4997, Author.REPLAY), [-1.3])[0] == pytest.approx(
        [1.1110], abs=1e-4
    )


def test_npo_leaves_a_group_unchanged_without_a_verified_answer(
    engine: LocalEngine, problem: Problem, cache: Path
) -> None:
    method = build("npo", cache=str(cache))
    unknown = group_of(engine, replace(problem, id="another"), 0, 2)
    assert guide(method, unknown, engine) is unknown and engine.counts["npo/no_answer"] == 1
    relabeled = group_of(engine, replace(problem, answer="1 2 3"), 0, 2)
    assert guide(method, relabeled, engine) is relabeled and engine.counts["npo/rejected"] == 1


def test_npo_tries_another_answer_if_one_does_not_verify(
    engine: LocalEngine, problem: Problem, cache: Path
) -> None:
    """Nine of ten answers are wrong, and the right one is found in whatever order they are tried."""
    method = build("npo", cache=str(cache))
    (right,) = method.answers[problem.id]  # type: ignore[attr-defined]
    tokens = engine.policy.renderer.completion("# 99 99")
    stale = Answer(tokens, [-0.5] * len(tokens), "# 99 99")
    method.answers = {problem.id: [stale] * 9 + [right]}  # type: ignore[attr-defined]
    for seed in range(3):
        ctx = replace(engine.context(0, problem, "guide"), rng=random.Random(seed), counts=Counter())
        (guided,) = engine.run([((), method.guide(group_of(engine, problem, 0, 2), ctx))])
        assert guided.trajectories[-1].correct and guided.trajectories[-1].tokens == right.tokens
        assert ctx.counts["npo/replayed"] == 1 and ctx.counts["npo/rejected"] <= 9


def test_npo_replaces_the_last_rollout_also_if_it_has_no_verdict(
    engine: LocalEngine, problem: Problem, cache: Path
) -> None:
    unverified = replace(attempted(engine, problem, "# 1"), reward=math.nan, correct=None)
    group = group_of(engine, problem, 0, 2).add(unverified)
    for slot, place in (("last", 2), ("wrong", 1)):
        guided = guide(build("npo", cache=str(cache), slot=slot), group, engine)
        replayed = [member.author[0] == Author.REPLAY for member in guided.trajectories]
        assert replayed == [at == place for at in range(3)]


def test_npo_counts_answers_with_unknown_probabilities(
    engine: LocalEngine, problem: Problem, cache: Path
) -> None:
    """Their ratio is 1."""
    method = build("npo", cache=str(cache))
    assert guide(method, group_of(engine, problem, 0, 2), engine).rewards == [0, 1]
    assert engine.counts["npo/unknown_logp"] == 0
    cache.write_text(cache.read_text().replace("-0.2", "NaN", 1))
    method = build("npo", cache=str(cache))
    guided = guide(method, group_of(engine, problem, 0, 2), engine)
    assert engine.counts["npo/unknown_logp"] == 1
    old = guided.trajectories[-1].column("old_logp")
    assert old.isnan().tolist() == [True] + [False] * (len(old) - 1)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"id": "a", "answers": [{"tokens": [1, 2], "logp": [-1.0], "text": "x"}]}',
            "answers.jsonl:2: .*as many",
        ),
        ('{"id": "a"}', "answers.jsonl:2: .*required"),
    ],
)
def test_a_damaged_cache_is_refused(line: str, sentence: str, problem: Problem, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("{}\n" + line + "\n")
    with pytest.raises(UserError, match=sentence):
        build("npo", cache=str(tmp_path / "answers.jsonl")).check([problem])
    with pytest.raises(UserError, match="method.cache: there is no file .*handrail harvest"):
        build("npo", cache=str(tmp_path / "none.jsonl")).check([problem])


def test_a_cache_without_any_answer_to_the_training_problems_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answers.jsonl has no answer to any of the training problems"):
        train(config(method={"name": "npo", "cache": str(cache)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_harvest_feeds_npo_through_the_real_loop(handrail: Handrail, tmp_path: Path) -> None:
    data, verifier = (
        f"{EASY}&n=12",
        ["--set", 'verifier.name="exact"', "--set", r'verifier.extract="# ([\\d ]+)$"'],
    )
    command = [
        "harvest",
        "builtin:house-tiny",
        data,
        "--output",
        "answers.jsonl",
        "--rollouts",
        "2",
        *verifier,
    ]
    command += ["--set", "rollout.max_tokens=48", "--set", "rollout.batch_size=8"]
    done = handrail(*command)
    assert done.code == 0, done.err
    whole = (tmp_path / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text("".join(whole.splitlines(keepends=True)[:7]) + '{"id": ')
    assert handrail(*command).code == 0 and (tmp_path / "answers.jsonl").read_text() == whole
    refused = handrail(*command, "--seed", "1")
    assert refused.code == 2 and "another harvest: seed is 0 there and 1 here" in refused.err
    train(
        config(
            data={"train": data},
            rollout={"temperature": 2.0},
            method={"name": "npo", "cache": str(tmp_path / "answers.jsonl"), "threshold": 0.9},
        ),
        tmp_path / "run",
    )
    assert total(metrics(tmp_path / "run"), "npo/replayed") > 0


def test_a_harvest_checks_its_file_and_its_problems_first(handrail: Handrail, tmp_path: Path) -> None:
    good = {"prompt": "5 + A 5 =", "answer": "10"}
    (tmp_path / "d.jsonl").write_text(json.dumps(good) + "\n")
    (tmp_path / "binary").write_bytes(b"PAR1\xff\xfe")
    command = ["harvest", "builtin:house-tiny", "d.jsonl", "--set", "rollout.max_tokens=8"]
    for output, said in (
        ("d.jsonl", "d.jsonl holds something else than a harvest; choose another --output"),
        ("binary", "binary is not a text file (UTF-8); choose another --output"),
    ):
        before = (tmp_path / output).read_bytes()
        refused = handrail(*command, "--output", output)
        assert refused.code == 2 and refused.err == f"error: {said}\n"
        assert (tmp_path / output).read_bytes() == before
    long = {"prompt": "1 " * 125, "answer": "2"}
    (tmp_path / "d.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(long) + "\n")
    refused = handrail(*command, "--output", "out.jsonl")
    assert refused.code == 2 and "d.jsonl, line 2, field prompt: its 125 tokens and" in refused.err
    with locked_file(tmp_path / "other.jsonl"):
        refused = handrail(*command, "--output", "other.jsonl")
        assert refused.code == 2 and "another process is writing other.jsonl" in refused.err
        done = handrail(*command, "--output", "out.jsonl", "--set", "data.too_long=skip", "--rollouts", "2")
    assert done.code == 0 and "1 problems are too long and are left out, first d.jsonl, line 2" in done.out
    assert "of 1 problems have an answer" in done.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary", "d.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1\xff", "answers.jsonl is not a text file"),
        (
            b"",
            "method.cache: the first line of .*answers.jsonl does not say how it was made; name a file that",
        ),
        (b'{"id": "a", "answers": []}\n', "method.cache: the first line of .*answers.jsonl does not say"),
    ],
)
def test_a_file_that_is_no_harvest_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        build("npo", cache=str(tmp_path / "answers.jsonl")).check([Problem("a", "?", "1")])


@pytest.mark.parametrize("shift", [1, 10_000, -10_000])
def test_answers_in_the_tokens_of_another_model_are_refused(
    shift: int, cache: Path, tmp_path: Path, problem: Problem, engine: LocalEngine
) -> None:
    head, line = cache.read_text().splitlines()
    row = json.loads(line)
    row["answers"][0]["tokens"] = [token + shift for token in row["answers"][0]["tokens"]]
    cache.write_text(head + "\n" + json.dumps(row) + "\n")
    said = (
        f"method.cache: in the tokens of builtin:house-tiny, the answer to {problem.id} in .* is another text"
    )
    with pytest.raises(UserError, match=said):
        train(
            config(data={"train": f"{EASY}&n=64"}, method={"name": "npo", "cache": str(cache)}),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=said):  # engines that know the tokenizer only when they guide
        guide(build("npo", cache=str(cache)), group_of(engine, problem, 0, 2), engine)


def test_answers_of_another_model_cause_a_warning(
    cache: Path, tmp_path: Path, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(
        data={"train": f"{EASY}&n=64"}, train={"steps": 1}, method={"name": "npo", "cache": str(cache)}
    )
    train(config(train={"steps": 1}, rollout={"max_tokens": 8}), tmp_path / "later")
    model, answers = str(tmp_path / "later/model"), cache.read_text().partition("\n")[2]

    def warned(said: dict[str, str]) -> str:
        cache.write_text(json.dumps(said) + "\n" + answers)
        return harvested_from_another_model(str(cache), settings.model.path)

    assert warned({}) == warned({"model": model, "weights": model_digest(model)}) == ""
    assert f"was harvested from {model}, which has changed since" in warned({"model": model, "weights": "0"})
    kept = tmp_path / "later/model/handrail.toml"
    kept.write_text(kept.read_text().replace("builtin:house-tiny", "another/model"))
    said = warned({"model": model, "weights": model_digest(model)})
    assert f"from {model}, which was trained from another/model, but this run starts from builtin" in said
    with caplog.at_level(logging.WARNING, "handrail"):
        train(settings, tmp_path / "run")
    assert f"method.cache: {said}" in caplog.text


# InT


def test_int_imitates_the_right_steps_and_the_corrected_one(engine: LocalEngine, problem: Problem) -> None:
    method = build("int", judge=TRUE_STEPS, corrector="reference", continuations=4)
    failed = attempted(engine, problem, wrong_from(problem, 1))
    group = guide(method, Group(problem, [failed, replace(failed)]), engine)
    (shown,) = group.imitated
    first, second, _ = (len(step.split()) for step in split_steps(problem.references[0]))
    assert shown.author.tolist() == [int(Author.POLICY)] * first + [int(Author.REFERENCE)] * second
    assert problem.references[0].startswith(shown.text.strip()) and not shown.finished
    assert shown.column("imitation_weight").tolist() == [1.0] * (first + second)
    assert engine.counts["int/kept"] == 1 and engine.counts["tokens/resampled"] > 0


def test_int_drops_leaking_unsolvable_and_truncated_corrections(
    engine: LocalEngine, problem: Problem
) -> None:
    method = build("int", judge=TRUE_STEPS, corrector="reference", continuations=2)
    leaking = Group(problem, [attempted(engine, problem, wrong_from(problem, 2))])
    assert not guide(method, leaking, engine).imitated and engine.counts["int/leaking_step"] == 1
    relabeled = replace(problem, answer="1 2 3")
    hopeless = Group(relabeled, [attempted(engine, relabeled, wrong_from(problem, 1))])
    assert not guide(method, hopeless, engine).imitated and engine.counts["int/not_solvable"] == 1
    cut = Group(problem, [attempted(engine, problem, wrong_from(problem, 1), finished=False)])
    assert not guide(method, cut, engine).imitated and engine.counts["int/truncated"] == 1


def test_int_corrects_a_wrong_first_step_alone(engine: LocalEngine, problem: Problem) -> None:
    method = build("int", judge=TRUE_STEPS, corrector="reference", continuations=8)
    group = guide(method, Group(problem, [attempted(engine, problem, wrong_from(problem, 0))]), engine)
    assert [shown.text.strip(" ;") for shown in group.imitated] == [problem.metadata["steps"][0]]


def test_int_through_the_real_loop(tmp_path: Path) -> None:
    train(
        config(
            data={"train": f"{EASY}&n=64"},
            rollout={"temperature": 1.6},
            method={"name": "int", "corrector": "reference", "continuations": 4},
            train={"steps": 3},
        ),
        tmp_path / "run",
    )
    assert total(metrics(tmp_path / "run"), "int/kept") > 0


# CSO


class Halves:
    """A judge that scores a step 0.44 if it contains 99, and otherwise 0.61."""

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        return [[0.44 if "99" in step else 0.61 for step in steps] for _, steps in attempts]


HALVES = "tests.methods.test_guides:Halves"


@pytest.mark.parametrize(
    ("difference", "loss", "slope"),
    [(-1.0, 0.9741, -0.3112), (0.0, 0.6931, -0.25), (0.4, 0.5981, -0.2251), (2.0, 0.3133, -0.1345)],
)
def test_csos_preference_by_hand(difference: float, loss: float, slope: float) -> None:
    sides = [token(0.0, 0.0, pair=side, ref_logp=-1.0) for side in (1.0, -1.0)]
    logps = [torch.tensor([-1.0 + difference], requires_grad=True), torch.tensor([-1.0], requires_grad=True)]
    found = preference(sides, logps, Cso.Settings().beta)
    gradient = torch.autograd.grad(-found, logps)
    assert -found.item() == pytest.approx(loss, abs=1e-4)
    assert [float(each[0]) for each in gradient] == pytest.approx([slope, -slope], abs=1e-4)


@pytest.fixture(scope="module")
def with_start(verifier: VerifierPool) -> LocalEngine:
    """An engine that also has the starting model."""
    policy = load_trainable_policy(config(), Accelerator(cpu=True), keep_start=True)
    return LocalEngine(policy, verifier)


def test_cso_pairs_a_verified_alternative_with_the_rollouts_step(
    with_start: LocalEngine, problem: Problem
) -> None:
    method = build("cso", judge=HALVES)
    failed = attempted(with_start, problem, wrong_from(problem, 1))
    group = guide(method, Group(problem, [failed]), with_start)
    _, chosen, rejected, *more = group.trajectories
    first, second, _ = (len(step.split()) for step in split_steps(problem.references[0]))
    assert chosen.tokens == with_start.policy.renderer.completion(problem.references[0])[: first + second]
    assert rejected.tokens == failed.tokens[: first + second]
    for member, side in ((chosen, 1.0), (rejected, -1.0)):
        marks = member.column("pair").tolist()
        assert marks[:first] == [0.0] * first and set(marks[first:]) <= {0.0, side} and marks[-1] == side
    # After its wrong second step, the last one cannot be correct.
    assert not more and with_start.counts["cso/pairs"] == 1
    (credited,) = with_start.credit(method, [group])
    weights = credited.imitated[0].column("linear_weight")
    assert (weights[:first] == 0).all() and (weights[first:].sum() > 0)
    # At the start, π equals π_ref, so the gradient of every token of a step is ±β/2.
    assert weights.max().item() == pytest.approx(0.5 / 2)
    stricter = build("cso", judge=HALVES, threshold=0.45, good=0.65)
    assert not guide(stricter, Group(problem, [failed]), with_start).imitated


@pytest.mark.parametrize(
    ("bad", "good", "pairs"), [(0.44, 0.61, 1), (0.5, 0.61, 0), (0.44, 0.6, 0), (0.5, 0.6, 0)]
)
def test_csos_bounds_are_exclusive(
    bad: float, good: float, pairs: int, with_start: LocalEngine, problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def judge(self: Halves, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        return [[bad if "99" in step else good for step in steps] for _, steps in attempts]

    monkeypatch.setattr(Halves, "judge", judge)
    failed = attempted(with_start, problem, wrong_from(problem, 1))
    found = guide(build("cso", judge=HALVES), Group(problem, [failed]), with_start)
    assert len(found.imitated) == 2 * pairs


def test_cso_drops_an_alternative_that_does_not_verify(with_start: LocalEngine, problem: Problem) -> None:
    relabeled = replace(problem, answer="1 2 3")
    failed = attempted(with_start, relabeled, wrong_from(problem, 1))
    assert not guide(build("cso", judge=HALVES), Group(relabeled, [failed]), with_start).imitated


def test_cso_refuses_a_judge_that_cannot_score_alternatives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^method.judge: .*random.* cannot score the alternatives to a step"):
        train(config(method={"name": "cso", "judge": "random"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name in ("scope", "int", "stride"):
        assert build(name, judge="random").experts.keys() == {"corrector"}
    with pytest.raises(UserError, match="there is no corrector 'random'"):
        train(config(method={"name": "scope", "corrector": "random"}), tmp_path / "run")


def test_cso_pairs_no_steps_of_right_rollouts(with_start: LocalEngine, problem: Problem) -> None:
    """FAPO has right rollouts judged, so that they have steps with low scores too."""
    right = attempted(with_start, problem, wrong_from(problem, 1).split("#")[0] + f"# {problem.answer}", 1.0)
    method = build("cso", judge=HALVES, terms=[{"name": "fapo", "judge": HALVES}])
    (graded,) = with_start.reward(method, [Group(problem, [right])])
    assert graded.trajectories[0].correct and graded.trajectories[0].judged
    assert not guide(method, graded, with_start).imitated


def test_cso_through_the_real_loop(tmp_path: Path) -> None:
    found = trained_cso(tmp_path / "run", {"judge": TRUE_STEPS})
    assert total(found, "cso/pairs") > 0 and total(found, "cso/failed") > 0


def trained_cso(directory: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    train(
        config(
            data={"train": f"{EASY}&n=64"},
            rollout={"temperature": 2.0},
            method={"name": "cso", "candidates": 1, **settings},
            train={"steps": 2, "problems_per_step": 8},
        ),
        directory,
    )
    return metrics(directory)


# STRIDE


def test_stride_samples_from_the_last_prefixes_of_a_failed_rollout(
    engine: LocalEngine, problem: Problem
) -> None:
    method = build("stride", judge=TRUE_STEPS, first=1, anchors=2, go_on="", correct_it="", kl=0.0)
    group = Group(problem, [attempted(engine, problem, wrong_from(problem, 2))])
    engine.begin(1)
    ((own, *anchors),) = engine.guide(method, [group])
    assert own.rollouts[0].judged and [len(each.trajectories) for each in anchors] == [5, 5]
    renderer, steps = engine.policy.renderer, split_steps(problem.references[0])
    for length, anchor in zip((1, 2), anchors, strict=True):
        start = renderer.completion("".join(steps[:length]), end=False)
        for member in anchor.trajectories:
            assert member.prompt_ids == renderer.prompt(problem) + start
            assert member.text == renderer.text(member.tokens) and member.correct is not None
        assert any(member.correct for member in anchor.trajectories)  # graded together with the steps before
    right = Group(problem, [attempted(engine, problem, problem.references[0], reward=1)])
    assert len(engine.guide(method, [right])[0]) == 1


def test_strides_anchors_and_schedule_by_hand(engine: LocalEngine, problem: Problem) -> None:
    """The first wrong step comes after 6 right ones: anchors 2 to 6; steps 52, 64, 76, and 33 of 440."""

    class Lengths(Stride):
        async def anchor(self, group: Group, attempt: Attempt, length: int, ctx: Context) -> Group:
            return Group(problem, [replace(attempt.rollout, reward=float(length))])

    steps = "".join(f"{number} + 1 = {number + 1} ; " for number in range(1, 7)) + "7 + 1 = 99 # 99"
    failed = attempted(engine, problem, steps)
    method = Lengths(Stride.Settings(judge=HALVES))
    due = []
    for step in range(1, 441):
        engine.begin(step)
        ((_, *anchors),) = engine.guide(method, [Group(problem, [failed])])
        due += [step] if anchors else []
        assert not anchors or [each.trajectories[0].reward for each in anchors] == [2, 3, 4, 5, 6]
    assert due[:3] == [52, 64, 76] and len(due) == 33


def test_stride_puts_the_critics_finding_into_the_prompt(engine: LocalEngine, problem: Problem) -> None:
    method = build("stride", judge=TRUE_STEPS, first=1, go_on="add", correct_it="double {step}", kl=0.0)
    engine.begin(1)
    failed = attempted(engine, problem, wrong_from(problem, 1))
    ((_, first, second),) = engine.guide(method, [Group(problem, [failed])])
    renderer = engine.policy.renderer
    assert first.trajectories[0].prompt_ids == renderer.prompt(problem, "add")
    wrong = split_steps(failed.text)[1].strip()
    start = renderer.completion(split_steps(failed.text)[0], end=False)
    assert second.trajectories[0].prompt_ids == renderer.prompt(problem, f"double {wrong}") + start


def test_stride_leaves_out_anchors_that_the_context_has_no_room_for(
    policy: TrainablePolicy, verifier: VerifierPool, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the critic says makes the prompt longer than the data's, whose lengths were checked."""
    said = "double " * policy.max_tokens
    method = build("stride", judge=TRUE_STEPS, first=1, anchors=2, go_on="", correct_it=said, kl=0.0)
    longest = len(policy.renderer.prompt(problem)) + policy.max_tokens
    monkeypatch.setattr(policy.bare_model.config, "max_position_embeddings", longest)
    engine = LocalEngine(policy, verifier)
    engine.begin(1)
    ((_, *anchors),) = engine.guide(
        method, [Group(problem, [attempted(engine, problem, wrong_from(problem, 2))])]
    )
    assert len(anchors) == 1 and engine.counts["stride/too_long"] == 1 == engine.counts["stride/anchors"]


def test_stride_through_the_real_loop(tmp_path: Path) -> None:
    train(
        config(
            data={"train": f"{EASY}&n=64"},
            rollout={"temperature": 2.0},
            method={
                "name": "stride",
                "judge": TRUE_STEPS,
                "first": 1,
                "every": 1,
                "go_on": "",
                "correct_it": "",
            },
            train={"steps": 2, "problems_per_step": 8},
        ),
        tmp_path / "run",
    )
    assert total(metrics(tmp_path / "run"), "stride/anchors") > 0


# CalibRL


@pytest.mark.parametrize(
    ("logp", "expert", "side", "advantage", "value", "slope"),
    [
        (-1.0, -0.5, 1.0, 0.6, 0.030, -0.06),
        (-0.5, -1.0, 1.0, 0.6, -0.015, -0.03),
        (-1.0, -0.5, -1.0, -0.4, -0.010, 0.02),
        (-0.5, -1.0, -1.0, -0.4, 0.020, 0.04),
    ],
)
@pytest.mark.parametrize("pairing", ["position", "sequence_mean"])
def test_calibrls_loss_by_hand(
    logp: float, expert: float, side: float, advantage: float, value: float, slope: float, pairing: str
) -> None:
    """Without the policy gradient; a row of one token is its own mean."""
    member = token(logp, advantage, expert_logp=expert, side=side)
    values, gradient = objective(build("calibrl", pairing=pairing), member, [logp])
    plain, plain_gradient = objective(build("calibrl", calibration_coef=0.0), member, [logp])
    assert plain[0] - values[0] == pytest.approx(value, abs=1e-5)
    assert plain_gradient[0] - gradient[0] == pytest.approx(slope, abs=1e-5)


def test_calibrl_compares_by_position_and_masks_tokens_beyond_the_experts(
    engine: LocalEngine, problem: Problem, policy: TrainablePolicy
) -> None:
    group = group_of(engine, problem, 1, 1)
    longer = attempted(engine, problem, problem.references[0] + " 1 2 3")
    guided = guide(build("calibrl"), group.add(longer), engine)
    (logp,) = policy.score(
        [policy.renderer.prompt(problem)], [policy.renderer.completion(problem.references[0])]
    )
    right, wrong, long = (member.column("expert_logp") for member in guided.trajectories)
    assert right.tolist() == pytest.approx(logp.tolist(), abs=1e-5)
    assert long.isnan().sum() == 3 and not wrong[: len(logp)].isnan().any()
    assert [float(member.column("side")[0]) for member in guided.trajectories] == [1, -1, -1]
    assert len(guided.trajectories) == engine.counts["calibrl/compared"] == 3
    alone = replace(problem, references=())
    lonely = Group(alone, group.trajectories)
    assert guide(build("calibrl"), lonely, engine) is lonely


def test_calibrl_ignores_a_group_without_signal_and_is_exact_under_splitting(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    # Tokens equal to the expert's would lie exactly at the kink of the loss.
    texts = (("# 70", 1.0), ("77 * 2 = 54 ; 54 + 8 = 62 # 62", 0.0))
    mixed = Group(PROBLEM, [rollout(policy, text, reward) for text, reward in texts])
    wrong = Group(replace(PROBLEM, id="q"), [rollout(policy, text, 0.0) for text, _ in texts])
    method = build("calibrl", group_size=2)
    credited = engine.credit(
        method, [each for found in engine.guide(method, [mixed, wrong]) for each in found]
    )
    assert credited[0].has_signal and not credited[1].has_signal
    whole, _ = gradients(method, policy, credited)
    split, _ = gradients(method, policy, credited, budget=30)
    assert_equal(split, whole)
    plain, _ = gradients(build("calibrl", group_size=2, calibration_coef=0.0), policy, credited)
    with pytest.raises(AssertionError):
        assert_equal(plain, whole)
