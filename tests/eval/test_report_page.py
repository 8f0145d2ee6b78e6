"""The report of a real comparison in a real browser: its content, its use by keyboard, and its safety."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, Request

from benchmarks.report_paint import paint, trajectory, write_run
from handrail import train
from handrail._util.names import slug
from handrail.eval.compare import compare
from handrail.eval.jobs import plan_jobs
from handrail.eval.report.page import write_report
from tests.browser import CHROMIUM, chromium
from tests.conftest import EASY, HARD, config

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

METHODS = {
    "GRPO": {"method": {"name": "grpo"}},
    "LUFFY": {"method": {"name": "luffy"}},
    "SORT": {"method": {"name": "sort"}},
    # On easy problems at a high temperature, rollouts fail after a correct step.
    "SCOPE": {
        "method": {"name": "scope", "judge": "reference", "min_correct_prefix": 0.0, "mode": "suffix",
            "placing": "append", "repairs": 4},
        "data": {"train": f"{EASY}&n=64"}, "rollout": {"temperature": 2.0, "group_size": 8},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the built-in backbone for two steps with four methods and two seeds."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("report") / "comparison"
    sources = [{"path": f"{HARD}&n=64"}, {"path": f"{EASY}&n=64"}]
    sets = {"hard": f"{HARD}&split=test&n=8", "easy": f"{EASY}&split=test&n=8"}
    settings = config(
        data={"train": sources}, eval={"sets": sets, "samples": 2, "limit": 4},
        train={"problems_per_step": 8, "checkpoint_every": 0},
        compare={"runs": METHODS, "seeds": [1, 2]},
    )  # fmt: skip
    for job in plan_jobs(
        settings, directory
    ):  # in this process, because compare's processes take long to start
        train(job.config, job.directory)
    compare(settings, directory, 1, lambda label, step, steps, metrics: None)
    return directory


@pytest.fixture(scope="module")
def report(comparison: Path) -> Path:
    return write_report(comparison)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


class Watched:
    """A page in the browser that records requests, errors and dialogs."""

    def __init__(self, browser: Browser, file: Path, **context: Any) -> None:
        self.page: Page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[Request] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request))
        self.url = file.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector(".trajectory")

    def close(self) -> None:
        assert self.complaints == []
        assert {(request.resource_type, request.url.partition("#")[0]) for request in self.requests} == {
            ("document", self.url)
        }
        self.page.context.close()


@pytest.fixture
def watched(browser: Browser, report: Path) -> Iterator[Watched]:
    watched = Watched(browser, report)
    yield watched
    watched.close()


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


def focus(page: Page, selector: str, most: int = 120) -> None:
    """Press Tab until ``selector`` has the focus, and check that the focus is visible."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"Tab never reaches {selector}")


def chosen(page: Page, control: str) -> str:
    return str(page.locator(f"#{control} option:checked").text_content())


def choose(page: Page, control: str, text: str) -> None:
    """Choose the option that begins with ``text``, with the arrow keys."""
    options = page.locator(f"#{control} option").all_text_contents()
    place = next(index for index, option in enumerate(options) if option.startswith(text))
    page.focus(f"#{control}")
    page.keyboard.press("Home")
    for _ in range(place):
        page.keyboard.press("ArrowDown")
    page.wait_for_timeout(100)
    assert chosen(page, control).startswith(text)


# Content


def test_results_come_first_and_every_section_has_its_heading(page: Page, comparison: Path) -> None:
    assert page.locator("h2").all_text_contents() == [
        "Results", "Learning curves", "Groups", "Guided groups", "Trajectories", "Methods and settings",
    ]  # fmt: skip
    assert page.locator("h1").count() == page.locator("main").count() == page.locator("nav").count() == 1
    rows = page.locator(".comparison tbody tr").all_inner_texts()
    summary = json.loads((comparison / "summary.json").read_text())["methods"]
    assert len(rows) == 4
    for row, (name, figures) in zip(rows, summary.items(), strict=True):
        assert name in row and figures["status"] in row
        assert (
            f"{figures['hard']['mean']:.1%}" in row
            and f"[{figures['easy']['low']:.1%}, {figures['easy']['high']:.1%}]" in row
        )
        assert all(
            f"{seed}: {value:.1%}" in row
            for seed, value in zip((1, 2), figures["hard"]["per_seed"], strict=True)
        )


def test_every_chart_has_a_description_a_table_and_a_legend(page: Page) -> None:
    titles = page.locator("figcaption").all_text_contents()
    assert titles == [
        "Accuracy on hard", "Accuracy on easy", "Reward", "Loss", "Entropy of sampled tokens",
        "Tokens sampled", "Tokens trained on",
        "GRPO", "LUFFY", "SORT", "SCOPE", "All-wrong groups guided so far",
    ]  # fmt: skip
    assert page.locator("figure > svg[role=img][aria-label*='At the last step']").count() == len(titles)
    assert page.locator("figure details table").count() == len(titles)
    for section, entries in (
        ("curves", [*METHODS]),
        ("groups", ["all wrong", "mixed", "all right"]),
        ("guided", [*METHODS]),
    ):
        assert [text.strip() for text in page.locator(f"#{section} .legend li").all_inner_texts()] == entries
    for table in page.locator("table").all():
        assert table.locator("caption").count() == 1
        assert table.locator("th:not([scope])").count() == 0


def test_configuration_versions_and_status_are_shown(page: Page, comparison: Path) -> None:
    text = page.locator("#runs").text_content() or ""
    versions = json.loads((comparison / "grpo/seed-1/versions.jsonl").read_text())
    assert f"python {versions['python']}" in text and f"torch {versions['torch']}" in text
    assert "SORT (sort, arXiv 2605.11505): reconstruction" in " ".join(text.split())
    assert (comparison / "luffy/seed-1/config.toml").read_text() in text
    assert page.locator("#runs table tbody th").all_text_contents()[:2] == [
        "data.train.1.path",
        "data.train.2.path",
    ]


# Trajectories, from the keyboard alone


def test_the_skip_link_and_the_sections_are_reached_from_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"
    page.reload()
    focus(page, "nav a[href='#groups']")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#groups"
    focus(page, "#groups summary")
    page.keyboard.press("Enter")
    assert page.locator("#groups details").first.evaluate("element => element.open")
    assert page.locator("#groups details table").first.is_visible()


def test_every_control_has_a_label_and_is_reached_by_tab(page: Page) -> None:
    for control in page.locator("select, input").all():
        assert control.evaluate("element => element.labels.length") == 1
    for selector in ("#run", "#step", "#problem", "[name=shade]", ".tokens"):
        focus(page, selector)


def test_run_step_and_problem_are_chosen_with_the_arrow_keys(page: Page, comparison: Path) -> None:
    assert page.locator("#run option").all_text_contents() == [
        f"{name}, seed {seed}" for name in METHODS for seed in (1, 2)
    ]
    focus(page, "#run")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(100)
    assert chosen(page, "run") == "GRPO, seed 2"
    choose(page, "run", "LUFFY, seed 1")
    choose(page, "step", "2")
    samples = [
        json.loads(line) for line in (comparison / "luffy/seed-1/samples.jsonl").read_text().splitlines()
    ]
    last = [row for row in samples if row["step"] == 2][-1]
    choose(page, "problem", last["problem"])
    assert (
        last["prompt"] in page.locator(".question").inner_text()
        and last["answer"] in page.locator(".question").inner_text()
    )
    shown = [row for row in samples if row["step"] == 2 and row["problem"] == last["problem"]]
    assert [card.locator(".token").all_text_contents() for card in page.locator(".trajectory").all()] == [
        row["tokens"] for row in shown
    ]
    assert page.locator(".trajectory h3").last.inner_text().startswith("Reference in the group 1")


def shades(page: Page, name: str) -> list[str]:
    """Shade tokens by ``name``, chosen from the keyboard, and return the background of every token shown."""
    page.focus("[name=shade]:checked")
    for _ in range(4):
        if page.locator("[name=shade]:checked").get_attribute("value") == name:
            break
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    backgrounds = "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
    return list(page.locator("#shown .token").evaluate_all(backgrounds))


CLEAR = "rgba(0, 0, 0, 0)"


def test_tokens_are_shaded_by_weight_or_advantage_and_say_their_values(page: Page, comparison: Path) -> None:
    samples = [
        json.loads(line) for line in (comparison / "sort/seed-1/samples.jsonl").read_text().splitlines()
    ]
    repaired = next(row for row in samples if row["role"] == "imitated")
    choose(page, "run", "SORT, seed 1")
    choose(page, "step", str(repaired["step"]))
    choose(page, "problem", repaired["problem"])
    assert len({shade for shade in shades(page, "gradient_weight") if shade != CLEAR}) > 2, (
        "weights are many shades"
    )
    largest = max(repaired["gradient_weight"])
    assert re.fullmatch(
        rf"gradient weight: 0\s+{float(f'{largest:.4g}'):g}", page.locator("#scale").inner_text()
    )
    assert "gradient" in page.locator("#scale .ramp").evaluate(
        "element => getComputedStyle(element).backgroundImage"
    )
    assert set(shades(page, "advantage")) == {CLEAR}, "a group that is all wrong has no advantage"
    assert page.locator("#scale").inner_text() == "Every advantage shown is 0."
    assert set(shades(page, "none")) == {CLEAR} and page.locator("#scale").inner_text() == ""
    assert page.locator(".question dt").all_text_contents() == ["Prompt", "Answer", "Plan"]
    imitated = page.locator(".trajectory").last
    assert imitated.locator("h3").inner_text().startswith("Imitated trajectory 1")
    imitated.locator(".tokens").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "Home", "ArrowRight"):
        page.keyboard.press(key)
    weight = f"{repaired['gradient_weight'][1]:.4g}"
    assert (
        imitated.locator(".readout")
        .inner_text()
        .startswith(f"Token 2 of {len(repaired['tokens'])}: “{repaired['tokens'][1]}” · ")
    )
    assert f"reference · gradient weight {float(weight)}" in imitated.locator(".readout").inner_text()
    page.keyboard.press("End")
    assert "“<eos>”" in imitated.locator(".readout").inner_text()
    imitated.locator(".token").nth(2).hover()
    assert imitated.locator(".readout").inner_text().startswith("Token 3 of")


def test_a_repair_shows_authors_and_judge_scores(page: Page, comparison: Path) -> None:
    found = [
        (seed, json.loads(line))
        for seed in (1, 2)
        for line in (comparison / f"scope/seed-{seed}/samples.jsonl").read_text().splitlines()
    ]
    seed, repaired = next(
        (seed, row) for seed, row in found if len(set(row["author"])) == 2 and "judged" in row
    )
    choose(page, "run", f"SCOPE, seed {seed}")
    choose(page, "step", str(repaired["step"]))
    choose(page, "problem", repaired["problem"])
    card = page.locator(".trajectory", has=page.locator("h3", has_text="Repaired rollout 1"))
    spliced = card.locator(".token.reference")
    assert spliced.all_text_contents() == [
        t for t, o in zip(repaired["tokens"], repaired["author"], strict=True) if o == "reference"
    ]
    assert "underline" in spliced.first.evaluate("element => getComputedStyle(element).textDecorationLine")
    assert "underline" not in card.locator(".token.policy").first.evaluate(
        "element => getComputedStyle(element).textDecorationLine"
    )
    assert len({shade for shade in shades(page, "judged") if shade != CLEAR}) == 2, (
        "steps that are right, and steps that are wrong"
    )
    card.locator(".tokens").focus()
    page.keyboard.press("Home")
    assert card.locator(".readout").inner_text().endswith(f"judged {repaired['judged'][0]:g}")


def test_the_page_opens_on_the_last_step_with_a_signal_and_marks_steps_without(
    browser: Browser, tmp_path: Path
) -> None:
    for method in ("a-dead", "b-alive"):
        directory = tmp_path / method / "seed-1"
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text('{"step": 0}\n')
        rows = [trajectory(step, "p", 3, random.Random(0)) for step in (1, 2, 3)]
        dead = [{**row, "gradient_weight": [], "correct": False} for row in rows]
        wanted = dead if method == "a-dead" else [rows[0], {**rows[1], "correct": None}, dead[2]]
        (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    watched = Watched(browser, write_report(tmp_path))
    assert (chosen(watched.page, "run"), chosen(watched.page, "step")) == ("b-alive, seed 1", "2")
    assert watched.page.locator("#step option").all_text_contents() == ["1", "2", "3 (no signal)"]
    assert chosen(watched.page, "problem") == "p: 0 of 1 rollouts correct, 1 unverified"
    assert watched.page.locator(".trajectory h3").inner_text().startswith("Rollout 1unverified · 3 tokens")
    choose(watched.page, "run", "a-dead")
    assert (
        chosen(watched.page, "step") == "2 (no signal)"
        and "wrong · reward" in watched.page.locator(".trajectory h3").inner_text()
    )
    watched.close()


def test_sft_has_a_loss_no_empty_charts_and_ungraded_references(browser: Browser, tmp_path: Path) -> None:
    train(config(method={"name": "sft"}, eval={"sets": {"hard": f"{HARD}&split=test&n=8"}}), tmp_path / "run")
    watched = Watched(browser, write_report(tmp_path / "run"))
    page = watched.page
    assert page.locator("figcaption").all_text_contents() == ["Accuracy on hard", "Loss", "Tokens trained on"]
    heads = " ".join(page.locator(".comparison thead th").all_inner_texts())
    assert "tokens" in heads and not any(
        word in heads for word in ("all wrong", "guided", "salvaged", "signal")
    )
    assert (
        "not graded · " in page.locator(".trajectory h3").first.inner_text()
        and "reward" not in page.locator("#shown").inner_text()
    )
    assert chosen(page, "problem").endswith(": nothing sampled")
    assert "rollouts" not in page.locator(".facts").inner_text()
    watched.close()


# Media


def test_dark_mode_changes_paper_ink_and_charts(browser: Browser, report: Path) -> None:
    colors = []
    for scheme in ("light", "dark"):
        watched = Watched(browser, report, color_scheme=scheme)
        look = "([selector, property]) => getComputedStyle(document.querySelector(selector))[property]"
        parts = (
            ["body", "backgroundColor"],
            ["body", "color"],
            ["figure svg text", "fill"],
            [".legend svg [style*=series]", "stroke"],
        )
        colors.append([watched.page.evaluate(look, part) for part in parts])
        watched.close()
    assert colors[0][0] == "rgb(255, 255, 255)" and all(
        light != dark for light, dark in zip(*colors, strict=True)
    )


def test_a_phone_never_scrolls_sideways(browser: Browser, report: Path) -> None:
    watched = Watched(browser, report, viewport={"width": 360, "height": 740})
    for details in watched.page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 360
    watched.close()


# A table with a long word and no room for it.
BROKEN = """cells => cells.filter(cell => cell.getBoundingClientRect().width < 56
    && cell.textContent.split(/\\s/).some(word => word.length > 6)).map(cell => cell.textContent)"""
LONG_NAMES = [
    "GRPO", "a-method-with-a-very-long-name-and-no-space-at-all", "方法" * 12, "שיטה ארוכה מאוד",
    *(f"SORT, α = {n}" for n in range(7)),
]  # fmt: skip


def test_columns_stay_readable_on_a_phone_with_long_names(browser: Browser, tmp_path: Path) -> None:
    end = {"start": 0.0, "mean": 0.5, "low": 0.4, "high": 0.6, "per_seed": [0.5]}
    figures = {
        "hard": end, "all_wrong": {"first": 1.0, "last": 0.5}, "off_policy": 0.5, "salvaged": None,
        "steps_without_signal": 3, "seconds": 9.0, "seeds": [1], "status": "reconstruction",
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"methods": dict.fromkeys(LONG_NAMES, figures)}))
    for place, name in enumerate(LONG_NAMES):
        directory = tmp_path / slug(name) / "seed-1"
        directory.mkdir(parents=True)
        (directory / "config.toml").write_text(
            f'[method]\nname = "{name}"\na_setting_with_a_long_name = {place}\n'
        )
        rows = [
            {"step": step, "reward": step / 9, "loss": place, "eval/hard/mean": step * place / 99}
            for step in range(9)
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        row = {**trajectory(1, "an-id-" * 40, 3, random.Random(0)), "tokens": ["x" * 900, "الحل هو", "解答"]}
        (directory / "samples.jsonl").write_text(json.dumps(row) + "\n")
    watched = Watched(browser, write_report(tmp_path), viewport={"width": 390, "height": 844})
    scrolls = "box => [box.scrollWidth > box.clientWidth, getComputedStyle(box).backgroundAttachment]"
    assert watched.page.locator(".scroll").first.evaluate(scrolls) == [
        True,
        "local, local, scroll, scroll",
    ]  # a shadow shows that the table scrolls
    for details in watched.page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 390
    assert watched.page.locator("th, td").evaluate_all(BROKEN) == []
    assert watched.page.locator(".comparison tbody tr").count() == len(LONG_NAMES)
    watched.close()


def test_print_shows_the_charts_without_the_controls(watched: Watched, page: Page) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 680, "height": 960})  # A4 within its margins
    assert page.evaluate("document.documentElement.scrollWidth") == 680
    assert page.locator("figure svg").first.is_visible() and page.locator(".comparison").is_visible()
    assert page.locator(".trajectory").first.is_visible()
    assert not page.locator(".controls").is_visible() and not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


# Hostile content

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=alert(3)>",
    "\"'`><b>", "\u202eevil\u202c",
    "a\x00b", "\n", "\ud800", "x" * 5000, "<!--", "]]>", "{{ 7 * 7 }}", "${alert(4)}", "   ",
]  # fmt: skip
SHOWN = [
    *HOSTILE[:4], "‹U+202E›evil‹U+202C›", "a␀b", "⏎", "‹U+D800›", *HOSTILE[8:13], "␣",
]  # fmt: skip


@pytest.fixture
def hostile(comparison: Path, tmp_path: Path) -> Path:
    """Copy the comparison and put hostile names and text wherever a model or a data set may write."""
    directory = tmp_path / "<b>it's"
    shutil.copytree(comparison, directory, ignore=shutil.ignore_patterns("model", "tensorboard"))
    for file in directory.glob("*/*/samples.jsonl"):
        row = json.loads(file.read_text().splitlines()[0])
        many = {
            key: [row[key][0] if row[key] else 0.5] * len(HOSTILE)
            for key in ("author", "advantage", "gradient_weight")
        }
        text = {key: " ".join(HOSTILE) for key in ("problem", "prompt", "answer", "plan", "text")}
        file.write_text(json.dumps({**row, **many, **text, "tokens": HOSTILE}) + "\n")
    summary = json.loads((directory / "summary.json").read_text())
    summary["methods"] = {f"<{name}>": figures for name, figures in summary["methods"].items()}
    summary["verdict"] = HOSTILE[:4]
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def test_hostile_content_is_shown_as_plain_text(browser: Browser, hostile: Path) -> None:
    watched = Watched(browser, write_report(hostile), viewport={"width": 360, "height": 740})
    page = watched.page
    assert page.title() == "<b>it's – Handrail report" and page.locator("h1").inner_text() == "<b>it's"
    assert page.locator(".verdict").all_text_contents() == HOSTILE[:4]
    assert page.locator(".comparison tbody th").first.inner_text().startswith("<GRPO>")
    assert page.locator(".token", has_text="alert").count() == 4
    assert page.locator("#shown .token").all_text_contents() == SHOWN
    assert "‹U+202E›evil" in page.locator(".question").inner_text() and "‹U+202E›evil" in chosen(
        page, "problem"
    )
    assert page.locator("main script, main img, main b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator(".tokens").focus()
    for _ in HOSTILE:
        page.keyboard.press("ArrowRight")
        assert "Token" in page.locator(".readout").inner_text()
    watched.close()


def test_an_injected_script_does_not_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    """The page's content security policy allows one script, by its digest, and no requests."""
    file = tmp_path / "injected.html"
    injected = (
        "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><img "
        "src='https://example.com/x.png'>"
    )
    file.write_text(report.read_text().replace("<main>", f"<main>{injected}"))
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector(".trajectory")
    assert page.evaluate("window.ran") is None
    page.close()


# Speed


def test_ten_thousand_trajectories_are_painted_quickly(browser: Browser, tmp_path: Path) -> None:
    """The limit is far above the times of benchmarks/report_paint.py, to allow for a busy machine."""
    write_run(tmp_path / "run", tokens=16)
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 10_000
    first, _ = paint(browser, write_report(tmp_path / "run"))
    assert first < 3000
