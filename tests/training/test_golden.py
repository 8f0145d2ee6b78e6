"""Metric curves as text: a change in numerics shows up as a diff.

The rollouts are fixed (see Scripted), so that no machine's arithmetic can change a sampled token. To accept a
change, ``python -m tests.training.test_golden`` writes the files again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest

from handrail import Context, Group, Problem, train
from handrail.experts.steps import split_steps
from handrail.methods.base import Method
from handrail.methods.grpo import Grpo
from handrail.methods.luffy import Luffy
from handrail.methods.scope import Scope, ScopeSettings
from tests.conftest import EASY, HARD, config
from tests.training.test_loop import Scripted, script, written

GOLDEN = Path(__file__).parent / "golden"


class ScriptedGrpo(Grpo):
    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        return await super().reward(await written(group, script(group.problem), ctx), ctx)


class ScriptedLuffy(Luffy):
    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        return await super().reward(await written(group, script(group.problem), ctx), ctx)


class ScopeAtOnce(ScopeSettings):
    """A corrector whose repairs need no sampling."""

    judge: str = "reference"
    mode: Literal["step", "suffix", "reference"] = "suffix"
    min_correct_prefix: float = 0.0


class ScriptedScope(Scope):
    Settings = ScopeAtOnce

    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        begun = split_steps(group.problem.references[0])[0]
        texts = [*script(group.problem), f"{begun} 7 * 2 = 14 # 14"]
        return await super().reward(await written(group, texts, ctx), ctx)


METHODS: dict[str, type[Method[Any]]] = {
    "grpo": ScriptedGrpo,
    "luffy": ScriptedLuffy,
    "sort": Scripted,
    "scope": ScriptedScope,
}


def curve(method: type[Method[Any]], output: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """Return ten steps on hard and easy problems; figures have six digits."""
    sources = [{"path": f"{HARD}&n=64"}, {"path": f"{EASY}&n=64"}]
    schedule = {
        "steps": 10,
        "problems_per_step": 4,
        "updates_per_step": 2,
        "learning_rate": 3e-4,
        "schedule": "linear",
        "samples_every": 0,
    }
    with patch("handrail.training.update.AUTHORS_EVERY", 1):  # every norm in every step
        settings = config(model={"device": device}, data={"train": sources}, train=schedule)
        train(settings, output, method=method)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


@pytest.mark.parametrize("name", METHODS)
def test_the_metric_curve_equals_the_committed_one(name: str, tmp_path: Path) -> None:
    expected = [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text().splitlines()]
    found = curve(METHODS[name], tmp_path / "run")
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, golden in zip(found, expected, strict=True):
        for key, value in golden.items():
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-6), (row["step"], key)
            else:
                assert row[key] == value, (row["step"], key)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, method in METHODS.items():
        with tempfile.TemporaryDirectory() as directory:
            rows = curve(method, Path(directory) / "run")
        (GOLDEN / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
