"""Every tensor of a loss is on the policy's device, as far as that shows without a GPU: the device "meta"
holds no numbers, and arithmetic refuses to mix it with another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handrail.methods import METHODS
from handrail.methods.batch import Sample, token_batch
from handrail.methods.losses import token_loss
from handrail.models import head
from handrail.models.head import ChunkedLogProbs
from handrail.types.trajectory import Author, Trajectory

META = torch.device("meta")


def samples() -> list[Sample]:
    mixed = Trajectory.by(Author.POLICY, [1], [2, 3, 4]).append([5, 6], Author.REFERENCE, True)
    mixed = mixed.append([7], Author.ENVIRONMENT, True)
    names = ("sampling_logp", "old_logp", "imitation_weight", "plan_logp")
    columns = {name: torch.rand(len(mixed)) for name in names}
    return [Sample(mixed.with_columns(**columns).with_advantage(1.0), 1.0, 1.0, 1.0, 0.1, 0.1)] * 2


READY = [
    name
    for name, cls in METHODS.items()
    if not any(setting.is_required() for setting in cls.Settings.model_fields.values())
]


@pytest.mark.parametrize("name", READY)
def test_a_loss_mixes_no_devices(name: str) -> None:
    cls = METHODS[name]
    method: Any = cls(cls.Settings.model_validate({"name": name}), 4, 8)
    logp = torch.zeros(2, 6, device=META, requires_grad=True)
    batch = token_batch(samples()).to(META)
    loss = token_loss(method, logp, batch, logp.detach(), logp.detach(), 2.0)
    loss.backward()
    assert loss.device == META and logp.grad is not None


def test_mixed_devices_are_seen() -> None:
    batch = token_batch(samples())
    with pytest.raises(RuntimeError, match="device"):
        token_loss(METHODS["grpo"](), torch.zeros(2, 6, device=META), batch)


def test_chunks_mix_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 10)
    hidden, weight = (torch.zeros(n, 8, device=META, requires_grad=True) for n in (5, 9))
    targets = torch.zeros(5, 2, device=META, dtype=torch.long)
    compute: Any = ChunkedLogProbs.apply
    logp, entropy = compute(hidden, weight, targets, 0.5, True, torch.float32, False)
    (logp.sum() + entropy.sum()).backward()
    assert logp.device == META and hidden.grad is not None and weight.grad is not None
