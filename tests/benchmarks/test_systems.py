"""``python -m benchmarks.systems``: wrong labels, claims and the page."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from benchmarks.systems.__main__ import HARD, HERE, TASKS, main, write_labels
from benchmarks.systems.page import page
from handrail.data.load import load_problems
from handrail.methods import build
from handrail.training.config import load_config

CLAIMS = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))["claims"]


def write_run(directory: Path, right: int, of: int = 4) -> None:
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps({"tokens_sampled": 1000, "steps": 24}))
    correct = {f"p{place}": float(place < right) for place in range(of)}
    rows = [{"step": 0, "set": "hard", "correct": {}}]
    rows += [{"step": 9, "set": name, "correct": correct} for name in ("hard", "easy")]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_claim_is_about_a_run_of_its_comparison() -> None:
    configs = {task: load_config(HERE / f"{task}.toml") for task in TASKS}
    for task, config in configs.items():
        claimed = [claim["run"] for claim in CLAIMS if claim["task"] == task]
        assert ["GRPO", *claimed] == list(config.compare.runs)
        for name, changes in config.compare.runs.items():
            if name != "NPO":  # which needs a file
                build(changes["method"], config.rollout)


def test_three_in_ten_labels_are_wrong(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels.jsonl")
    given = [json.loads(line)["answer"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    true = [problem.answer for problem in load_problems(f"{HARD}160")]
    assert sum(one != other for one, other in zip(given, true, strict=True)) == 48


def test_the_page_says_what_was_found_and_what_was_not_measured(tmp_path: Path) -> None:
    for seed in (31, 32, 33):
        write_run(tmp_path / f"labels/grpo/seed-{seed}", 1)
        write_run(tmp_path / f"labels/olr/seed-{seed}", 3)
    text = page(CLAIMS, tmp_path)
    assert "| GRPO | 25.0 | 25.0 | 1,000 | 24 | 3 |" in text and "| OLR | 75.0 |" in text
    # Two of four problems differ, and each end has an imaginary one more.
    assert "**undecided**; +50.0 [" in text and "points; per seed +50.0, +50.0, +50.0." in text
    assert text.count("Not measured yet.") == len(CLAIMS) - 1


def test_there_is_no_answer_before_all_seeds_have_run(tmp_path: Path) -> None:
    write_run(tmp_path / "labels/grpo/seed-31", 0, 400)
    write_run(tmp_path / "labels/olr/seed-31", 400, 400)
    assert "no answer yet, with 1 of 3 seeds; +100.0 [" in page(CLAIMS, tmp_path)


def test_the_page_is_written_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--write-only", "--page", "page.md"])
    assert (tmp_path / "page.md").read_text().count("Not measured yet.") == len(CLAIMS)
