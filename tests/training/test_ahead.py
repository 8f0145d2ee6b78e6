"""A sampler of one's own, and one that works ahead of the update."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from handrail import Callback, Config, Group, UserError, train
from handrail.models.generate import Completion, Sampler, generate
from handrail.models.trainable import TrainablePolicy
from handrail.training.run import Run
from tests.conftest import config
from tests.training.test_loop import lines

NAME = "model.embed_tokens.weight"


class Apart(Sampler):
    """Samples from a copy of the weights, in whichever thread asks."""

    makes_batches = True

    def __init__(self, policy: TrainablePolicy, staleness: int) -> None:
        self.differs = staleness > 0
        self.sent: Event = Event()
        self.model = copy.deepcopy(policy.bare_model)
        self.policy = policy
        self.used: list[Tensor] = []
        """A weight of the copy that each request was sampled with."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_state_dict(dict(weights), strict=False)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        model = copy.deepcopy(self.model).eval()
        self.used.append(model.state_dict()[NAME].clone())
        self.sent.set()
        ends, temperature = self.policy.renderer.ends, self.policy.rollout.temperature
        return generate(model, prompts, seeds, max_tokens, temperature, ends, poll)


def settings(staleness: int) -> Config:
    return config(
        method={"name": "luffy"},
        rollout={"max_tokens": 24, "temperature": 1.5},
        sampler={"staleness": staleness},
        train={"steps": 5, "checkpoint_every": 1, "keep_last": 9, "samples_every": 1},
    )


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_step_is_sampled_with_weights_as_old_as_allowed(staleness: int, tmp_path: Path) -> None:
    samplers: list[Apart] = []

    def apart(policy: TrainablePolicy) -> Sampler:
        samplers.append(Apart(policy, staleness))
        return samplers[0]

    class Versions(Callback):
        def after_reward(self, run: Run, step: int, groups: Sequence[Group]) -> None:
            found = {member.version for group in groups for member in group.rollouts}
            assert found == {max(0, step - 1 - staleness)}

    train(settings(staleness), tmp_path / "run", sampler=apart, callbacks=[Versions()])
    saved: dict[int, Any] = {
        step: load_file(tmp_path / f"run/checkpoints/step-{step:06d}/model/model.safetensors")[NAME]
        for step in range(1, 6)
    }
    sampled = [step for step, of in enumerate(lines(tmp_path / "run/metrics.jsonl")) if step and of]
    assert sampled == [1, 2, 3, 4, 5] and len(samplers[0].used) == 5
    for step, used in zip(sampled, samplers[0].used, strict=True):
        version = max(0, step - 1 - staleness)
        assert any(torch.equal(used, value) for value in saved.values()) == (version > 0)
        if version:
            assert torch.equal(used, saved[version])


def test_without_staleness_ones_own_sampler_changes_nothing(tmp_path: Path) -> None:
    train(settings(0), tmp_path / "plain")
    train(settings(0), tmp_path / "apart", sampler=lambda policy: Apart(policy, 0))
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()


def test_old_weights_are_corrected_for(tmp_path: Path) -> None:
    """The difference is measured, weighted in the update, and no reason to end the run."""
    train(settings(2), tmp_path / "run", sampler=lambda policy: Apart(policy, 2))
    rows = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert rows[0]["sampler/mismatch"] < 1e-5 < rows[2]["sampler/mismatch"]
    assert rows[0]["importance/mean"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["importance/max"] < 1.001 < rows[4]["importance/max"]
    assert all(0 <= row["importance/capped"] < 0.5 for row in rows)


def test_no_thread_samples_after_the_end_of_a_run(tmp_path: Path) -> None:
    class Endless(Apart):
        def generate(self, *request: Any) -> list[Completion]:
            if len(self.used) < 2:
                return super().generate(*request)
            self.sent.set()
            while True:
                request[-1]()
                time.sleep(0.01)

    class Fail(Callback):
        def after_step(self, run: Run, step: int, metrics: dict[str, Any], clock: Any) -> None:
            raise UserError("it fails")

    before = set(threading.enumerate())
    with pytest.raises(UserError, match="it fails"):
        train(settings(2), tmp_path, sampler=lambda policy: Endless(policy, 2), callbacks=[Fail()])
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_sampler_that_makes_no_batches_cannot_work_ahead(tmp_path: Path) -> None:
    def in_batches(policy: TrainablePolicy) -> Sampler:
        made = Apart(policy, 1)
        made.makes_batches = False
        return made

    with pytest.raises(
        UserError, match="sampler.staleness is 1, but a sampler that works ahead must take all"
    ):
        train(settings(1), tmp_path / "run", sampler=in_batches)


def test_sampling_ahead_needs_a_sampler_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampler.staleness is 1, but the process that trains also samples"):
        train(settings(1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
