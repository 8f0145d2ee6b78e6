"""``python -m benchmarks.suite``: its runs, the choice of learning rates, claims by hand, and a tiny suite
from command to page."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite.__main__ import app
from benchmarks.suite.claims import Claim, Evidence, Row, _answered, claims
from benchmarks.suite.page import glance
from benchmarks.suite.suite import (
    Cell,
    Result,
    Suite,
    chosen_rates,
    current,
    evidence_cells,
    job,
    load_suite,
    planned,
    read_results,
    search_cells,
)
from benchmarks.suite.weights import auc
from handrail.eval.differences import Difference, over_seeds
from handrail.methods import METHODS, build
from handrail.methods.autonpo import AutoNpo
from handrail.methods.terms import TERMS
from handrail.training.rollback import Rollback
from tests.conftest import Done, Handrail

TINY = r"""
styles = ["foreign"]
seeds = [1, 2]
problems = 5
learning_rates = [1e-4, 1e-3]
search_backbone = "tiny"
search_seed = 9
search_problems = 6
in_domain = ["hard"]
out_of_domain = ["easy"]
[backbones]
tiny = "builtin:house-tiny"
[methods]
GRPO = { method = { name = "grpo" } }
SORT = { method = { name = "sort" } }
[base]
model.device = "cpu"
data.train = "task:house-rules?level=hard&house=2&n=8&seed={problems}&style={style}"
verifier = { name = "exact", extract = '# ([\d ]+)$', workers = 1 }
rollout = { max_tokens = 48, group_size = 2 }
[base.eval]
sets.hard = "task:house-rules?split=test&n=4&seed={problems}"
sets.easy = "task:house-rules?level=easy&split=test&n=4&seed={problems}"
[base.train]
steps = 1
problems_per_step = 2
checkpoint_every = 0
samples_every = 0
[quick]
methods = ["GRPO"]
seeds = [1]
learning_rates = [1e-3]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def result(
    phase: Any,
    style: str,
    method: str,
    seed: int,
    rate: float,
    hard: list[float],
    easy: list[float],
    backbone: str = "tiny",
) -> Result:
    rewards = {"hard": hard, "easy": easy}
    figures = {"all_wrong": {"first": 1.0, "last": 0.5}, "diversity": {"one_minus_self_bleu": hard[0]}}
    return Result(
        Cell(phase, backbone, style, method, seed, rate), "", {"hard": 0.0, "easy": 1.0}, rewards, figures
    )


def test_the_built_in_suite_has_the_documented_runs() -> None:
    suite = load_suite()
    assert (
        len(suite.backbones),
        len(suite.in_domain),
        len(suite.out_of_domain),
        len(suite.methods),
        len(suite.styles),
    ) == (3, 6, 2, 11, 2)
    assert (
        len(suite.seeds) >= 3
        and suite.search_seed not in suite.seeds
        and suite.search_problems != suite.problems
    )
    assert planned(suite) == 3 * 11 * 2 * 3 + 11 * 2 * 3
    cells = [
        *search_cells(suite),
        *evidence_cells(suite, {(s, m): 1e-4 for s in suite.styles for m in suite.methods}),
    ]
    assert len({cell.label for cell in cells}) == len(cells) == planned(suite)
    for cell in cells:
        config = job(suite, cell, Path("x")).config
        build(config.method, config.rollout)
        assert set(config.eval.sets) == {*suite.in_domain, *suite.out_of_domain}
        assert all(("style=" + cell.style) in source.path for source in config.data.train)


def test_the_quick_suite_has_every_system_that_starts_from_nothing() -> None:
    suite = load_suite(quick=True)
    configs = [job(suite, cell, Path("x")).config for cell in evidence_cells(suite, chosen_rates(suite, []))]
    methods = {config.method["name"] for config in configs}
    terms = {term["name"] for config in configs for term in config.method.get("terms", [])}
    assert {*METHODS} - methods == {"sft", "grpo+sft", "dft", "npo"}  # npo needs harvested answers
    assert {*TERMS} - terms == {"overlong", "dmpo"}  # dmpo is a method, too
    assert len(configs) == planned(suite) == 21
    (autonpo,) = (config for config in configs if config.method["name"] == "autonpo")
    method = build(autonpo.method, autonpo.rollout)
    assert isinstance(method, AutoNpo) and Rollback(method, autonpo)  # it refuses a run without checkpoints


def test_the_search_chooses_the_best_rate_and_the_lower_of_equal_ones(tiny: Path) -> None:
    suite = load_suite(tiny)
    found = [
        result("search", "foreign", "GRPO", 9, 1e-3, [0, 0], [1, 1]),
        result("search", "foreign", "GRPO", 9, 1e-4, [0, 0], [1, 1]),
        result("search", "foreign", "SORT", 9, 1e-4, [1, 0], [0, 1]),
        result("search", "foreign", "SORT", 9, 1e-3, [1, 1], [0, 1]),
        result("evidence", "foreign", "SORT", 1, 1e-4, [1, 1], [1, 1]),
    ]
    assert chosen_rates(suite, found) == {("foreign", "GRPO"): 1e-4, ("foreign", "SORT"): 1e-3}
    assert chosen_rates(load_suite(tiny, quick=True), []) == {("foreign", "GRPO"): 1e-3}


def row(low: float, high: float) -> Row:
    return Row("here", Difference("", "A", "B", (low + high) / 2, low, high, [], 1))


def test_a_claims_average_is_over_settings_seed_by_seed() -> None:
    nothing = {1: {"p": 0.0, "q": 0.0}, 2: {"p": 0.0, "q": 0.0}, 3: {"p": 1.0, "q": 1.0}}
    here = ({1: {"p": 1.0, "q": 0.0}, 2: {"p": 1.0, "q": 1.0}, 3: {"p": 1.0, "q": 1.0}}, nothing)
    there = ({1: {"p": 0.0, "q": 0.0}, 2: {"p": 1.0, "q": 0.0}}, nothing)
    rows, planned, average = _answered({"here": here, "there": there, "not yet": ({}, nothing)}, "A", "B")
    assert [row.setting for row in rows] == ["here", "there"] and planned == 3 and average is not None
    # Seed 1: the mean of 1/2 and 0; seed 2: of 1 and 1/2. Seed 3 is missing in one setting.
    assert average.difference.per_seed == [0.25, 0.75] and average.difference.mean == 0.5
    half = 12.706 * (0.5 / 2**0.5) / 2**0.5  # Student's 97.5 % point with one degree of freedom
    assert half > 1 and (average.difference.low, average.difference.high) == (
        -1.0,
        1.0,
    )  # it shows nothing, and stays within what is possible
    assert _answered({"here": here}, "A", "B")[2] is None


@pytest.mark.parametrize(
    ("rows", "answer"),
    [
        ([row(0.1, 0.2)], "holds"),
        ([row(0.1, 0.2)] * 2, "holds in all 2 settings"),
        ([row(-0.1, 0.0)] * 3, "fails in all 3 settings"),
        ([row(-0.1, 0.1)] * 2, "undecided: no interval excludes either answer"),
        (
            [row(0.1, 0.2), row(-0.2, -0.1), row(-0.1, 0.1)],
            "holds in 1 of 3, fails in 1 of 3, undecided in 1 of 3",
        ),
    ],
)
def test_a_claim_that_fails_is_called_failed(rows: list[Row], answer: str) -> None:
    assert Claim("A beats B", "", rows, len(rows)).answer == answer
    assert Claim("A beats B", "", rows, 6).answer == f"{answer}, of 6 planned"


def made(suite: Suite, hard: dict[tuple[str, str], list[float]]) -> Evidence:
    return Evidence(suite, [
        result("evidence", "clean", method, seed, 1e-4, [value] * 8, [1.0] * 8, backbone)
        for (backbone, method), values in hard.items()
        for seed, value in zip(suite.seeds, values, strict=True)
    ])  # fmt: skip


def test_claims_by_hand(tiny: Path) -> None:
    """The gain is .5 on the weak backbone and .25 on the strong one, the same with every seed."""
    suite = load_suite(tiny).model_copy(
        update={"backbones": {"weak": "w", "strong": "s"}, "styles": ["clean"]}
    )
    evidence = made(suite, {
        ("weak", "GRPO"): [0, 0], ("weak", "SORT"): [0.5, 0.5], ("strong", "GRPO"): [0.25, 0.25],
        ("strong", "SORT"): [0.5, 0.5],
    })  # fmt: skip
    stalls, largest = claims(evidence)
    assert [(row.setting, row.difference.mean) for row in stalls.rows] == [
        ("weak, clean", 0.5),
        ("strong, clean", 0.25),
    ]
    assert [(row.setting, row.difference.mean, row.difference.per_seed) for row in largest.rows] == [
        ("weak against strong, clean", 0.25, [0.25, 0.25])
    ]
    assert "weakest" in largest.says


def test_what_was_learned_and_kept_is_a_mean_over_backbones_and_seeds(tiny: Path) -> None:
    suite = load_suite(tiny).model_copy(
        update={"backbones": {"weak": "w", "strong": "s"}, "styles": ["clean"]}
    )
    found = glance(made(suite, {("weak", "GRPO"): [0, 0.25], ("strong", "GRPO"): [0.5, 0.75]}))
    assert found["header"] == ["method", "clean: in-domain", "clean: out-of-domain"]
    assert found["rows"] == [
        ["*before training*", "0.0", "100.0"],
        ["GRPO", "37.5", "100.0"],
        ["SORT", "", ""],
    ]


def test_diversity_is_compared_over_seeds() -> None:
    found = over_seeds("", "SCOPE", "LUFFY", {1: 0.5, 2: 0.7, 3: 0.1}, {1: 0.4, 2: 0.4})
    assert found.per_seed == pytest.approx([0.1, 0.3])
    half = 12.7062047 * 0.1414214 / 2**0.5  # Student's quantile with one degree of freedom
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)
    assert over_seeds("", "A", "B", {1: 0.5}, {1: 0.4}).low == float("-inf")


def test_auc_by_hand() -> None:
    assert auc([0.9, 0.8, 0.1], [True, True, False]) == 1
    assert auc([0.1, 0.9], [True, False]) == 0
    assert auc([0.5, 0.5, 0.1], [True, False, False]) == 0.75  # a tie counts half
    assert auc([0.5], [True]) is None


@pytest.fixture
def suite(run_app: Callable[..., Done]) -> Handrail:
    return partial(run_app, app)


def test_a_suite_from_command_to_page(tiny: Path, suite: Handrail) -> None:
    done = suite("--suite", str(tiny), "--output", "out", "--jobs", "2", "--page", "page.md")
    assert done.code == 0, done.err
    results = read_results(Path("out/results.jsonl"))
    assert len(results) == 4 + 4 == planned(load_suite(tiny))
    chosen = chosen_rates(load_suite(tiny), results)
    for each in results:
        assert set(each.rewards) == {"hard", "easy"} and all(
            len(rewards) == 4 for rewards in each.rewards.values()
        )
        assert (
            each.cell.phase == "search"
            or each.cell.learning_rate == chosen[each.cell.style, each.cell.method]
        )
    assert not list(Path("out/runs").iterdir())
    text = Path("page.md").read_text()
    assert (
        "On problems that all rollouts fail, GRPO stalls and SORT does not." in text
        and "(out/results.jsonl)" in text
    )
    assert (
        "| tiny, foreign |" in text
        and "## tiny, foreign references" in text
        and "How the learning rates were chosen" in text
    )
    weights = json.loads(Path("out/weights.json").read_text())
    assert 0 < weights["tiny, foreign"]["w (α = ½)"]["mean"] < 1

    # Only missing results are run again; a line that is cut off counts as missing.
    lines = Path("out/results.jsonl").read_text().splitlines(keepends=True)
    Path("out/results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])
    again = suite("--suite", str(tiny), "--output", "out", "--jobs", "2", "--page", "page.md")
    assert again.code == 0 and "8 runs, 7 of them finished already" in again.out
    repeated = read_results(Path("out/results.jsonl"))
    assert [each.rewards for each in repeated] == [each.rewards for each in results]

    assert (
        suite("--suite", str(tiny), "--output", "out", "--write-only").code == 0
        and Path("out/evidence.md").exists()
    )
    assert len(current(load_suite(tiny), repeated)) == 8
    tiny.write_text(TINY.replace("group_size = 2", "group_size = 3"))
    assert current(load_suite(tiny), repeated) == []
    other = suite("--suite", str(tiny), "--output", "out")
    assert other.code == 2 and "holds results of other settings" in other.err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seeds = [1, 2]", "seeds = []"), "seeds: list should have at least 1 item"),
        (
            ("problems = 5", "problems = 5\nproblem = 6"),
            "there is no setting problem; did you mean 'problems'",
        ),
        (
            ('name = "sort"', 'name = "sort", alfa = 1'),
            "the suite's methods.SORT: there is no setting method.alfa; did you mean 'alpha'",
        ),
        (("styles", "styles ="), "cannot be read as TOML"),
        (
            ('search_backbone = "tiny"', 'search_backbone = "tinny"'),
            "search_backbone 'tinny' is none of the backbones: tiny",
        ),
        (('in_domain = ["hard"]', 'in_domain = ["nope"]'), "'nope' is none of base.eval.sets: hard, easy"),
    ],
)
def test_an_invalid_suite_is_refused(
    tiny: Path, suite: Handrail, change: tuple[str, str], sentence: str
) -> None:
    tiny.write_text(TINY.replace(*change, 1))
    done = suite("--suite", str(tiny), "--output", "out")
    assert done.code == 2 and sentence in done.err and not Path("out").exists()
