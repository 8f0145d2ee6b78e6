"""The report on a step judge, tested with judges that return given scores."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from handrail.eval.judge_report import Labeled, labeled, report
from handrail.experts.judges import Scores
from handrail.experts.steps import split_steps
from handrail.training.evaluate import wilson
from handrail.types.problem import Problem

PROBLEMS = [
    Problem("a", "?", "14", ("3 + 4 = 7\n7 * 2 = 14\n#### 14",)),
    Problem("b", "?", "5", ()),
    Problem("c", "?", "none", ("No number\nat all",)),
]
PROBLEM = PROBLEMS[0]
STEPS = ["3 + 4 = 7\n", "7 * 2 = 14"]


class Scripted:
    """A judge that returns the given scores in order."""

    def __init__(self, *scores: Scores | None) -> None:
        self.scores = scores

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[Scores | None]:
        assert len(attempts) == len(self.scores)
        return list(self.scores)


def test_every_reference_is_judged_unchanged_and_with_one_step_changed() -> None:
    right, wrong, wordy = labeled(PROBLEMS, seed=0)
    steps = split_steps(PROBLEM.references[0])
    assert right == Labeled(PROBLEM, steps)
    assert wrong.wrong is not None and wrong.original == steps[wrong.wrong] != wrong.steps[wrong.wrong]
    assert [*wrong.steps[: wrong.wrong], wrong.original, *wrong.steps[wrong.wrong + 1 :]] == steps
    assert wordy == Labeled(PROBLEMS[2], ["No number\n", "at all"])


def test_a_label_depends_only_on_the_seed_and_the_problem() -> None:
    assert labeled(PROBLEMS, seed=0) == [*labeled(PROBLEMS[:1], seed=0), *labeled(PROBLEMS[1:], seed=0)]
    assert len({labeled([PROBLEM], seed=seed)[1].steps[0] for seed in range(20)}) > 1


def test_counts_shares_and_failures() -> None:
    right, wrong = Labeled(PROBLEM, STEPS), Labeled(PROBLEM, ["3 + 4 = 7\n", "7 * 3 = 14"], 1, STEPS[1])
    judge = Scripted([1.0, 1.0], [0.2, 0.9], [1.0, 0.4], [None, 0.5], [0.1, 0.0], None, [None, None])
    found = report(judge, [right, right, wrong, wrong, wrong, wrong, right])
    assert (found["right"], found["wrong"]) == (3, 4)
    assert {
        key: (found[key]["mean"], found[key]["n"])
        for key in ("precision", "recall", "false_alarms", "not_judged")
    } == {
        "precision": (pytest.approx(1 / 3), 3),
        "recall": (0.25, 4),
        "false_alarms": (pytest.approx(1 / 3), 3),
        "not_judged": (pytest.approx(2 / 7), 7),
    }
    assert (found["recall"]["low"], found["recall"]["high"]) == wilson(0.25, 4)
    assert [failure["kind"] for failure in found["failures"]] == [
        "false alarm",
        "missed",
        "misplaced",
        "missed",
    ]
    assert found["failures"][2] == {
        "problem": "a", "kind": "misplaced", "wrong": 1, "named": 0,
        "wrong_step": "7 * 3 = 14", "original": "7 * 2 = 14", "named_step": "3 + 4 = 7\n",
    }  # fmt: skip
    json.dumps(found)


def test_the_threshold_decides_which_step_is_wrong() -> None:
    right = Labeled(PROBLEM, STEPS)
    assert report(Scripted([0.3, 1.0]), [right], threshold=0.2)["false_alarms"]["mean"] == 0
    assert report(Scripted([0.3, 1.0]), [right], threshold=0.4)["false_alarms"]["mean"] == 1


def test_a_share_of_an_empty_set_is_none() -> None:
    found = report(Scripted([1.0, 1.0]), [Labeled(PROBLEM, STEPS)])
    assert found["precision"] is None and found["recall"] is None
    assert report(Scripted(), [])["not_judged"] is None
