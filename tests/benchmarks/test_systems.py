"""``python -m benchmarks.systems``: its data, claims and page."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from benchmarks.systems.__main__ import HERE, TASKS, main
from benchmarks.systems.data import LABELS, LUCK, replaced_labels, write_labels, write_luck
from benchmarks.systems.page import PICK, page
from benchmarks.systems.verifier import ends_right
from handrail.data.load import load_problems
from handrail.eval.attempts import Attempt, Attempts, line
from handrail.methods import build
from handrail.training.config import load_config

CLAIMS = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))["claims"]
SEEDS = {task: 3 for task in (*TASKS, PICK)}


def write_run(directory: Path, right: int, of: int = 4, entropy: float = 0.1) -> None:
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps({"tokens_sampled": 1000, "steps": 24}))
    correct = {f"p{place}": float(place < right) for place in range(of)}
    rows = [{"step": 0, "set": "hard", "correct": {}}]
    rows += [{"step": 9, "set": name, "correct": correct} for name in ("hard", "easy")]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": 0}, *({"step": step, "entropy": 9.0} for step in range(1, 10))]
    steps.append({"step": 10, "entropy": entropy})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))


def attempt(answer: str | None, correct: bool = False, energy: float | None = None) -> Attempt:
    return Attempt("", 3, True, float(correct), correct, answer, "ok", energy=energy)


def test_every_claim_is_about_a_run_of_its_comparison() -> None:
    configs = {task: load_config(HERE / f"{task}.toml") for task in TASKS}
    for task, config in configs.items():
        claimed = dict.fromkeys(claim["run"] for claim in CLAIMS if claim["task"] == task)
        assert ["GRPO", *claimed] == list(config.compare.runs)
        for name, changes in config.compare.runs.items():
            if name != "NPO":  # which needs a file
                build(changes["method"], config.rollout)


def test_half_of_the_labels_are_what_the_policy_says_wrongly(tmp_path: Path) -> None:
    problems = load_problems(LABELS)
    silent = problems[1].id  # gives no wrong answer, so that its label stays right
    with (tmp_path / "attempts.jsonl").open("w") as stream:
        for problem in problems:
            tried = [attempt("1 1 1"), attempt("2 2 2"), attempt("2 2 2"), attempt(None)]
            right = [attempt(problem.answer, correct=True)] * 3
            stream.write(line(Attempts(problem.id, right if problem.id == silent else [*right, *tried])))
    write_labels(tmp_path / "attempts.jsonl", tmp_path / "labels.jsonl")
    given = [json.loads(row)["answer"] for row in (tmp_path / "labels.jsonl").read_text().splitlines()]
    for place, (answer, problem) in enumerate(zip(given, problems, strict=True)):
        wrong = place % 2 == 1 and problem.id != silent
        assert answer == ("2 2 2" if wrong else problem.answer)


def test_replaced_labels_are_compared_with_the_true_ones(tmp_path: Path) -> None:
    first, second = load_problems(LABELS)[:2]
    rows = [(first.id, "1 1 1", "2 2 2"), (first.id, "1 1 1", first.answer), (second.id, second.answer, "3")]
    keys = ("problem", "given", "answer")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows]
    (tmp_path / "labels.jsonl").write_text("".join(lines))
    assert replaced_labels(tmp_path / "labels.jsonl") == (0.5, 0.5)


def test_luck_reads_the_last_digit_of_training_problems_and_all_of_the_others(tmp_path: Path) -> None:
    write_luck(tmp_path / "luck.jsonl")
    trained = load_problems(str(tmp_path / "luck.jsonl"))[0]
    whole = load_problems(LUCK)[0]
    assert trained.prompt == whole.prompt and trained.references == whole.references
    assert (whole.answer, trained.answer) == ("60 16 44", "4")
    assert ends_right(trained, " 60 16 44 ") == ends_right(whole, "60 16 44") == 1.0
    assert ends_right(trained, "1 2 34") == 1.0 and ends_right(whole, "1 2 34") == 0.0
    assert ends_right(trained, "60 16 45") == 0.0


def test_the_page_says_what_was_found_and_what_was_not_measured(tmp_path: Path) -> None:
    for seed in (31, 32, 33):
        write_run(tmp_path / f"labels/grpo/seed-{seed}", 1)
        write_run(tmp_path / f"labels/olr/seed-{seed}", 3)
    text = page(CLAIMS, tmp_path, SEEDS)
    assert "| GRPO | 25.0 | 25.0 | 1,000 | 24 | 3 |" in text and "| OLR | 75.0 |" in text
    # Two of four problems differ, and each end has an imaginary one more.
    assert "**undecided**; +50.0 [" in text and "points; per seed +50.0, +50.0, +50.0." in text
    assert text.count("Not measured yet.") == len(CLAIMS) - 1


def test_a_claim_can_be_about_entropy_at_the_end(tmp_path: Path) -> None:
    for seed, more in ((31, 0.05), (32, 0.06), (33, 0.07)):
        write_run(tmp_path / f"signal/grpo/seed-{seed}", 1)
        write_run(tmp_path / f"signal/a/seed-{seed}", 1, entropy=0.1 + more)
    claim = {"task": "signal", "run": "A", "measure": "entropy", "says": "More.", "expected": "holds"}
    text = page([claim], tmp_path, SEEDS)
    # Student's interval: 6 ± 4.303 · 1 / √3.
    assert (
        "Found: **holds**; +6.0 [+3.5, +8.5] hundredths of a nat per token; per seed +5.0, +6.0, +7.0."
        in text
    )


def test_picking_is_compared_with_voting_on_the_same_completions(tmp_path: Path) -> None:
    for seed in (41, 42):
        directory = tmp_path / f"pick/seed-{seed}"
        directory.mkdir(parents=True)
        (directory / "summary.json").write_text("{}")
        # The right answer has the least energy, and two votes of eight.
        tried = [attempt("1", True, 0.1), attempt("1", True, 0.7), attempt(None)]
        tried += [attempt("2", energy=0.2)] * 5
        (directory / "hard.jsonl").write_text(line(Attempts("p", tried)))
    claim = {"task": "pick", "run": "ODAR", "measure": "pick", "says": "Better.", "expected": "holds"}
    assert "per seed +100.0, +100.0." in page([claim], tmp_path, SEEDS)


def test_there_is_no_answer_before_all_seeds_have_run(tmp_path: Path) -> None:
    write_run(tmp_path / "labels/grpo/seed-31", 0, 400)
    write_run(tmp_path / "labels/olr/seed-31", 400, 400)
    assert "no answer yet, with 1 of 3 seeds; +100.0 [" in page(CLAIMS, tmp_path, SEEDS)


def test_the_page_is_written_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--write-only", "--page", "page.md"])
    assert (tmp_path / "page.md").read_text().count("Not measured yet.") == len(CLAIMS)


def test_one_task_can_be_measured_without_the_runs_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs/systems"
    for seed in (41, 42, 43):
        write_run(runs / f"hard/grpo/seed-{seed}", 1)
        write_run(runs / f"hard/cso/seed-{seed}", 3)
    before = page(CLAIMS, runs, SEEDS).replace("## labels", "## labels\n\nmeasured elsewhere")
    Path("page.md").write_text(before)
    write_run(runs / "hard/int/seed-41", 3)
    main(["--write-only", "--task", "hard", "--page", "page.md"])
    now = Path("page.md").read_text()
    assert "| InT | 75.0 |" in now.split("## hard")[1]
    assert now.split("## hard")[0] == before.split("## hard")[0]
    assert now.split("## pick")[1] == before.split("## pick")[1]
