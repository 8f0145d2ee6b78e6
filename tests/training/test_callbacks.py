"""The user's own callbacks, and trackers, in the real loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trackio
from trackio.sqlite_storage import SQLiteStorage

from handrail import Callback, Group, UserError, train
from handrail.training.resources import Clock
from handrail.training.run import Run
from tests.conftest import EASY, config


class Notes(Callback):
    """Records every hook, adds a figure to the metrics, and stops the run after its second step."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_start(self, run: Run, step: int) -> None:
        self.calls.append(f"start {step}")

    def before_step(self, run: Run, step: int) -> None:
        self.calls.append(f"before {step} {run.optimizer.param_groups[0]['lr']:g}")

    def before_update(self, run: Run, step: int, groups: list[Group]) -> None:  # type: ignore[override]
        self.calls.append(f"update {step} {len(groups)}")

    def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Clock) -> None:
        metrics["mine/groups"] = metrics["groups/all"] + 1
        if step == 2:
            run.stop("enough")

    def after_log(self, run: Run, step: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        self.calls.append(f"logged {step}")

    def on_end(self, run: Run, summary: Any) -> None:
        self.calls.append(f"end {summary['steps']} {(run.directory / 'model').exists()}")


def test_a_users_callback_sees_every_step_adds_metrics_and_stops_the_run(tmp_path: Path) -> None:
    notes = Notes()
    settings = config(
        method={"name": "sft"},
        train={"steps": 9, "updates_per_step": 2, "learning_rate": 1e-4, "checkpoint_every": 5},
        eval={"sets": {"easy": f"{EASY}&split=test&n=2"}},
    )
    summary = train(settings, tmp_path / "run", callbacks=[notes])
    assert notes.calls == [
        "start 0", "logged 0", "before 1 0.0001", "update 1 2", "update 1 2", "logged 1", "before 2 0.0001",
        "update 2 2",
        "update 2 2", "logged 2", "end 2 True",
    ]  # fmt: skip
    assert (summary["ended_by"], summary["steps"]) == ("enough", 2)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row.get("mine/groups") for row in rows] == [None, 5, 5]
    assert "eval/easy/mean" in rows[-1] and "eval/easy/mean" not in rows[1]  # stopped with a last evaluation
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()  # and a checkpoint


class StopsAt(Callback):
    """Stops the run from one hook, in the second step if it knows its step, and notes those taken."""

    def __init__(self, hook: str) -> None:
        self.steps: list[int] = []
        own = getattr(self, hook)

        def stop(run: Run, step: Any, *more: Any) -> None:
            own(run, step, *more)
            if hook in ("on_start", "on_end") or step == 2:
                run.stop(f"from {hook}")

        setattr(self, hook, stop)

    def before_update(self, run: Run, step: int, groups: Sequence[Group]) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(
    ("hook", "last"),
    [
        ("on_start", 1),
        ("before_step", 2),
        ("before_update", 2),
        ("after_step", 2),
        ("after_log", 3),
        ("on_end", 4),
    ],
)
def test_a_run_can_be_stopped_from_every_hook(hook: str, last: int, tmp_path: Path) -> None:
    """After the step, or the next if it is too late for this one; always evaluated and checkpointed."""
    stops = StopsAt(hook)
    settings = config(
        method={"name": "sft"}, train={"steps": 4, "checkpoint_every": 9},
        eval={"sets": {"easy": f"{EASY}&split=test&n=2"}},
    )  # fmt: skip
    summary = train(settings, tmp_path / "run", callbacks=[stops])
    assert stops.steps == list(range(1, last + 1)) and summary["steps"] == last
    assert summary["ended_by"] == ("steps" if hook == "on_end" else f"from {hook}")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{last:06}"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "eval/easy/mean" in rows[-1]


def test_trackers_get_every_finite_number(tmp_path: Path) -> None:
    """Tested with trackio, which keeps its runs in a database on this machine."""
    settings = config(
        method={"name": "sft"}, train={"steps": 2, "trackers": ["trackio"], "tracker_project": "mine"}
    )
    train(settings, tmp_path / "run")
    (run,) = trackio.Api().runs("mine")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row for row in SQLiteStorage.get_logs("mine", run.name) if "groups/all" in row}
    assert list(logged) == [1, 2]
    for step, row in logged.items():
        assert row["loss"] == pytest.approx(rows[step]["loss"]) and row["seconds/update"] > 0


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.trackers: clearml is not installed; pip install clearml"):
        train(config(train={"trackers": ["clearml"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
