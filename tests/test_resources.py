"""What a run says of time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handrail import UserError, train
from handrail.resources import Clock, Forecast, spoken
from tests.conftest import Handrail, config
from tests.models import save_chat_model
from tests.test_cli import configured

SECONDS = {"sample": 2.0, "verify": 0.5, "update": 1.5}


def test_the_forecast_counts_steps_and_evaluations_or_the_budget() -> None:
    tokens = {"tokens/sampled": 100}
    forecast = Forecast(config(eval={"every": 10, "sets": {"easy": "x"}}))
    assert forecast(0, 31, {}, {"evaluate": 30.0}) is None
    said = forecast(1, 31, tokens, SECONDS)
    assert (
        said
        and said.startswith("first step: 4.0 s (sample 2.0, update 1.5), at most ")
        and said.endswith("about 4 min for the 30 steps left")
    )
    assert forecast(2, 31, tokens, SECONDS) is None  # 30·4 + (3 + 1)·30 = 240 s
    said = Forecast(config(train={"token_budget": 1000}))(1, 500, tokens, SECONDS)
    assert said and said.endswith("about 40 s for the 10 steps left")
    said = Forecast(config(train={"seconds_budget": 60.0}))(1, 500, tokens, SECONDS)
    assert said and "about 60 s" in said


def test_durations_are_spoken() -> None:
    assert [spoken(seconds) for seconds in (59.6, 200, 5 * 3600 + 120)] == ["60 s", "3 min", "5 h 2 min"]


@pytest.mark.parametrize(("part", "named"), [("sample", "rollout.batch_size"), ("update", "gradient_checkpointing"), ("guide", "scored")])
def test_out_of_memory_names_what_to_lower(part: str, named: str) -> None:
    with pytest.raises(UserError, match=f"out of memory .*{named}"), Clock()(part):
        torch.empty(10**16)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), Clock()("update"):
        torch.ones(2) + torch.ones(3)


def test_a_run_that_needs_too_much_memory_says_so(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", context=10**13)
    with pytest.raises(UserError, match="out of memory while sampling; lower rollout.batch_size"):
        train(config(model={"path": str(model)}, rollout={"max_tokens": 10**12}), tmp_path / "run")


def test_training_says_how_long_it_will_take(tmp_path: Path, handrail: Handrail) -> None:
    done = handrail("train", str(configured(tmp_path, train={"steps": 2})), "--output", str(tmp_path / "run"))
    assert done.code == 0 and "first step: " in done.out and "for the 1 steps left" in done.out
