"""Paired differences, checked by hand and by simulation, and their wording, which must not claim too much."""

from __future__ import annotations

import math

import numpy as np
import pytest

from handrail.eval.differences import Difference, against_first, paired, verdict


def test_three_seeds_by_hand() -> None:
    ours = {1: {"x": 1.0, "y": 1.0}, 2: {"x": 1.0, "y": 0.5}, 3: {"x": 0.5, "y": 1.0}}
    theirs = {
        seed: {"x": 0.0, "y": 0.5, "z": 1.0} for seed in (1, 2, 3, 4)
    }  # problems and seeds that only one side has are ignored
    found = paired("hard", "A", "B", ours, theirs)
    assert found.per_seed == pytest.approx([0.75, 0.5, 0.5]) and found.problems == 2
    assert found.mean == pytest.approx(7 / 12)
    # Two problems prove almost nothing, however narrow Student's interval over the seeds is.
    assert found.low < 0 and found.high > 0.9


def test_the_interval_is_wide_if_seeds_disagree_although_problems_agree() -> None:
    ours = {seed: {str(n): gain for n in range(400)} for seed, gain in ((1, 0.3), (2, 0.5), (3, 0.7))}
    theirs = {seed: {str(n): 0.0 for n in range(400)} for seed in ours}
    found = paired("hard", "A", "B", ours, theirs)
    half = 4.302653 * 0.2 / math.sqrt(3)  # Student's, 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_equal_results_on_all_problems_still_have_an_interval() -> None:
    same = {0: {str(n): 1.0 for n in range(50)}}
    found = paired("hard", "A", "B", same, same)
    assert found.mean == 0 and -0.1 < found.low < -0.01 and 0.01 < found.high < 0.1
    wider = paired("hard", "A", "B", same, same, level=0.999)
    assert wider.low < found.low and wider.high > found.high
    one = paired("hard", "A", "B", {0: {"x": 1.0}}, {0: {"x": 0.0}})
    assert one.mean == 1 and one.low <= 0  # one problem proves nothing


@pytest.mark.parametrize(("problems", "differing"), [(48, 0.06), (256, 0.02), (16, 0.2)])
def test_a_few_differing_problems_are_not_significant(problems: int, differing: float) -> None:
    """If two runs are equally good, at most 5 % of comparisons on one seed call one of them better."""
    draw, called, trials = np.random.default_rng(7), 0, 200
    for _ in range(trials):
        sides = draw.choice([0.0, 1.0, -1.0], problems, p=[1 - differing, differing / 2, differing / 2])
        ours = {0: {str(n): float(max(side, 0)) for n, side in enumerate(sides)}}
        theirs = {0: {str(n): float(max(-side, 0)) for n, side in enumerate(sides)}}
        found = paired("hard", "A", "B", ours, theirs)
        called += found.low > 0 or found.high < 0
    assert called / trials <= 0.05


def test_coverage_over_new_seeds_and_problems() -> None:
    """The interval covers a true difference of 5 points, varying by problem and seed, 95 % of the time."""
    draw, covered, trials, seeds, problems = np.random.default_rng(3), 0, 200, 3, 100
    for _ in range(trials):
        hard, luck = draw.normal(0, 0.1, problems), draw.normal(0, 0.03, seeds)
        gain = 0.05 + hard[None] + luck[:, None]
        ours = draw.binomial(8, np.clip(0.5 + gain / 2, 0, 1)) / 8
        theirs = draw.binomial(8, np.clip(0.5 - gain / 2, 0, 1)) / 8
        a, b = (
            {s: {str(p): float(x[s, p]) for p in range(problems)} for s in range(seeds)}
            for x in (ours, theirs)
        )
        found = paired("hard", "A", "B", a, b)
        covered += found.low <= 0.05 <= found.high
    assert covered / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def difference(mean: float, low: float, high: float, *per_seed: float) -> Difference:
    return Difference("hard", "SORT", "GRPO", mean, low, high, list(per_seed), 64)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            difference(0.2, 0.1, 0.3, 0.15, 0.25),
            "SORT solves more of hard than GRPO: +20.0 points [+10.0, +30.0]; the same way on 2 of 2 seeds.",
        ),
        (
            difference(-0.2, -0.3, -0.1, -0.2),
            "SORT solves less of hard than GRPO: -20.0 points [-30.0, -10.0]; one seed, others may differ.",
        ),
        (
            difference(0.2, -0.1, 0.5, 0.5, -0.1),
            "SORT against GRPO on hard: no difference shown, +20.0 points [-10.0, +50.0]; the same way on "
            "1 of 2 seeds.",
        ),
        (
            difference(0, 0, 0.1, 0),
            "SORT against GRPO on hard: no difference shown, +0.0 points [+0.0, +10.0]; one seed, others "
            "may differ.",
        ),
    ],
)
def test_sentences_of_the_verdict(found: Difference, words: str) -> None:
    assert found.words == words


def test_more_comparisons_make_every_interval_wider() -> None:
    draw = np.random.default_rng(0)
    made = {
        run: {name: {0: {str(p): float(draw.random()) for p in range(60)}} for name in ("hard", "easy")}
        for run in "ABC"
    }
    alone = {(d.a, d.set): d for d in against_first({run: {"hard": made[run]["hard"]} for run in "AB"})}
    many = {(d.a, d.set): d for d in against_first(made)}
    assert list(many) == [("B", "hard"), ("B", "easy"), ("C", "hard"), ("C", "easy")] and list(alone) == [
        ("B", "hard")
    ]
    assert many["B", "hard"].mean == alone["B", "hard"].mean
    assert many["B", "hard"].low < alone["B", "hard"].low and many["B", "hard"].high > alone["B", "hard"].high
    assert many["B", "hard"] == paired("hard", "B", "A", made["B"]["hard"], made["A"]["hard"], 1 - 0.05 / 4)


def test_a_verdict_names_runs_that_did_not_use_the_budget() -> None:
    found = [difference(0.2, 0.1, 0.3, 0.2)]
    assert verdict(found, {"GRPO": {"tokens"}, "SFT": {"steps"}}, "tokens")[1:] == [
        "The interval holds with 95 % confidence, over problems and seeds, paired.",
        "SFT reached train.steps before the budget of tokens was spent, so the runs did not all spend the "
        "same.",
    ]
    assert verdict(found * 2, {"GRPO": {"steps"}}, None)[2:] == [
        "The 2 intervals hold jointly with 95 % confidence, over problems and seeds, paired (Bonferroni)."
    ]
    assert verdict([], {"GRPO": {"steps"}}, None) == [] and against_first({}) == []
