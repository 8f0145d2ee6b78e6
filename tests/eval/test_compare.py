"""Comparisons: their runs, the figures over seeds, and one real comparison."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from handrail import UserError, cli
from handrail._util.names import slug
from handrail.eval import compare
from handrail.eval.compare import over_seeds
from handrail.eval.differences import against_first
from handrail.eval.jobs import Job, by_methods, choose, listed, merged, plan_jobs
from handrail.eval.report.plot import curves
from handrail.eval.report.tables import comparison_table, diversity_table, training_table
from handrail.training.config import Config
from handrail.training.evaluate import wilson
from tests.conftest import EASY, HARD, config


def test_changes_are_merged_key_by_key() -> None:
    tree = {"train": {"steps": 5, "seed": 0}, "eval": {"limit": 4}}
    assert merged(tree, {"train": {"seed": 1}, "model": {"path": "m"}}) == {
        "train": {"steps": 5, "seed": 1}, "eval": {"limit": 4}, "model": {"path": "m"},
    }  # fmt: skip
    assert tree == {"train": {"steps": 5, "seed": 0}, "eval": {"limit": 4}}


def test_lists_and_values_are_replaced_whole() -> None:
    assert merged({"data": {"train": [1, 2]}}, {"data": {"train": [3]}}) == {"data": {"train": [3]}}
    assert merged({"data": {"a": {"b": 1}}}, {"data": {"a": 2}}) == {"data": {"a": 2}}


def test_another_method_does_not_inherit_the_settings_of_the_first() -> None:
    tree = {"method": {"name": "luffy", "gamma": 0.2}}
    assert merged(tree, {"method": {"name": "sort"}}) == {"method": {"name": "sort"}}
    assert merged(tree, {"method": {"clip": True}}) == {
        "method": {"name": "luffy", "gamma": 0.2, "clip": True}
    }


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("SFT on failures, foreign", "sft-on-failures-foreign"),
        ("GRPO", "grpo"),
        (" α = 0.5! ", "α-0-5"),
        ("../up", "up"),
    ],
)
def test_a_run_directory_is_named_after_the_run(name: str, directory: str) -> None:
    assert slug(name) == directory


def compared(runs: dict[str, Any], seeds: list[int] | None = None, **changes: Any) -> Config:
    return config(compare={"runs": runs, "seeds": seeds or [0]}, **changes)


def test_every_run_is_planned_with_every_seed(tmp_path: Path) -> None:
    planned = plan_jobs(
        compared({"A": {"method": {"name": "luffy"}}, "B": {"train": {"steps": 9}}}, [1, 2]), tmp_path
    )
    assert [(job.label, job.config.train.seed) for job in planned] == [
        ("A, seed 1", 1), ("B, seed 1", 1), ("A, seed 2", 2), ("B, seed 2", 2),
    ]  # fmt: skip
    assert [job.config.method["name"] for job in planned[:2]] == ["luffy", "grpo"]
    assert [job.config.train.steps for job in planned[:2]] == [2, 9]
    assert planned[0].directory == tmp_path / "a/seed-1" and planned[0].summary is None
    assert planned[0].config.compare.runs == {}


@pytest.mark.parametrize(
    ("runs", "seeds", "message"),
    [
        ({}, [0], r"no \[compare.runs\]"),
        (
            {"A": {"train": {"stepz": 1}}},
            [0],
            "compare.runs.A: there is no setting train.stepz; did you mean 'steps'",
        ),
        (
            {"A": {"method": {"name": "lufy"}}},
            [0],
            "compare.runs.A: method.name: there is no method 'lufy'; did you mean 'luffy'",
        ),
        (
            {"A": {"method": {"name": "luffy", "gama": 1}}},
            [0],
            "compare.runs.A: there is no setting method.gama; did you mean 'gamma'",
        ),
        ({"A": {}, "a!": {}}, [0], "two runs would be written into .*a/seed-0; rename one"),
        (
            {"!?": {}},
            [0],
            "compare.runs: '!\\?' has no letter or digit to call a directory by; rename this run",
        ),
        ({"A": {}}, [1, 1], "two runs would be written into .*a/seed-1; .*list each seed once"),
    ],
)
def test_an_invalid_comparison_is_refused_before_it_starts(
    runs: Any, seeds: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        plan_jobs(compared(runs, seeds), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_comparison_needs_a_seed() -> None:
    with pytest.raises(UserError, match=r"compare.seeds: list should have at least 1 item"):
        config(compare={"runs": {"A": {}}, "seeds": []})


def test_wilson_by_hand() -> None:
    assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=5e-5)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert wilson(1, 100) == pytest.approx((0.9630, 1), abs=5e-5)


def ends(*shares: float, n: int = 100) -> list[dict[str, Any]]:
    return [
        {"start": {"mean": 0.1 * place}, "end": {"mean": share, "n": n}} for place, share in enumerate(shares)
    ]


def test_one_seed_has_wilsons_interval() -> None:
    figures = over_seeds(ends(0.5))
    assert (figures["low"], figures["high"]) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert (figures["start"], figures["mean"], figures["n"], figures["per_seed"]) == (0, 0.5, 100, [0.5])


def test_three_seeds_far_apart_have_students_interval() -> None:
    # The standard deviation is 0.2, so half the width is 4.3027 · 0.2 / √3 = 0.4968.
    figures = over_seeds(ends(0.3, 0.5, 0.7))
    assert (figures["mean"], figures["low"], figures["high"]) == pytest.approx(
        (0.5, 0.0032, 0.9968), abs=1e-4
    )
    assert figures["n"] == 300 and figures["start"] == pytest.approx(0.1)


def test_three_equal_seeds_still_have_the_uncertainty_of_their_problems() -> None:
    figures = over_seeds(ends(0.5, 0.5, 0.5))
    assert (figures["low"], figures["high"]) == pytest.approx((0.4038, 0.5962), abs=5e-5)


def test_an_interval_stays_within_zero_and_one() -> None:
    figures = over_seeds(ends(0.0, 1.0, 0.5, n=4))
    assert (figures["low"], figures["high"]) == (0, 1)


ROW: dict[str, Any] = {
    "hard [x]": {"start": 0.25, "mean": 0.5, "low": 0.4, "high": 0.6},
    "all_wrong": {"first": None, "last": None}, "guided": 3.0, "steps_without_signal": 1.0, "seconds": 12.3,
}  # fmt: skip
GRADED = {**ROW, "all_wrong": {"first": 1.0, "last": 0.5}}


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, record=True, markup=False, file=StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_shows_names_with_brackets_unchanged() -> None:
    text = printed(comparison_table({"SORT [alpha=0]": ROW, "[/b]": GRADED}, ["hard [x]"]))
    for part in (
        "SORT [alpha=0]",
        "[/b]",
        "hard [x]",
        "25.0% → 50.0%",
        "[40.0%, 60.0%]",
        "no rollouts",
        "100% → 50%",
    ):
        assert part in text
    assert "groups" not in printed(comparison_table({"SFT": ROW}, ["hard [x]"])), "nothing was sampled"


def test_the_tables_of_a_comparison_cut_nothing_at_80_columns() -> None:
    row = {
        **GRADED,
        "easy": {"start": 1.0, "mean": 1.0, "low": 1.0, "high": 1.0},
        "off_policy": 1.0,
        "seconds": 36000,
    }
    methods = {"SFT on failures": row, "GRPO": row}
    for table in (comparison_table(methods, ["hard [x]", "easy"]), training_table(methods, [])):
        text = printed(table)
        assert "…" not in text and "SFT on failures" in text and max(map(len, text.splitlines())) <= 80
        assert text.index("┡") - text.index("┏") < 4 * 81  # two lines of headings at most


def test_the_second_table_omits_columns_of_zeros_or_gaps() -> None:
    text = printed(
        training_table(
            {"SCOPE": {**ROW, "off_policy": 0.031, "salvaged": None}, "GRPO": {**ROW, "off_policy": 0.0}}, []
        )
    )
    assert (
        all(part in text for part in ("SCOPE", "3.1%", "0.0%", "seconds", "signal"))
        and "salvaged" not in text
    )
    assert "signal" not in printed(training_table({"SFT": {**ROW, "steps_without_signal": 0}}, []))


def test_diversity_has_a_table_if_it_was_measured() -> None:
    measured = {**ROW, "hard [x]": {**ROW["hard [x]"], "diversity": {"distinct_4": {"end": 0.25}}}}
    table = diversity_table({"SCOPE": measured}, ["hard [x]"])
    assert table is not None and all(part in printed(table) for part in ("SCOPE", "hard [x]", "0.250"))
    assert (
        diversity_table({"SFT": {**ROW, "hard [x]": {**ROW["hard [x]"], "diversity": {}}}}, ["hard [x]"])
        is None
    )


def test_some_of_the_runs_can_be_chosen() -> None:
    planned = compared({"A": {}, "B": {"train": {"steps": 9}}, "C": {}})
    assert list(choose(planned, ["C", "A"]).compare.runs) == ["C", "A"]
    with pytest.raises(UserError, match="no 'D'; there are: A, B, C"):
        choose(planned, ["A", "D"])


def test_a_run_with_a_comma_in_its_name_can_be_chosen() -> None:
    planned = compared({"GRPO": {}, "LUFFY, mild": {}, "SFT": {}})
    assert list(choose(planned, ["LUFFY, mild"]).compare.runs) == ["LUFFY, mild"]
    assert list(choose(planned, ["SFT, GRPO", "LUFFY, mild"]).compare.runs) == ["SFT", "GRPO", "LUFFY, mild"]
    with pytest.raises(UserError, match="--runs: GRPO is named twice; leave one of them out"):
        choose(planned, ["SFT,GRPO", "GRPO"])


def test_names_in_an_option_are_neither_empty_nor_repeated() -> None:
    assert listed("--methods", "grpo, sort") == ["grpo", "sort"]
    with pytest.raises(UserError, match="--methods grpo,,sort: a name is empty; put one comma between"):
        listed("--methods", "grpo,,sort")
    with pytest.raises(UserError, match="--methods: grpo is named twice"):
        listed("--methods", "grpo,sort,grpo")


def test_a_set_without_verdict_is_left_out_of_the_figures_and_said() -> None:
    ends = {"start": {"mean": 0.5, "n": 4}, "end": {"mean": 0.5, "n": 4}}
    rest = {
        "all_wrong": {"first": None, "last": None},
        "steps_without_signal": 0,
        "seconds": 1.0,
        "status": "",
    }
    unknown = {"start": {"n": 0}, "end": {"n": 0}}

    @dataclass
    class Ended:
        name: str
        summary: dict[str, Any]

    runs = [
        Ended("A", {"seed": 0, "eval": {"hard": ends, "easy": unknown}, **rest}),
        Ended("B", {"seed": 0, "eval": {"hard": ends, "easy": ends}, **rest}),
    ]
    found = compare.aggregate(runs)
    assert "easy" not in found["A"] and found["A"]["hard"]["mean"] == found["B"]["easy"]["mean"] == 0.5
    (said,) = compare.without_verdict(runs)
    assert said.startswith("A, seed 0: the verifier reached no verdict on easy, so A has no accuracy there")
    text = printed(comparison_table(found, ["hard", "easy"]))
    assert "–" in text and text.count("50.0% → 50.0%") == 3
    assert diversity_table(found, ["hard", "easy"]) is None
    one, none = {0: {"p": 1.0}}, {1: {"p": 1.0}}
    rewards = {"A": {"hard": one}, "B": {"hard": one, "easy": one}, "C": {"hard": none}}
    assert [(each.a, each.set) for each in against_first(rewards)] == [("B", "hard")]


def test_methods_can_be_named_instead(tmp_path: Path) -> None:
    own = config(method={"name": "luffy", "gamma": 0.3}, compare={"seeds": [7, 8]})
    planned = plan_jobs(by_methods(own, ["grpo", "luffy"]), tmp_path)
    assert [(job.name, job.seed, job.config.method) for job in planned[:2]] == [
        ("grpo", 7, {"name": "grpo"}), ("luffy", 7, {"name": "luffy", "gamma": 0.3}),
    ]  # fmt: skip
    assert [job.seed for job in planned[2:]] == [8, 8]
    with pytest.raises(UserError, match="compare.runs.lufy: method.name: there is no method 'lufy'"):
        plan_jobs(by_methods(own, ["lufy"]), tmp_path)


def test_workers_are_assigned_to_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert compare.visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert compare.visible_devices() == ["3", "GPU-5"]


def test_a_comparison_without_held_out_problems_still_has_a_plot(tmp_path: Path) -> None:
    step = {"groups/all_wrong": 1, "groups/mixed": 1, "groups/all_right": 0}
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": number, **step}) for number in range(3))
    )
    curves([Job("A", 0, config(), tmp_path)], [], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_accepts_seeds_that_ended_at_different_steps(tmp_path: Path) -> None:
    planned = [Job("A", seed, config(), tmp_path / str(seed)) for seed in (1, 2)]
    for job in planned:
        job.directory.mkdir()
        rows = [{"step": step, "eval/hard/mean": 0.5, "groups/all_wrong": 1} for step in range(3 + job.seed)]
        (job.directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves(planned, ["hard"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


COMPARISON = f"""
[model]
path = "builtin:house-tiny"
device = "cpu"
[data]
train = "{HARD}&n=16"
[eval]
sets = {{ hard = "{HARD}&split=test&n=8", easy = "{EASY}&split=test&n=8" }}
limit = 4
[verifier]
name = "exact"
workers = 1
[rollout]
group_size = 2
max_tokens = 8
[train]
steps = 2
problems_per_step = 2
checkpoint_every = 0
[compare]
seeds = [1, 2]
[compare.runs.GRPO]
[compare.runs."LUFFY, mild"]
method = {{ name = "luffy", entropy_bonus = 0.0 }}
"""


def test_a_comparison_writes_table_plot_and_summary_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "two.toml", tmp_path / "out"
    file.write_text(COMPARISON)

    def handrail(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys,
            "argv",
            ["handrail", "compare", str(file), "--output", str(output), "--jobs", "1", *arguments],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    code, out, _ = handrail()
    assert (
        code == 0
        and "4 runs from builtin:house-tiny" in out
        and "finished already" not in out
        and "LUFFY, mild" in out
    )
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["methods"]) == {"GRPO", "LUFFY, mild"}
    for row in summary["methods"].values():
        for name in ("hard", "easy"):
            assert row[name].keys() >= {"start", "mean", "low", "high", "n"}
            assert row[name]["n"] == 8 and row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
        assert row["all_wrong"].keys() == {"first", "last"} and row["seconds"] > 0 and row["seeds"] == [1, 2]
    assert summary["runs"][1] == {"name": "LUFFY, mild", "seed": 1, "directory": "luffy-mild/seed-1"}
    for difference, name in zip(summary["differences"], ("hard", "easy"), strict=True):
        mild, plain = (summary["methods"][run][name] for run in ("LUFFY, mild", "GRPO"))
        assert (difference["set"], difference["a"], difference["b"], difference["problems"]) == (
            name,
            "LUFFY, mild",
            "GRPO",
            4,
        )
        assert difference["mean"] == pytest.approx(mild["mean"] - plain["mean"])
        assert difference["words"] in summary["verdict"] and difference["words"] in out
    starts = {row["hard"]["start"] for row in summary["methods"].values()}
    assert len(starts) == 1, "all runs of a seed start alike"
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")

    metrics = output / "luffy-mild/seed-2/metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    code, out, _ = handrail()
    assert code == 0 and "4 of them finished already" in out and metrics.stat().st_mtime_ns == written
    assert json.loads((output / "summary.json").read_text()) == summary

    code, _, err = handrail("--methods", "grpo", "--runs", "GRPO")
    assert code == 2 and "give one of them" in err

    code, out, err = handrail("--set", "train.steps=3")
    assert (
        code == 2
        and "another configuration: train.steps is 2 there and 3 here; choose another --output" in err
        and not out
    )
