"""OLR: votes and trends by hand, decisions through the real verifier, labels in a file, resumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handrail import Group, LocalEngine, Problem, TrainablePolicy, UserError, VerifierPool, train
from handrail.methods.terms.olr import Olr
from handrail.methods.terms.voting import largest_cluster, most_frequent, trend
from tests.conftest import config
from tests.methods.terms.scripted import PROBLEM, grpo, lines, member, state, verb


@pytest.mark.parametrize(
    ("shares", "slope"),
    [
        ([0.25, 0.375, 0.375, 0.5, 0.5, 0.625], 0.067857),
        ([0.25, 0.25, 0.375, 0.375, 0.375, 0.5], 0.046429),
        ([0.5, 0.5, 0.5], 0.0),
        ([0, 0.375, 0.5, 0.5, 0.625, 0.5], 0.092857),
        ([0.7], 0.0),
        ([], 0.0),
    ],
)
def test_trends_by_hand(shares: list[float], slope: float) -> None:
    assert trend(shares) == pytest.approx(slope, abs=5e-7)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["7", "7", "9", "7", "9"], "7"),
        (["7", "9"], None),
        ([], None),
        ([None, "7"], None),
        ([None, None, "7", "7"], "7"),
        ([None, None], None),
    ],
)
def test_the_most_frequent_answer_of_all_passes(answers: list[str | None], expected: str | None) -> None:
    assert most_frequent(answers) == expected


SHARES = (0.25, 0.375, 0.375, 0.5, 0.5)


def after(passes: Sequence[tuple[str | None, float]], **settings: Any) -> Olr:
    term = Olr(name="olr", **settings)
    for answer, share in passes:
        note = {"answer": answer, "share": share}
        term.learn([("p", note, False)])
    return term


def rollouts(policy: TrainablePolicy, *texts: str, end: bool = True) -> Group:
    members = [member(policy, text, float(text == "# 70"), finished=end) for text in texts]
    return Group(PROBLEM, members)


FIVE = ("# 71", "# 71", "# 71", "# 71", "# 71", "# 70", "# 8", "none")  # share 5/8


def decided(
    term: Olr, group: Group, engine: LocalEngine
) -> tuple[str, list[float], dict[str, Any], bool, int]:
    found, counts = verb(term, "reward", group, engine)
    note, changed = found.notes["olr"]
    rewards = [each.reward for each in found.trajectories]
    assert counts["olr/refined"] == changed
    return found.problem.answer, rewards, note, changed, counts["olr/no_majority"]


def test_a_growing_majority_replaces_the_answer_and_all_is_graded_anew(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    """Five passes before: this is the sixth, number 5. Shares .25 .375 .375 .5 .5 .625."""
    term = after([("71", share) for share in SHARES])
    answer, rewards, note, changed, _ = decided(term, rollouts(policy, *FIVE), engine)
    assert changed and answer == "71" and rewards == [1.0] * 5 + [0.0] * 3
    assert (note["pass"], note["given"], note["answer"], note["share"]) == (5, "70", "71", 0.625)
    assert note["slope"] == pytest.approx(0.067857, abs=1e-6)


@pytest.mark.parametrize(
    ("passes", "settings"),
    [
        ([("71", share) for share in SHARES[:4]], {}),  # the fifth pass: too early
        ([("71", share) for share in SHARES], {"slope": 0.0679}),  # too flat
        ([("71", 0.6)] * 5, {}),
        ([(other, 0.1) for other in ("9", "9", "9", "71", "71")], {}),  # 71 and 9 tie over all passes
        ([(None, 0.0)] * 5, {}),  # never seen before
    ],
)
def test_otherwise_the_given_answer_stays(
    passes: list[tuple[str | None, float]],
    settings: dict[str, float],
    policy: TrainablePolicy,
    engine: LocalEngine,
) -> None:
    answer, rewards, _, changed, _ = decided(after(passes, **settings), rollouts(policy, *FIVE), engine)
    assert not changed and answer == "70" and rewards == [0.0] * 5 + [1.0, 0.0, 0.0]


def test_a_majority_for_the_given_answer_changes_nothing(
    policy: TrainablePolicy, engine: LocalEngine
) -> None:
    group = rollouts(policy, "# 70", "# 70", "# 70", "# 8")
    answer, rewards, note, changed, _ = decided(after([("70", share) for share in SHARES]), group, engine)
    assert (answer, note["answer"], note["share"], changed) == ("70", "70", 0.75, False)
    assert rewards == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("texts", [("# 71", "# 8"), ("none", "none"), ("# 71", "# 71", "# 8", "# 8")])
def test_ties_and_unreadable_answers_have_no_majority(
    texts: tuple[str, ...], policy: TrainablePolicy, engine: LocalEngine
) -> None:
    term = after([("71", 0.1)] * 5)
    answer, _, note, changed, none = decided(term, rollouts(policy, *texts), engine)
    assert (answer, note["answer"], note["share"], changed, none) == ("70", None, 0.0, False, 1)


def test_a_truncated_rollout_has_no_answer(policy: TrainablePolicy, engine: LocalEngine) -> None:
    group = rollouts(policy, "# 71", "# 71", end=False)
    assert decided(after([]), group, engine)[2]["answer"] is None


def test_answers_that_only_the_verifier_takes_for_equal_are_one(policy: TrainablePolicy) -> None:
    """Also with a spelling of an earlier pass."""
    with VerifierPool("math") as verifier:
        engine = LocalEngine(policy, verifier)
        problem = Problem("p", "77 A 8 ?", "3")
        texts = [r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{2}"]
        members = [replace(member(policy, "77"), text=text) for text in texts]
        read = engine.verify([(problem, each) for each in members], answers=True)
        assert len({each.answer for each in read}) >= 2
        found = engine.run([((), largest_cluster(problem, read))])[0]
        assert [each.text for each in found] == texts[:2]
        term = after([(r"\frac{1}{2}", share) for share in (0.1, 0.2, 0.3, 0.4, 0.5)])
        answer, rewards, _, changed, _ = decided(term, Group(problem, members), engine)
        assert changed and answer == r"\frac{1}{2}" and rewards == [1.0, 1.0, 0.0]


def test_a_problem_twice_in_a_step_is_counted_once(policy: TrainablePolicy, engine: LocalEngine) -> None:
    term = Olr(name="olr")
    first, _ = verb(term, "reward", rollouts(policy, "# 71"), engine)
    second, _ = verb(term, "reward", rollouts(policy, "# 8"), engine)
    again, _ = verb(term, "reward", replace(first, trajectories=second.trajectories), engine)
    assert again.notes["olr"][0]["answer"] == "71"  # rollouts that replace the group's do not vote
    bare = Group(replace(PROBLEM, id="q"))
    seen = [term.observe(group) for group in (first, second, bare)]
    assert seen[2] is None
    term.learn(seen[:2])
    assert term.state() == {"passes": {"p": [["71", 1.0]]}}


def test_references_are_graded_by_the_new_answer(policy: TrainablePolicy, engine: LocalEngine) -> None:
    """A reference that ends in the given, wrong answer must not be taught."""
    method = grpo({"name": "olr"}, name="luffy")
    (term,) = method.terms
    term.load_state({"passes": {"p": [["71", share] for share in SHARES]}})
    group = rollouts(policy, *FIVE)
    group = replace(group, problem=replace(PROBLEM, references=("77 # 70",)))
    graded = engine.reward(method, [group])
    ((mixed,),) = engine.guide(method, graded)
    assert mixed.trajectories[-1].correct is False
    with pytest.raises(UserError, match="grpo[+]sft and olr exclude each other, because references are imit"):
        grpo({"name": "olr"}, name="grpo+sft")  # which verifies no reference


def mislabeled(file: Path) -> str:
    """Easy problems, of which every second has the wrong answer."""
    problems = [("5 + 5 ?", "10"), ("7 + 2 ?", "8"), ("40 - 6 ?", "34"), ("9 * 2 ?", "17")]
    rows = [{"id": f"p{n}", "prompt": prompt, "answer": a} for n, (prompt, a) in enumerate(problems)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_run_repairs_wrong_labels_says_which_and_resumes(tmp_path: Path) -> None:
    """With a threshold that a constant majority passes, so that seven steps suffice."""
    data = mislabeled(tmp_path / "data.jsonl")
    method = {"name": "grpo", "terms": [{"name": "olr", "slope": -0.1, "start": 2}]}

    def run(steps: int, directory: str, resume: bool = False) -> None:
        settings = config(
            data={"train": data},
            method=method,
            rollout={"temperature": 0.5, "max_tokens": 16, "group_size": 3},
            train={"steps": steps, "checkpoint_every": 1},
        )
        train(settings, tmp_path / directory, resume=resume)

    run(7, "whole")
    run(5, "parts")
    run(7, "parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    labels = lines(whole / "labels.jsonl")
    assert {(row["problem"], row["given"], row["answer"]) for row in labels} == {
        ("p1", "8", "9"),
        ("p3", "17", "18"),
    }
    assert [row["pass"] for row in labels if row["problem"] == "p1"] == [3, 4, 5, 6]
    assert [row["step"] for row in labels if row["problem"] == "p1"] == [4, 5, 6, 7]
    metrics = lines(whole / "metrics.jsonl")
    assert [row.get("olr/refined", 0) for row in metrics[1:]] == [0, 0, 0, 2, 2, 2, 2]
    for name in ("labels.jsonl", "metrics.jsonl", "samples.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert state(whole / "checkpoints/step-000007") == state(parts / "checkpoints/step-000007")
