"""The same groups give the same gradient here and in TRL's GRPOTrainer, if the objective is the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks import step_time
from handrail import Group
from handrail.methods import build
from handrail.methods.batch import pack
from handrail.models.batching import Inputs
from handrail.models.config import RolloutConfig
from handrail.models.loading import load_model
from handrail.training.policies import load_trainable_policy
from handrail.training.update import Update
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Trajectory
from tests.conftest import config

LENGTH = 16


def test_the_benchmark_measures_both(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "measured_apart", lambda who, arguments: 2.0**20)  # two more processes
    step_time.main(
        ["--rounds", "1", "--problems", "2", "--group-size", "2", "--tokens", "4", "--dead", "0.5"]
    )
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"grpo", "luffy", "sort", "TRL"} <= rows.keys()
    assert all(
        rows[name][7] == "16" for name in ("grpo", "luffy", "sort", "TRL")
    )  # tokens sampled: 2 · 2 · 4


def gradient(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def trl_gradient(groups: list[Group], loss_type: str, directory: Path) -> dict[str, torch.Tensor]:
    members = [member for group in groups for member in group.trajectories]
    model, tokenizer = load_model(config().model)
    arguments = GRPOConfig(
        output_dir=str(directory), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        loss_type=loss_type,
        per_device_train_batch_size=len(members), num_generations=len(groups[0].trajectories),
        max_completion_length=LENGTH,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "1 + 1 ?"}] * len(members))
    trainer = GRPOTrainer(
        model, reward_funcs=lambda **_: [0.0], args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    inputs = Inputs.of([member.prompt_ids for member in members], [member.token_ids for member in members])
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": inputs.prompt[inputs.prompt_of],
        "prompt_mask": inputs.prompt_mask[inputs.prompt_of],
        "completion_ids": inputs.completion,
        "completion_mask": inputs.completion_mask,
        "advantages": torch.stack([member.column("advantage")[0] for member in members]),
        "old_per_token_logps": None,
        "num_items_in_batch": inputs.completion_mask.sum(),
    })  # fmt: skip
    loss.backward()
    return gradient(trainer.model)


@pytest.mark.parametrize(
    ("loss_type", "loss_normalizer"), [("grpo", "sequence"), ("dr_grpo", "constant"), ("dapo", "token")]
)
@pytest.mark.parametrize("budget", [8192, 60])
def test_the_gradient_equals_trls(loss_type: str, loss_normalizer: str, budget: int, tmp_path: Path) -> None:
    changes = {"rollout": {"max_tokens": LENGTH}, "train": {"micro_batch_tokens": budget}}
    method = build(
        {"name": "grpo", "loss_normalizer": loss_normalizer}, RolloutConfig(max_tokens=LENGTH), None
    )
    policy = load_trainable_policy(config(**changes), Accelerator(cpu=True))
    prompts = [policy.tokenizer.encode(text) for text in ("77 A 8 C 9 B 4 ?", "5 + 3 ?", "9 * 2 ?")]
    chance = random.Random(0)
    groups = []
    for place, prompt in enumerate(prompts):
        rows = [[chance.randrange(5, 100) for _ in range(chance.randint(1, LENGTH))] for _ in range(4)]
        members = [
            replace(Trajectory.by(Author.POLICY, prompt, row), reward=float(at > place))
            for at, row in enumerate(rows)
        ]
        groups.append(method.advantages(Group(Problem(str(place), "x", "1"), members)))
    expected = trl_gradient(groups, loss_type, tmp_path)
    update = Update(method, policy, policy.accelerator, None, config(**changes).train)
    batches = list(pack(update.samples(groups), budget))
    update.backward(batches, len(batches))
    found = gradient(policy.bare_model)
    assert found.keys() == expected.keys() and (budget == 8192) == (len(batches) == 1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5 * value.abs().max().item(), rtol=1e-3)
