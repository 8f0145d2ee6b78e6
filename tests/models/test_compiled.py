"""model.compile: the same rollouts and updates, by other kernels."""

from __future__ import annotations

from functools import cache, partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from handrail import UserError, train
from handrail._util.launch import Fsdp
from handrail.models import head
from handrail.models.compiled import compile_layers
from handrail.models.config import ModelConfig
from handrail.models.trainable import TrainablePolicy
from tests.conftest import config
from tests.training.test_loop import lines


def run(directory: Path, compile: bool) -> list[dict[str, Any]]:
    settings = config(model={"compile": compile}, method={"name": "luffy"}, train={"updates_per_step": 2})
    train(settings, directory)
    return lines(directory / "metrics.jsonl")


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
)  # the first traces and checks everything, and then runs PyTorch's own kernels
def test_a_compiled_run_learns_the_same(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    monkeypatch.setattr(head, "fused", cache(partial(torch.compile, dynamic=True, backend=backend)))
    monkeypatch.setattr(head, "CHUNK", 1000)  # so that the output layer works in chunks
    torch.compiler.reset()
    plain = run(tmp_path / "plain", False)
    counters.clear()
    fast = run(tmp_path / "fast", True)
    assert counters["stats"]["unique_graphs"] >= 3  # a layer, and both directions of the output layer
    for expected, found in zip(plain, fast, strict=True):
        numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert [row["text"] for row in lines(tmp_path / "plain/samples.jsonl")] == [
        row["text"] for row in lines(tmp_path / "fast/samples.jsonl")
    ]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.compile: some/model has no layers"):
        compile_layers(nn.Linear(2, 2), "some/model")


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no C compiler; install gcc"):
        compile_layers(nn.Linear(2, 2), "some/model")


def test_sharded_models_are_refused_before_they_are_loaded() -> None:
    with pytest.raises(UserError, match=r"model\.compile does not work with FSDP"):
        TrainablePolicy(ModelConfig(path="nowhere", compile=True), fsdp=Fsdp())


@pytest.mark.long
def test_a_compiled_chunk_is_equal_in_bfloat16_too() -> None:
    """The derivative's sums are float32 inside the kernel."""
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 11).bfloat16(), torch.randint(11, (6, 1))
    of_logp, of_entropy = torch.randn(6, 1), torch.randn(6)
    found = []
    for compiled in (False, True):
        summarize = head.fused(head.summary) if compiled else head.summary
        derive = head.fused(head.derivative) if compiled else head.derivative
        logp, norm, entropy = summarize(logits, targets, 0.7, True)
        of_logits = derive(logits, targets, norm, entropy, of_logp, of_entropy, 0.7, True)
        found.append([logp, norm, entropy, of_logits])
    assert found[1][-1].dtype == torch.bfloat16
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(
            value, expected, rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
