"""Reports on time and memory of a run."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import get_scheduler

from handrail import UserError, train
from handrail.cli import main
from handrail.training import resources
from handrail.training.resources import Clock, Forecast, format_duration
from handrail.training.stopping import StopCriteria
from tests.cli.test_commands import configured
from tests.conftest import Handrail, config
from tests.tiny_models import save_chat_model

SECONDS = {"sample": 2.0, "verify": 0.5, "update": 1.5}


def test_the_forecast_counts_steps_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "peak_memory", lambda: 3 * 2**30)
    forecast = Forecast(config(eval={"every": 10, "sets": {"easy": "x"}}))
    assert forecast(0, 31, {}, {"evaluate": 30.0}) is None
    said = forecast(1, 31, {}, SECONDS)
    assert (
        said and said == "first step: 4.0 s (sample 2.0, update 1.5); about 4 min for the 30 steps left"
    )  # 30·4 + (3 + 1)·30 = 240 s
    assert (
        forecast(2, 31, {}, {"sample": 1.0, "update": 0.5})
        == "second step: 1.5 s (sample 1.0, update 0.5), at most 3.0 GiB; about 2 min for the 29 steps left"
    )  # 29·1.5 + (2 + 1)·30 = 133.5 s
    assert forecast(3, 31, {}, SECONDS) is None
    resumed = Forecast(config(eval={"every": 10, "sets": {"easy": "x"}}))(1, 31, {}, SECONDS)
    assert resumed and resumed.endswith("about 2 min for the 30 steps left, without evaluation")
    assert Forecast(config())(31, 31, {}, SECONDS) is None  # no steps are left
    last = Forecast(config())(30, 31, {}, SECONDS)
    assert last and last.endswith("about 4 s for the step left")
    bare = Forecast(config())(1, 31, {}, SECONDS)
    assert bare and bare.endswith("about 2 min for the 30 steps left")


def test_a_compiled_model_is_forecast_once_it_is_compiled() -> None:
    forecast = Forecast(config(model={"compile": True}))
    assert forecast(1, 31, {}, {"sample": 2.0, "update": 40.0}) is None
    said = forecast(2, 31, {}, SECONDS)
    assert said and said.startswith("second step: 4.0 s") and said.endswith("2 min for the 29 steps left")


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_equal_those_of_transformers_schedules(schedule: str, warmup: int) -> None:
    settings = config(
        train={"steps": 10, "learning_rate": 0.5, "schedule": schedule, "warmup_steps": warmup}
    ).train
    theirs = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = get_scheduler(
        {"constant": "constant_with_warmup"}.get(schedule, schedule), theirs, warmup, 10
    )
    budget = StopCriteria(settings, [], [])
    for step in range(1, 11):
        assert budget.learning_rate(step) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        scheduler.step()


def test_a_learning_rate_falls_with_tokens_or_steps_whichever_is_further() -> None:
    settings = config(
        train={"steps": 10, "token_budget": 1000, "learning_rate": 0.8, "schedule": "linear"}
    ).train
    budget = StopCriteria(settings, [], [])
    assert budget.learning_rate(1) == 0.8
    budget.spend({"tokens/sampled": 250}, SECONDS)
    assert budget.learning_rate(2) == pytest.approx(0.6)  # a quarter of the tokens, a tenth of the steps
    assert budget.learning_rate(8) == pytest.approx(0.24)  # seven tenths of the steps
    budget.spend({"tokens/sampled": 750}, SECONDS)
    assert budget.learning_rate(3) == 0.0


def test_the_expected_last_step_under_a_budget_uses_all_steps_so_far() -> None:
    before = [{"tokens/sampled": tokens} for tokens in (100, 300)]
    budget = StopCriteria(config(train={"steps": 50, "token_budget": 2000}).train, before, [SECONDS] * 2)
    assert budget.last_step(2) == 10  # 200 tokens a step
    budget.spend({"tokens/sampled": 1600}, SECONDS)
    assert budget.last_step(3) == 3 and budget.spent == "tokens"
    assert (
        StopCriteria(
            config(train={"steps": 50, "seconds_budget": 60.0}).train, before, [SECONDS] * 2
        ).last_step(2)
        == 15
    )
    assert (
        StopCriteria(config(train={"steps": 5, "token_budget": 2000}).train, before, [SECONDS] * 2).last_step(
            2
        )
        == 5
    )
    assert (
        StopCriteria(config(train={"steps": 50, "token_budget": 2000}).train, [], []).last_step(1) == 50
    )  # nothing sampled yet


def test_durations_are_formatted() -> None:
    assert [format_duration(seconds) for seconds in (59.6, 200, 5 * 3600 + 120)] == [
        "60 s",
        "3 min",
        "5 h 2 min",
    ]


@pytest.mark.parametrize(
    ("part", "named"),
    [("sample", "rollout.batch_size"), ("update", "gradient_checkpointing"), ("guide", "scored")],
)
def test_out_of_memory_names_what_to_lower(part: str, named: str) -> None:
    with pytest.raises(UserError, match=f"out of memory .*{named}"), Clock()(part):
        torch.empty(10**16)


def test_a_block_that_ran_out_of_memory_holds_none_while_the_run_is_saved() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def update() -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(UserError) as found, Clock()("update"):
        update()
    assert held[0]() is None and found.value.__cause__


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
    ],
)
def test_a_model_that_does_not_fit_in_memory_is_reported_in_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Accelerator, model: object) -> object:
        raise error

    monkeypatch.setattr(Accelerator, "prepare", full)
    with pytest.raises(UserError, match="out of memory while loading the model"):
        train(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_anywhere_in_a_command_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as ended:
        main(full)  # type: ignore[arg-type]
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory while running this command; lower train.micro_batch_tokens")


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), Clock()("update"):
        torch.ones(2) + torch.ones(3)


def test_a_run_that_needs_too_much_memory_is_reported(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", context=10**13)
    with pytest.raises(UserError, match="out of memory while sampling; lower rollout.batch_size"):
        train(config(model={"path": str(model)}, rollout={"max_tokens": 10**12}), tmp_path / "run")


def test_training_reports_a_forecast(tmp_path: Path, handrail: Handrail) -> None:
    done = handrail("train", str(configured(tmp_path, train={"steps": 2})), "--output", str(tmp_path / "run"))
    assert done.code == 0 and "first step: " in done.out and "for the step left" in done.out
