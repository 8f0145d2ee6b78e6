"""What a GPU can break: ``pytest -m gpu``.

``HANDRAIL_TEST_DEVICE=cpu`` runs these tests on a CPU, which checks the tests themselves.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from handrail import UserError, train
from handrail._util.memory import enough_memory
from handrail.models import head
from handrail.models.batching import Inputs, Layout
from handrail.models.cached import CachedModel
from handrail.models.generate import Completion, generate
from handrail.models.graphs import can_repeat
from handrail.models.head import log_probs
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import Config
from handrail.training.policies import load_trainable_policy
from handrail.training.resources import peak_memory
from tests.conftest import config
from tests.training.test_golden import GOLDEN, METHODS, curve
from tests.training.test_loop import Scripted, lines

ON = os.environ.get("HANDRAIL_TEST_DEVICE", "cuda")
DEVICE = "cpu" if ON == "cpu" else "auto"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON != "cpu" and not torch.cuda.is_available(), reason="there is no GPU here"),
]
PROMPTS = [[10, 11, 12, 13], [5, 6], [10, 11, 12, 13], [7]]
COMPLETIONS = [[8, 9, 10, 11, 12], [6, 7], [9, 9, 8], [5]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps the first device of a process for good, and other tests take the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)


def policy(**changes: Any) -> TrainablePolicy:
    changes["model"] = {"device": DEVICE, **changes.get("model", {})}
    made = load_trainable_policy(config(**changes), Accelerator(cpu=DEVICE == "cpu"))
    assert next(made.model.parameters()).device.type == ON
    return made


def settings(**changes: Any) -> Config:
    return config(**{**changes, "model": {"device": DEVICE, **changes.get("model", {})}})


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float)}


@pytest.mark.parametrize("name", METHODS)
def test_the_objectives_are_those_of_a_cpu(name: str, tmp_path: Path) -> None:
    """Losses, gradient norms and everything else of ten steps on written completions, in float32."""
    expected = [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text().splitlines()]
    for row, golden in zip(curve(METHODS[name], tmp_path / "run", DEVICE), expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(golden), rel=5e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_scores_as_it_was_drawn(dtype: str) -> None:
    found = policy(model={"dtype": dtype})
    rows = found.generate(PROMPTS * 8, range(32))
    assert len({tuple(row.tokens) for row in rows}) > 4
    scored = torch.cat(found.score([row.prompt_ids for row in rows], [row.token_ids for row in rows]))
    difference = (scored - torch.cat([row.column("sampling_logp") for row in rows])).abs()
    assert difference.isfinite().all()
    assert difference.mean() < (1e-4 if dtype == "float32" else 0.1)


def test_the_same_seeds_draw_what_they_draw_on_a_cpu() -> None:
    drawn = [row.tokens for row in policy().generate(PROMPTS * 8, range(32))]
    AcceleratorState._reset_state(reset_partial_state=True)
    reference = load_trainable_policy(config(), Accelerator(cpu=True))
    expected = [row.tokens for row in reference.generate(PROMPTS * 8, range(32))]
    same = sum(one == other for one, other in zip(drawn, expected, strict=True))
    assert same >= 30  # a number on the edge between two tokens may fall to either side


def drawn_by(model: Any, kind: type[CachedModel] | None) -> list[Completion]:
    limits = [5 * (row + 1) for row in range(32)]
    return generate(model.eval(), PROMPTS * 8, range(32), limits, 1.0, set(), kind=kind)


def test_cuda_graphs_draw_what_single_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy().bare_model
    replayed: list[None] = []
    if ON != "cpu":
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replayed.append(replay(self)))
    found, expected = drawn_by(model, None), drawn_by(model, CachedModel)
    assert can_repeat(model) == bool(replayed) == (ON != "cpu")
    same = [torch.equal(one.tokens, other.tokens) for one, other in zip(found, expected, strict=True)]
    assert sum(same) >= 30
    for one, other in zip(found, expected, strict=True):
        if torch.equal(one.tokens, other.tokens):
            torch.testing.assert_close(one.logp, other.logp, atol=1e-3, rtol=0)


def test_a_model_that_cannot_be_captured_is_sampled_without_graphs() -> None:
    model = policy().bare_model
    layer = model.get_input_embeddings()
    layer.register_forward_hook(lambda module, inputs, output: output * (inputs[0].float().sum().item() > -1))
    found, expected = drawn_by(model, None), drawn_by(model, CachedModel)
    same = [torch.equal(one.tokens, other.tokens) for one, other in zip(found, expected, strict=True)]
    assert sum(same) >= 30
    assert not can_repeat(model)


def gradient(of: TrainablePolicy) -> Tensor:
    of.model.zero_grad()
    logp, entropy = of.forward(Inputs.of(PROMPTS, COMPLETIONS), with_entropy=True)
    mask = Inputs.of(PROMPTS, COMPLETIONS).completion_mask.to(logp.device)
    ((logp + torch.as_tensor(entropy)) * mask).sum().backward()
    return torch.cat([p.grad.flatten().cpu() for p in of.model.parameters() if p.grad is not None])


def test_layouts_and_checkpointed_activations_give_one_gradient() -> None:
    found = policy()
    layouts: list[Layout] = ["padded", "shared", "packed"]
    gradients = []
    for found.layout in layouts:
        gradients.append(gradient(found))
    gradients.append(gradient(policy(model={"gradient_checkpointing": True})))
    for each in gradients[1:]:
        assert (each - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_bfloat16_gradients_point_where_those_of_float32_do() -> None:
    exact, rounded = gradient(policy()), gradient(policy(model={"dtype": "bfloat16"}))
    assert torch.cosine_similarity(exact, rounded, 0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_output_layer_equal_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, layer = torch.randn(300, 64, dtype=torch.float64), nn.Linear(64, 1000, False, dtype=torch.float64)
    targets = torch.randint(1000, (300, 2))

    def both(on: str, cast: torch.dtype, limit: int) -> list[Tensor]:
        monkeypatch.setattr(head, "CHUNK", limit)
        inputs = hidden.detach().clone().to(on, cast).requires_grad_()
        copied = copy.deepcopy(layer).to(on, cast)
        logp, entropy = log_probs(inputs, copied, targets.to(on), 0.7, True)
        (logp.sum() + torch.as_tensor(entropy).sum()).backward()
        parts = [logp, entropy, inputs.grad, copied.weight.grad]
        return [torch.as_tensor(part).detach().cpu().double() for part in parts]

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for exact, found in zip(both("cpu", torch.float64, 10**9), both(ON, dtype, 20_000), strict=True):
        assert (found - exact).norm() < tolerance * exact.norm()


def test_a_compiled_update_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 200)
    found = []
    for compile in (False, True):
        made = policy(model={"compile": compile})
        logp, entropy = made.forward(Inputs.of(PROMPTS, COMPLETIONS), True)
        (logp.sum() + torch.as_tensor(entropy).sum()).backward()
        found.append([logp.detach(), *(torch.as_tensor(p.grad) for p in made.model.parameters())])
        assert [row.token_ids for row in made.generate(PROMPTS, range(4))]
    for plain, fast in zip(*found, strict=True):
        assert (plain - fast).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    def run(steps: int, name: str, resume: bool = False) -> None:
        extra = {"lora": {"rank": 4}, "model": {"dtype": "bfloat16"}} if kind == "lora" else {}
        steps_of = {"steps": steps, "learning_rate": 1e-3, "checkpoint_every": 1}
        train(settings(train=steps_of, **extra), tmp_path / name, method=Scripted, resume=resume)

    run(4, "whole")
    run(2, "parts")
    run(4, "parts", resume=True)
    whole, parts = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        # Some kernels add in any order.
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-2, abs=1e-4)


CORE: dict[str, dict[str, Any]] = {
    "grpo": {"entropy_bonus": 0.01, "kl": 0.01},
    "luffy": {},
    "sort": {},
    "sft-on-failures": {},
    "scope": {"judge": "reference", "no_prefix": "reference"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CORE)
def test_each_core_method_runs(name: str, dtype: str, tmp_path: Path) -> None:
    steps = {"steps": 2, "updates_per_step": 2}
    run = settings(method={"name": name, **CORE[name]}, model={"dtype": dtype}, train=steps)
    train(run, tmp_path / "run")
    rows = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert [row["step"] for row in rows] == [1, 2] and not any("update/skipped" in row for row in rows)
    assert any("loss" in row for row in rows)


def test_exhausted_memory_is_one_sentence() -> None:
    advice = r"out of memory while updating; lower train.micro_batch_tokens"
    with pytest.raises(UserError, match=advice), enough_memory("update"):
        torch.empty(2**50, device=ON)


def test_the_forecast_counts_the_memory_of_the_device() -> None:
    found = policy()
    gradient(found)
    assert peak_memory() > sum(p.numel() * p.element_size() for p in found.model.parameters())
