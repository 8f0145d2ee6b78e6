"""Warnings when a run seems to collapse, and the handling of numbers that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handrail import train
from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.methods.batch import TokenBatch
from handrail.methods.context import Context
from handrail.methods.luffy import Luffy
from handrail.training.monitor import CollapseMonitor
from handrail.types.trajectory import Group
from tests.conftest import HARD, config

HEALTHY = {"reward": 0.3, "correct": 0.3, "entropy": 1.0, "length": 40.0, "truncated": 0.1, "rollouts": 64}


def said(*parts: tuple[int, dict[str, Any]]) -> list[str]:
    """Return the warnings for a number of steps of each kind; later steps differ from healthy ones as
    given."""
    watch = CollapseMonitor()
    return [text for n, changes in parts for _ in range(n) if (text := watch(HEALTHY | changes))]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entropy": 0.05}, "entropy has fallen from 1 to"),
        ({"length": 5.0}, "completions have shrunk from 40 to"),
        ({"truncated": 0.9}, "of the completions are cut off"),
        ({"reward": 0.1, "correct": 0.1}, "the reward has fallen from 0.30 to"),
        (
            {"correct": 0.1},
            "the share of correct rollouts has fallen from 0.30 to",
        ),  # while the other rollouts are paid for their form
        ({"entropy": 0.05, "reward": 0.9}, "without a gain in accuracy"),
        ({"verifier/unverified": 32}, "of the completions are unverified"),
    ],
)
def test_each_collapse_is_reported_once(changes: dict[str, Any], words: str) -> None:
    (text,) = said((15, {}), (40, changes))
    assert words in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"entropy": 0.05, "reward": 0.9, "correct": 0.9},  # it has learned the answer
        {"length": 5.0, "reward": 0.9, "correct": 0.9},
        {"entropy": 0.2, "length": 15.0, "truncated": 0.4, "reward": 0.2, "verifier/unverified": 6},
        {
            "reward": None,
            "correct": None,
            "entropy": None,
            "length": None,
            "truncated": None,
            "rollouts": 0,
        },  # nothing is sampled
    ],
)
def test_a_healthy_run_has_no_warning(changes: dict[str, Any]) -> None:
    assert said((15, {}), (40, changes)) == []


def test_a_resumed_run_does_not_repeat_warnings() -> None:
    before = [HEALTHY] * 15 + [HEALTHY | {"entropy": 0.0}] * 12
    assert CollapseMonitor(before)(HEALTHY | {"entropy": 0.0}) is None
    assert (
        CollapseMonitor(before[:-5])(HEALTHY | {"entropy": 0.0}) is None
    )  # the mean of the last ten is not low yet
    watch = CollapseMonitor(before[:24])
    assert watch(HEALTHY | {"entropy": 0.0}) is not None


def test_an_expert_that_never_answers_is_named_once() -> None:
    assert said((1, {"judge/asked": 7, "judge/no_answer": 7})) == []
    assert said((4, {"judge/asked": 4, "judge/no_answer": 4})) == [
        "the judge has answered none of 8 questions, so this run learns nothing from it"
    ]
    assert said((4, {"planner/asked": 4, "planner/no_answer": 3})) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (0, None),
        (1, None),
        (8, "the verifier refuses 8 of the first 32 references"),
        (32, "so nothing can be learned from them"),
    ],
)
def test_a_verifier_that_refuses_references_is_named_before_training(
    wrong: int, words: str | None, tmp_path: Path
) -> None:
    problems = load_problems(f"{HARD}&n=32")
    rows = [
        {
            "prompt": problem.prompt,
            "answer": "1 2" if place < wrong else problem.answer,
            "reference": problem.references[0],
        }
        for place, problem in enumerate(problems)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config(data={"train": str(tmp_path / "data.jsonl")}, train={"steps": 1}), tmp_path / "run")
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert words in first["warning"] if words else "warning" not in first


@pytest.mark.parametrize("name, extract", [("task", None), ("normalized", None), ("exact", "#(.*)")])
def test_a_verifier_that_refuses_the_answers_themselves_is_named_before_training(
    name: str, extract: str | None, tmp_path: Path
) -> None:
    rows = [{"prompt": "1 + 1 =", "answer": answer} for answer in ("2", "3", "5 #### 4", "5")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data": {"train": str(tmp_path / "data.jsonl")},
        "train": {"steps": 1},
        "method": {"name": "grpo"},
    }
    train(config(**settings, verifier={"name": name, "extract": extract}), tmp_path / "run")
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    said = (
        "the verifier refuses 1 of the first 4 answers as the answer to their own problem, first "
        f"{tmp_path / 'data.jsonl'}, line 3"
    )
    assert said in first["warning"] if extract is None else "warning" not in first


class Broken(Luffy):
    """A method that divides by zero in the given updates."""

    name = "broken"
    step = 0
    bad: frozenset[int] = frozenset()

    async def credit(self, group: Group, ctx: Context) -> Group | None:
        Broken.step = ctx.step
        return await super().credit(group, ctx)

    def surrogate(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        objective = super().surrogate(logp, batch)
        return objective / 0 if Broken.step in Broken.bad else objective


def run(directory: Path, bad: set[int], **changes: Any) -> list[dict[str, Any]]:
    Broken.bad = frozenset(bad)
    settings = {"steps": 6, "checkpoint_every": 1, "samples_every": 0, **changes}
    train(config(train=settings), directory, method=Broken)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_an_update_that_is_not_finite_is_skipped_and_its_batch_kept(tmp_path: Path) -> None:
    rows = run(tmp_path, {2, 3})
    assert [row.get("update/skipped") for row in rows[1:]] == [None, 1.0, 1.0, None, None, None]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    kept = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [2] * 16 + [3] * 16  # 4 groups of 4
    columns = ("advantage", "sampling_logp", "logp", "author")
    assert all(
        len(row["completion"]) == len(row[column]) for row in kept for column in columns if column in row
    )
    assert all(columns[0] in row and columns[2] in row for row in kept) and any(
        any(row["advantage"]) for row in kept
    )


def test_too_many_skipped_updates_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, set(range(2, 99)), max_skipped_updates=3)
    newest = tmp_path / "checkpoints/step-000003/model"
    assert (
        "no finite gradient in 3 updates in a row, the last in step 4; their batches are in "
        f"{tmp_path / 'skipped.jsonl'}" in str(caught.value)
    )
    assert str(caught.value).endswith(
        f'lower train.learning_rate in a new run with model.path = "{newest}", to keep what was learned'
    )
    assert newest.is_dir()


@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_are_not_finite_are_not_kept(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: torch.optim.AdamW, closure: None = None) -> None:
        self.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(UserError, match="a weight is not finite after step 1, so the step is not kept"):
        train(
            config(method={"name": "sft"}, train={"steps": 1, "checkpoint_every": every, "samples_every": 0}),
            tmp_path,
        )
    assert not (tmp_path / "model").exists()
    assert not list((tmp_path / "checkpoints").glob("step-*"))
