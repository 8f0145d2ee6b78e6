"""The parts of a report: reading runs, drawing charts and packing trajectories, checked by hand."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from handrail import cli
from handrail.eval.report import charts, palette
from handrail.eval.report.charts import Line, Style
from handrail.eval.report.chunks import chunks, readable
from handrail.eval.report.page import figures, render, settings, versions
from handrail.eval.report.read import Run, read
from handrail.eval.report.series import (
    Point,
    evaluated,
    group_shares,
    guided,
    over_seeds,
    window_size,
    windowed,
    windows,
)


def step(number: int, wrong: int = 0, mixed: int = 0, right: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "groups/all_wrong": wrong,
        "groups/mixed": mixed,
        "groups/all_right": right,
        **more,
    }


def write_run(
    directory: Path, rows: list[dict[str, Any]], summary: dict[str, Any] | None = None, config: str = ""
) -> Run:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.toml").write_text(config)
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    return Run("A", 0, directory)


def summary(accuracy: float, **more: Any) -> dict[str, Any]:
    ends = {"start": {"mean": 0.0, "n": 100}, "end": {"mean": accuracy, "n": 100}}
    return {
        "method": "luffy", "source": "arXiv 1", "status": "published", "seed": 1, "eval": {"hard": ends},
        "seconds": 2.0,
        "all_wrong": {"first": 1.0, "last": 0.5}, "guided": 3, "off_policy": 0.25, "salvaged": None,
        "steps_without_signal": 0,
        "tokens_sampled": 640, **more,
    }  # fmt: skip


def test_a_method_without_rollouts_shows_no_group_shares(tmp_path: Path) -> None:
    figures = {
        "hard": {"start": 0.0, "mean": 0.5, "low": 0.4, "high": 0.6, "per_seed": [0.5]},
        "off_policy": 0.5, "salvaged": None,
        "steps_without_signal": 3, "seconds": 9.0, "seeds": [1], "status": "published",
    }  # fmt: skip
    ends = {"SFT": {"first": None, "last": None}, "GRPO": {"first": 1.0, "last": 0.5}}
    for name in ends:
        write_run(tmp_path / name.lower() / "seed-1", [{"step": 0, "eval/hard/mean": 0.1}])
    methods = {name: {**figures, "all_wrong": wrong} for name, wrong in ends.items()}
    (tmp_path / "summary.json").write_text(json.dumps({"methods": methods}))
    page = render(read(tmp_path))
    assert "<td>no rollouts</td>" in page and "<td>100% → 50%</td>" in page and "<td>– → –</td>" not in page


# Series


def test_a_point_is_the_mean_over_seeds_with_a_band_from_lowest_to_highest() -> None:
    assert over_seeds([{1: 0.25, 2: 0.5}, {1: 0.75}]) == [Point(1, 0.5, 0.25, 0.75), Point(2, 0.5, 0.5, 0.5)]
    assert over_seeds([]) == over_seeds([{}]) == []


def test_windows_end_at_their_last_step_and_the_last_may_be_shorter() -> None:
    rows = [{"step": number} for number in range(1, 6)]
    assert windows(rows, 2) == {2: rows[:2], 4: rows[2:4], 5: rows[4:]}


def test_a_line_has_at_most_forty_windows(tmp_path: Path) -> None:
    assert window_size([]) == window_size([write_run(tmp_path / "a", [step(40)])]) == 1
    assert window_size([write_run(tmp_path / "b", [step(41)]), write_run(tmp_path / "c", [step(3)])]) == 2
    assert window_size([write_run(tmp_path / "d", [step(120)])]) == 3


def test_metrics_of_a_run_by_hand(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval/hard/mean": 0.1, "eval/hard/low": 0.0},
        step(1, 3, 1, 0, reward=0.5, **{"groups/guided": 2}),
        step(2, 1, 1, 2, reward=None, **{"groups/guided": 1}),
        step(3, 0, 0, 4, reward=0.25, **{"eval/hard/mean": 0.6}),
        step(4, reward=None),
    ]
    run = write_run(tmp_path / "run", rows)
    assert evaluated(run, "hard") == {0: 0.1, 3: 0.6}
    assert windowed(run, "reward", 1) == {1: 0.5, 3: 0.25}
    assert windowed(run, "reward", 2) == {2: 0.5, 4: 0.25}
    assert guided(run, 1) == {1: 2, 2: 3, 3: 3, 4: 3} and guided(run, 3) == {3: 3, 4: 3}
    assert group_shares([run], 1) == {1: (0.75, 0.25, 0.0), 2: (0.25, 0.25, 0.5), 3: (0.0, 0.0, 1.0)}
    other = write_run(tmp_path / "other", [step(1, 0, 0, 4), step(2, 4)])
    assert group_shares([run, other], 2) == {2: (0.5, 0.125, 0.375), 4: (0.0, 0.0, 1.0)}


# Reading


def test_a_directory_without_a_run_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def handrail(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["handrail", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    code, error = handrail(tmp_path / "nowhere")
    assert (
        code == 2
        and error.startswith("error: ")
        and "nowhere: there is no such directory; give" in error
        and error.count("\n") == 1
    )
    code, error = handrail(tmp_path)
    assert (
        code == 2
        and "holds neither a run (metrics.jsonl) nor a comparison" in error
        and error.count("\n") == 1
    )
    write_run(tmp_path / "run", [step(1, 1)])
    assert (
        handrail(tmp_path / "run", "--output", tmp_path / "a/new/place.html") == (0, "")
        and (tmp_path / "a/new/place.html").exists()
    )
    code, error = handrail(tmp_path / "run", "--output", tmp_path / "run/metrics.jsonl/place.html")
    assert code == 2 and "place.html cannot be written (File exists); choose another --output" in error
    assert handrail(tmp_path / "run") == (0, "") and (tmp_path / "run/report.html").read_text().startswith(
        "<!doctype html>"
    )


def test_a_line_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 0}, step(1, 1)])
    with (run.directory / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "gro')
    (run.directory / "summary.json").write_text('{"method": "lu')
    assert [row["step"] for row in run.metrics] == [0, 1] and run.last_step == 1
    assert run.summary is None and run.versions == []


def test_a_figure_that_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1, 1, reward=float("nan")), step(2, 1, reward=0.5)])
    assert windowed(run, "reward", 1) == {2: 0.5}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(1, "x", advantage=[float("inf")])) + "\n")
    (chunk,) = chunks(0, tmp_path / "samples.jsonl")
    assert json.loads(gzip.decompress(base64.b64decode(chunk.data)))[0]["members"][0]["advantage"] == [None]


def test_runs_have_the_order_and_names_of_the_comparisons_summary(tmp_path: Path) -> None:
    for name in ("b-2", "a", "extra"):
        for seed in (10, 9):
            write_run(tmp_path / name / f"seed-{seed}", [step(1, 1)])
    assert [(run.name, run.seed) for run in read(tmp_path).runs] == [
        ("a", 9), ("a", 10), ("b-2", 9), ("b-2", 10), ("extra", 9), ("extra", 10),
    ]  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"B, 2": {}, "A": {}}}))
    assert list(read(tmp_path).methods) == ["B, 2", "A", "extra"]


def test_a_single_run_is_named_after_its_method_and_its_held_out_sets_are_found(tmp_path: Path) -> None:
    config = '[method]\nname = "sort"\n[train]\nseed = 7\n'
    write_run(
        tmp_path / "mine",
        [{"step": 0, "eval/a b/mean": 0.5, "eval/c/mean": 0, "eval/c/diversity/distinct_4": 1}],
        None,
        config,
    )
    results = read(tmp_path / "mine")
    assert (results.title, results.runs[0].name, results.runs[0].seed, results.sets) == (
        "mine",
        "sort",
        7,
        ["a b", "c"],
    )


# Figures


def test_a_set_without_verdict_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    known = summary(0.25)
    known["eval"]["easy"] = {"start": {"mean": 1.0, "n": 4}, "end": {"n": 0}}
    rows = [step(1, 1) | {"eval/hard/mean": 0.25, "eval/easy/mean": 1.0}]
    write_run(tmp_path / "a/seed-1", rows, known)
    page = render(read(tmp_path))
    assert "25.0%" in page
    assert "a, seed 1: the verifier reached no verdict on easy, so a has no accuracy there" in page


def test_figures_are_over_the_finished_seeds_unless_the_comparison_has_its_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a/seed-1", [step(1, 1)], summary(0.25))
    write_run(tmp_path / "a/seed-2", [step(1, 1)], summary(0.75))
    write_run(tmp_path / "a/seed-3", [step(1, 1)])
    row = figures(read(tmp_path))["a"]
    assert (row["hard"]["mean"], row["hard"]["per_seed"], row["off_policy"], row["status"]) == (
        0.5,
        [0.25, 0.75],
        0.25,
        "published",
    )
    (tmp_path / "summary.json").write_text(json.dumps({"methods": {"A": {"seconds": 9.0}}}))
    assert figures(read(tmp_path)) == {"A": {"seconds": 9.0}}


def test_settings_in_which_methods_differ_are_found(tmp_path: Path) -> None:
    write_run(tmp_path / "a/seed-1", [], None, '[train]\nseed = 1\nsteps = 4\n[method]\nname = "grpo"\n')
    write_run(
        tmp_path / "b/seed-1",
        [],
        None,
        '[train]\nseed = 2\nsteps = 4\n[method]\nname = "luffy"\ngamma = 0.2\n',
    )
    assert settings(read(tmp_path)) == [("method.name", ["grpo", "luffy"]), ("method.gamma", ["–", "0.2"])]
    write_run(tmp_path / "c/seed-1", [], None, "[[data.train]]\nshare = 1.0\n[[data.train]]\nshare = 3.0\n")
    assert settings(read(tmp_path))[-1] == ("data.train.2.share", ["–", "–", "3.0"])


def test_a_resumption_on_other_versions_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    lines = [{"step": 0, "torch": "2.7"}, {"step": 5, "torch": "2.7"}, {"step": 9, "torch": "2.8"}]
    (run.directory / "versions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert versions(read(tmp_path / "run")) == [
        ("torch 2.7", ["grpo, seed 0", "grpo, seed 0 from step 5"]),
        ("torch 2.8", ["grpo, seed 0 from step 9"]),
    ]  # fmt: skip
    assert "torch 2.8" in render(read(tmp_path / "run"))


def test_verdict_and_differences_are_shown_where_a_comparison_has_them(tmp_path: Path) -> None:
    write_run(tmp_path / "a/seed-1", [step(1, 1)], summary(0.25))
    bare = render(read(tmp_path))
    assert "Differences in held-out accuracy" not in bare and 'class="verdict"' not in bare
    difference = {
        "set": "hard",
        "a": "A",
        "b": "B",
        "mean": 0.1234,
        "low": -0.01,
        "high": None,
        "per_seed": [0.5],
        "words": "more",
    }
    whole = {"verdict": ["A is <b>better</b>."], "differences": [difference, {**difference, "high": 0.2}]}
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    page = render(read(tmp_path))
    assert '<p class="verdict">A is &lt;b&gt;better&lt;/b&gt;.</p>' in page
    assert (
        page.count("A is &lt;b&gt;better") == 1
        and "more" not in page.split("Differences in held-out")[1].split("</table>")[0]
    ), "said once"
    assert "<td>+12.3</td>" in page and "<td>+12.3 [−1.0, +20.0]</td>" in page and "<td>+50.0</td>" in page


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [])
    page = render(read(tmp_path / "run"))
    assert (
        "No run is finished" in page
        and "No trajectories were written" in page
        and "<svg" not in page.split("<main>")[1]
    )


# Charts


def test_a_chart_takes_colors_from_css_and_labels_its_last_value() -> None:
    points = [Point(0, 0.1, 0.0, 0.2), Point(10, 0.5, 0.4, 0.6)]
    chart = charts.line_chart(
        "Accuracy on $x$ <", [Line("A & B", Style(1), points)], share=True, unit="accuracy"
    )
    assert (
        'aria-label="Line chart: Accuracy on $x$ &lt; by step. At the last step: A &amp; B 50.0%."' in chart
    )
    assert "var(--series-1)" in chart and "var(--grid)" in chart and "#0000" not in chart
    assert (
        set(re.findall(r"#[0-9a-f]{6}\b", chart)) <= {"#000000"}
        and "<style" not in chart
        and "<metadata" not in chart
    )
    areas = charts.area_chart("A", {1: (0.5, 0.25, 0.25), 2: (0.0, 0.25, 0.75)})
    assert "At the last step: all wrong 0%, mixed 25%, all right 75%." in areas
    assert all(f"var(--{kind})" in areas for kind in ("all-wrong", "mixed", "all-right"))


def test_large_figures_are_written_out() -> None:
    chart = charts.line_chart(
        "Tokens", [Line("A", Style(0), [Point(1, 2e6, 1e6, 4e6)])], share=False, unit="tokens per step"
    )
    assert ">2,000,000</text>" in chart and "1e6" not in chart


def test_the_report_and_the_plot_have_the_same_colors() -> None:
    variables = palette.css()
    for place in range(palette.SERIES):
        assert f"--series-{place}: {Style(place).plot_arguments(palette.LIGHT)['color']};" in variables
        assert f"var(--series-{place})" in charts.line_swatch(Style(place))
    assert palette.LIGHT.keys() == palette.DARK.keys()


def contrast(one: str, other: str) -> float:
    """Contrast as required by WCAG 2.2, 1.4.11."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [palette.LIGHT, palette.DARK])
def test_lines_and_text_have_enough_contrast(colors: dict[str, str]) -> None:
    for name, color in colors.items():
        if name.startswith("series"):
            assert contrast(color, colors["paper"]) >= 3, name
    assert all(contrast(colors[name], colors["paper"]) >= 4.5 for name in ("ink", "muted", "link"))


def test_methods_are_distinguishable_without_color() -> None:
    styles = [Style(place).line for place in range(16)]
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles[:8]}) == 8
    assert len({(style["color"], style["marker"]) for style in styles}) == 16


# Samples


def sample(step: int, problem: str, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "problem": problem, "prompt": "p", "answer": "a", "role": "trajectory", "reward": 0.0,
        "correct": False,
        "finished": True, "text": "1", "tokens": ["1"], "author": ["policy"], "advantage": [0.5],
        "gradient_weight": [1.0], **more,
    }  # fmt: skip


def test_samples_are_packed_by_step_and_grouped_by_problem(
    tmp_path: Path,
) -> None:
    rows = [
        sample(1, "x", plan="do"),
        sample(1, "x", judged=[None]),
        sample(1, "y", targets=["▁2"], hint="double"),
        sample(9, "x", tokens=["\ud800</script>\x00"], gradient_weight=[]),
    ]
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "prob'
    )
    packed = list(chunks(3, tmp_path / "samples.jsonl"))
    assert [(chunk.run, chunk.step) for chunk in packed] == [(3, 1), (3, 9)]
    assert [chunk.signal for chunk in packed] == [True, False]
    first, second = (json.loads(gzip.decompress(base64.b64decode(chunk.data))) for chunk in packed)
    member = {
        "tokens": ["1"],
        "role": "trajectory",
        "reward": 0.0,
        "correct": False,
        "finished": True,
        "author": ["policy"],
        "advantage": [0.5],
        "gradient_weight": [1.0],
    }
    assert first == [
        {
            "id": "x",
            "prompt": "p",
            "answer": "a",
            "plan": "do",
            "members": [member, {**member, "judged": [None]}],
        },
        {
            "id": "y",
            "prompt": "p",
            "answer": "a",
            "plan": None,
            "members": [{**member, "targets": [" 2"], "hint": "double"}],
        },
    ]
    assert second[0]["members"][0]["tokens"] == ["\ud800</script>\x00"]
    assert packed == list(chunks(3, tmp_path / "samples.jsonl")), "the same samples give the same bytes"


def test_samples_of_runs_made_before_their_keys_were_renamed_are_shown(tmp_path: Path) -> None:
    today = [sample(1, "x", role="imitated"), sample(1, "y")]
    before = [
        {{"author": "origin", "advantage": "credit", "gradient_weight": "weight"}.get(key, key): value
        for key, value in row.items()} for row in today
    ]  # fmt: skip
    before[0]["role"] = "demonstration"
    for name, samples in (("today", today), ("before", before)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert list(chunks(0, tmp_path / "before")) == list(chunks(0, tmp_path / "today"))


@pytest.mark.parametrize(
    ("token", "byte_level", "text"),
    [("Ġthe", True, " the"), ("Ċ", True, "\n"), ("Ã©", True, "é"), ("Ã", True, "\\xc3"),
        ("<|eos|>", True, "<|eos|>"), ("日", True, "日"),
     ("Ġ", False, "Ġ"), ("▁the", False, " the"), ("42", False, "42")],
)  # fmt: skip
def test_tokens_are_shown_as_their_text(token: str, byte_level: bool, text: str) -> None:
    assert readable(token, byte_level) == text
