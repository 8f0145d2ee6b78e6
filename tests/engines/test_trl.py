"""Handrail's methods inside TRL's real GRPOTrainer loop, on a CPU."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from handrail.data.answers import Answer, Answers, write_answers
from handrail.data.load import load
from handrail.engines.local import LocalEngine
from handrail.engines.trl import GuidedGRPOTrainer
from handrail.methods.batch import pack
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.training.policies import load_trainable_policy
from handrail.training.update import Update
from handrail.types.trajectory import Group
from tests.conftest import HARD, config

VERIFIER = {"name": "exact", "extract": r"# ([\d ]+)$", "workers": 1}


def dataset(source: str = f"{HARD}&n=16") -> Dataset:
    return Dataset.from_list(
        [
            {
                "id": problem.id, "prompt": problem.prompt, "answer": problem.answer,
                "reference": problem.references[0], "plan": problem.plan,
            }
            for problem in load(source).problems
        ]
    )  # fmt: skip


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    found = [re.search(r"# ([\d ]+)$", text) for text in completions]
    return [float(each is not None and each[1] == right) for each, right in zip(found, answer, strict=True)]


def varied(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [sum(map(ord, text)) % 7 / 6 for text in completions]


def coin(completions: list[str], **_: Any) -> list[float]:
    """1 for about half of all completions."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def arguments(directory: Path, **changes: Any) -> GRPOConfig:
    return GRPOConfig(**{
        "output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 48,
        "learning_rate": 1e-3, "logging_steps": 1, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, **changes,
    })  # fmt: skip


def trainer(
    cls: type[GRPOTrainer],
    directory: Path,
    rewards: Any = exact,
    data: Dataset | None = None,
    config: Any = None,
    **named: Any,
) -> Any:
    model, tokenizer = load_model(ModelConfig(path="builtin:house-tiny"))
    return cls(
        model,
        rewards,
        arguments(directory, **(config or {})),
        data or dataset(),
        processing_class=tokenizer,
        **named,
    )


def gradient(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Gradients:
    """Keep every micro-batch's loss, and of every update the weights before it and the gradient."""

    def __init__(self, trainer: Any) -> None:
        self.updates: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.guided: list[list[tuple[int, Group]]] = []
        step, loss = trainer.training_step, trainer._compute_loss

        def training_step(model: Any, *rest: Any) -> Any:
            if trainer.state.global_step == len(self.weights):
                self.weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
            out = step(model, *rest)
            if trainer.accelerator.sync_gradients:
                self.updates.append(gradient(trainer.model))
                self.guided.append(list(getattr(trainer, "guided", ())))
            return out

        def compute(model: Any, inputs: Any) -> Any:
            found = loss(model, inputs)
            self.losses.append(float(found.detach()))
            return found

        trainer.training_step, trainer._compute_loss = training_step, compute


def test_grpo_without_anything_is_trls_own_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for cls in (GRPOTrainer, GuidedGRPOTrainer):
        run = trainer(
            cls, tmp_path / cls.__name__, varied, config={"beta": 0.04, "gradient_accumulation_steps": 2}
        )
        kept = Gradients(run)
        run.train()
        runs.append((kept, run.state.log_history))
    (plain, plain_log), (guided, guided_log) = runs
    assert plain.losses == guided.losses and len(plain.updates) == len(guided.updates) == 2
    for one, other in zip(plain.updates, guided.updates, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(g.abs().sum() > 0 for g in plain.updates[0].values())


METHODS = ["luffy", "sort", "grpo+sft", "sft", "scope", "actguide", "dmpo", "calibrl", "int", "stride"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_through_trls_loop(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": method}
    if method == "stride":
        settings |= {"every": 1, "first": 1}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, method=settings)
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 2
    assert any(gradient.abs().sum() > 0 for gradient in kept.updates[0].values())


def test_without_reward_functions_the_verifier_grades_by_the_answer(tmp_path: Path) -> None:
    rewards = []
    for name, function in (("own", exact), ("verifier", None)):
        run = trainer(GuidedGRPOTrainer, tmp_path / name, function, method="sort", verifier=VERIFIER)
        kept = Gradients(run)
        run.train()
        rewards.append([row["reward"] for row in run.state.log_history if "reward" in row])
        assert run.state.log_history[0]["handrail/groups/guided"] == 2
        assert any(gradient.abs().sum() > 0 for gradient in kept.updates[0].values())
    assert rewards[0] == rewards[1]


def npo_cache(directory: Path) -> Path:
    """Answers of a later checkpoint to every problem: its reference, with made-up log-probabilities."""
    tokenizer, rows = load_model(ModelConfig(path="builtin:house-tiny"))[1], []
    for problem in load(f"{HARD}&n=16").problems:
        tokens = [*tokenizer.encode(problem.references[0]), tokenizer.eos_token_id]
        logp = [-0.1 - 0.01 * place for place in range(len(tokens))]
        rows.append(Answers(problem.id, [Answer(tokens, logp, problem.references[0])]))
    file = directory / "answers.jsonl"
    file.write_text("{}\n" + write_answers(rows))
    return file


def local_gradient(run: Any, kept: Gradients, update: int, updates: int) -> dict[str, torch.Tensor]:
    """What the local engine's update gives for the groups and weights of an update of ``run``."""
    method = run.method
    reference = "reference" in method.models
    policy = load_trainable_policy(config(rollout={"max_tokens": 48}), Accelerator(cpu=True), reference)
    policy.bare_model.load_state_dict(kept.weights[update])
    engine = LocalEngine(policy, run.pool, seed=run.args.seed)
    engine.begin(update // updates + 1)
    part = [
        (place, group)
        for place, group in kept.guided[update]
        if place * updates // run.problems == update % updates
    ]
    credited = engine.credit(method, [group for _, group in part], [place for place, _ in part])
    trained = Update(method, policy, policy.accelerator, None, config().train)
    batches = list(pack([each for each in trained.samples(credited) if each.is_live], 8192, policy.layout))
    trained.backward(batches, len(batches))
    return gradient(policy.bare_model)


PARITY = ["grpo", "luffy", "sort", "scope", "actguide", "npo", "dmpo"]


@pytest.mark.parametrize("method", PARITY)
@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_equals_the_local_engines(method: str, updates: int, tmp_path: Path) -> None:
    """Also with two updates on each generation, so that the second one's ratios are not 1."""
    settings: dict[str, Any] = {"name": method}
    settings |= {"cache": str(npo_cache(tmp_path)), "threshold": 1.0} if method == "npo" else {}
    settings |= {"normalise_std": True} if method == "grpo" else {}  # not TRL's own loss, but ours
    settings |= {"share": 1.0} if method == "actguide" else {}
    steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 2 * updates, "max_steps": 2 * updates}
    rewards = coin if method in ("grpo", "scope", "dmpo", "npo") else exact
    run = trainer(GuidedGRPOTrainer, tmp_path, rewards, config=steps, method=settings)
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 2 * updates
    for update, found in enumerate(kept.updates):
        expected = local_gradient(run, kept, update, updates)
        assert found.keys() == expected.keys()
        size = math.sqrt(sum(float(value.norm()) ** 2 for value in expected.values()))
        error = math.sqrt(sum(float((found[name] - value).norm()) ** 2 for name, value in expected.items()))
        assert size > 0 and error <= 1e-5 * size


@pytest.mark.parametrize(("accumulated", "generated"), [(1, 1), (4, 1), (4, 2), (4, 4), (2, 4), (1, 4)])
def test_any_number_of_micro_batches_makes_the_same_update(
    accumulated: int, generated: int, tmp_path: Path
) -> None:
    """With weights that stay, all rollouts of a run have the gradient of one large update."""
    batches = {"per_device_train_batch_size": 4, "learning_rate": 0.0, "max_steps": 16 // accumulated // 4}
    steps = {"gradient_accumulation_steps": accumulated, "steps_per_generation": generated}
    run = trainer(
        GuidedGRPOTrainer,
        tmp_path,
        coin,
        config={**batches, **steps, "max_steps": 8 // accumulated},
        method={"name": "grpo+sft", "loss_normalizer": "constant"},
    )
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 8 // accumulated and len(kept.losses) == 8
    assert run.generations == 8 // generated
    total = run.state.log_history[-1]["train_loss"]
    assert math.isfinite(total)
