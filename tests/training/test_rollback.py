"""AutoNPO: the plateau, the choice of the checkpoint, and the rollback through the training loop."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from handrail import Callback, UserError, train
from handrail.data.answers import read_answers
from handrail.methods import build
from handrail.methods.autonpo import AutoNpo
from handrail.models.config import RolloutConfig
from handrail.training.config import Config
from handrail.training.metrics import training_seconds
from handrail.training.rollback import Rollback, spread
from handrail.training.run import Run
from handrail.training.run_directory import keep_until
from tests.conftest import EASY, config
from tests.training.test_loop import lines


def method(**settings: Any) -> AutoNpo:
    made = build({"name": "autonpo", **settings}, RolloutConfig())
    assert isinstance(made, AutoNpo)
    return made


def test_the_largest_gain_per_distance_wins() -> None:
    # Q/V = 0.10/e^.02 = 0.0980, 0.18/e^.05 = 0.1712, 0.24/e^.40 = 0.1609
    assert AutoNpo.best({10: 0.10, 20: 0.18, 40: 0.24}, {10: 0.02, 20: 0.05, 40: 0.40}) == 20
    assert AutoNpo.best({10: 0.2, 20: 0.2}, {10: 0.0, 20: 0.0}) == 10
    assert AutoNpo.best({10: 0.0}, {10: 0.0}) is None and AutoNpo.best({}, {}) is None


def test_a_plateau_is_a_reward_that_stands_still_while_the_entropy_falls() -> None:
    made = method(smoothing=0.5, patience=2, min_gain=0.1)
    # Averages of the rewards: 0, 0.4, 0.6, 0.7. Gained in two steps: 0.6, then 0.3.
    rewards, falling = [0.0, 0.8, 0.8, 0.8], [0.4, 0.3, 0.2, 0.1]
    assert made.averages(rewards) == pytest.approx([0, 0.4, 0.6, 0.7])

    def steps(rewards: list[float], entropies: list[float]) -> list[dict[str, float]]:
        return [{"reward": a, "entropy": b} for a, b in zip(rewards, entropies, strict=True)]

    assert not made.on_plateau(steps(rewards, falling))
    assert made.on_plateau(steps([0.8] * 4, falling))
    assert not made.on_plateau(steps([0.8] * 4, falling[::-1]))  # entropy rises
    assert not made.on_plateau(steps([0.8] * 2, falling[:2]))  # too short to tell


def stuck(**changes: Any) -> Config:
    """A run that reaches its plateau as soon as the entropy falls."""
    settings = {"name": "autonpo", "patience": 3, "min_gain": 1.0, "smoothing": 0.5, "farthest": 6}
    settings |= {"probe_problems": 8, "probe_rollouts": 4} | changes
    steps = {"steps": 14, "checkpoint_every": 1, "keep_last": 8, "learning_rate": 1e-3}
    return config(
        method=settings,
        data={"train": f"{EASY}&n=24"},
        model={"path": "builtin:suite-weak"},
        train={**steps, "problems_per_step": 4},
        rollout={"group_size": 4, "max_tokens": 40},
    )


class Killed(Exception):
    pass


class Kill(Callback):
    """Stop without a checkpoint before ``step``, once the run has gone back ``after`` times."""

    def __init__(self, step: int, after: int) -> None:
        self.step, self.after, self.starts = step, after, 0

    def on_start(self, run: Run, step: int) -> None:
        self.starts += 1

    def before_step(self, run: Run, step: int) -> None:
        if step == self.step and self.starts > self.after:
            raise Killed


def test_a_run_on_a_plateau_goes_back_and_replays_what_it_found(tmp_path: Path) -> None:
    train(stuck(), tmp_path / "run")
    run = tmp_path / "run"
    (row,) = lines(run / "rollbacks.jsonl")
    plateau, back = row["from"], row["to"]
    assert back < plateau < 14 and row["step"] == back
    ratio = {delta: row["solved"][delta] / 2.718281828 ** row["divergence"][delta] for delta in row["solved"]}
    assert max(ratio, key=lambda delta: ratio[delta]) == str(plateau - back)
    steps, branch = lines(run / "metrics.jsonl"), lines(run / "branches/1/metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(15))
    assert branch[: back + 1] == steps[: back + 1] and branch[-1]["step"] == plateau
    replayed = [step["step"] for step in steps if step.get("autonpo/replayed")]
    assert replayed and back < min(replayed) and max(replayed) <= plateau
    answers = read_answers(str(run / row["answers"]), "answers")
    assert any(answers.values())
    # What was given up, and the probe: at most 8 problems × 4 completions of 40 tokens.
    given_up = sum(step["tokens/sampled"] for step in branch[back + 1 :])
    assert row["tokens"] == steps[back + 1]["tokens/resampled"] and 0 < row["tokens"] - given_up <= 1280
    timings = lines(run / "timings.jsonl")
    took = sum(training_seconds(each) for each in lines(run / "branches/1/timings.jsonl")[back + 1 :])
    assert timings[back + 1]["given_up"] == pytest.approx(took) and took > 0
    assert not any("given_up" in each for each in timings[: back + 1] + timings[back + 2 :])


def test_groups_that_no_update_keeps_are_mistakes_too(tmp_path: Path) -> None:
    train(stuck(skip_dead_groups=True), tmp_path / "run")
    (row,) = lines(tmp_path / "run/rollbacks.jsonl")
    assert row["to"] is not None


def test_a_run_may_go_back_to_before_a_step_that_it_went_back_to(tmp_path: Path) -> None:
    """The first decision is still known then, so neither its answers nor its number are used again."""
    file = tmp_path / "rollbacks.jsonl"
    rows = [{"from": 60, "to": 20, "step": 20}, {"from": 70, "to": None, "step": 70}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep_until(file, 10)
    assert lines(file) == rows[:1]
    keep_until(file, None)
    assert not lines(file)


@pytest.mark.parametrize(("step", "after"), [(7, 0), (12, 1)])
def test_a_killed_run_goes_back_just_the_same(step: int, after: int, tmp_path: Path) -> None:
    train(stuck(), tmp_path / "whole")
    with pytest.raises(Killed):
        train(stuck(), tmp_path / "parts", callbacks=[Kill(step, after)])
    train(stuck(), tmp_path / "parts", resume=True)
    for file in ("metrics.jsonl", "rollbacks.jsonl", "mistakes.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_run_killed_while_it_decides_decides_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"checkpoint_every": 2, "keep_last": 8}
    settings = stuck().model_copy(update={"train": stuck().train.model_copy(update=every)})
    train(settings, tmp_path / "whole")
    divergence = Rollback.divergence

    def killed(*arguments: Any) -> dict[int, float]:
        monkeypatch.setattr(Rollback, "divergence", staticmethod(divergence))
        raise Killed

    monkeypatch.setattr(Rollback, "divergence", staticmethod(killed))
    with pytest.raises(Killed):
        train(settings, tmp_path / "parts")
    train(settings, tmp_path / "parts", resume=True)
    for file in ("metrics.jsonl", "rollbacks.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_mistakes_of_all_steps_are_probed() -> None:
    """Otherwise Q would be the share of the same problems for every Δ."""
    failed = {step: [f"{step}-{place}" for place in range(12)] for step in range(1, 81)}
    chosen = spread(failed, Random(0))
    assert sorted(int(name.partition("-")[0]) for name in chosen[:64]) == list(range(17, 81))
    assert len({name.partition("-")[2] for name in chosen[:64]}) > 6  # any of a step's mistakes
    assert spread({1: ["b", "a"], 2: ["b"]}, Random(0)) == ["b", "a"]
    assert spread({1: ["b", "a"]}, Random(3)) == spread({1: ["a", "b"]}, Random(3))


def test_a_run_stays_if_nothing_was_solved(tmp_path: Path) -> None:
    train(stuck(farthest=1), tmp_path / "run")
    rows = lines(tmp_path / "run/rollbacks.jsonl")
    assert rows and len(rows) <= 3 and not any(row["to"] for row in rows)
    assert not (tmp_path / "run/branches").exists()
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 14


def test_a_sampler_that_tells_no_entropy_is_refused() -> None:
    settings = config(sampler={"name": "vllm"}, train={"checkpoint_every": 1, "keep_last": 2})
    with pytest.raises(UserError, match='which vLLM does not tell; set sampler.name = "transformers"'):
        Rollback(method(), settings)


@pytest.mark.parametrize("kept", [{"checkpoint_every": 0}, {"checkpoint_every": 1, "keep_last": 1}])
def test_a_run_that_keeps_no_checkpoints_is_refused(kept: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of which the run keeps too few; set train.checkpoint_every"):
        train(config(method={"name": "autonpo"}, train=kept), tmp_path / "run")
    assert not (tmp_path / "run").exists()
