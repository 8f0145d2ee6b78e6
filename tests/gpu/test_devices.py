"""Every tensor of a loss is on the policy's device, as far as that can be told without a GPU: PyTorch's fake
tensors know their device, and refuse to be mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from handrail.methods import METHODS
from handrail.methods.batch import Sample, TokenBatch, token_batch
from handrail.methods.losses import token_loss
from handrail.models import head
from handrail.types.trajectory import Author, Trajectory


def batch() -> list[Sample]:
    mixed = Trajectory.by(Author.POLICY, [1], [2, 3, 4]).append([5, 6], Author.REFERENCE, True)
    mixed = mixed.append([7], Author.ENVIRONMENT, True)
    columns = {
        name: torch.rand(len(mixed))
        for name in ("sampling_logp", "old_logp", "imitation_weight", "plan_logp")
    }
    return [Sample(mixed.with_columns(**columns).with_advantage(1.0), 1.0, 1.0, 1.0, 0.1, 0.1)] * 2


def on_gpu(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_mixes_no_devices(name: str) -> None:
    cls = METHODS[name]
    method: Any = cls(cls.Settings.model_validate({"name": name}), 4, 8)
    made = token_batch(batch())
    with FakeTensorMode(allow_non_fake_inputs=True):
        columns = {name: on_gpu(column) for name, column in made.columns.items()}
        others = {name: on_gpu(value) for name, value in vars(made).items() if name != "columns"}
        moved = TokenBatch(columns=columns, **others)
        logp = torch.zeros(2, 6, device="cuda", requires_grad=True)
        loss = token_loss(method, logp, moved, logp.detach(), logp.detach(), 2.0)
        assert loss.device.type == "cuda"


def test_mixed_devices_are_seen() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device="cuda") + torch.zeros(2)


def test_chunks_mix_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 10)
    with FakeTensorMode():
        layer = torch.nn.Linear(8, 9, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(torch.empty(9, 8, device="cuda"))
        hidden = torch.zeros(5, 8, device="cuda", requires_grad=True)
        logp, entropy = head.log_probs(
            hidden, layer, torch.zeros(5, 2, device="cuda", dtype=torch.long), 0.5, True
        )
        (logp.sum() + torch.as_tensor(entropy).sum()).backward()
        assert logp.device.type == "cuda"
