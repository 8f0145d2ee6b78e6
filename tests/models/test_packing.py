"""Packed rows: the layout by hand, and the same gradients as from padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention
from transformers import BloomConfig, Qwen3Config

from handrail.models import packing
from handrail.models.batching import Inputs, Layout, by_budget
from handrail.models.packing import Packed, forward
from handrail.models.trainable import TrainablePolicy
from handrail.training.policies import load_trainable_policy
from tests.conftest import config
from tests.models.test_generate import ATTENTION, made
from tests.tiny_models import save_chat_model

A, B, C, D, E, F, G, H = range(10, 18)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("words"))


def test_the_layout_by_hand() -> None:
    packed = Packed.of(Inputs.of([[A, B], [G], [A, B]], [[C, D, E], [H], [F, G]]))
    assert packed.tokens.tolist() == [A, B, G, C, D, F]
    assert packed.positions.tolist() == [0, 1, 0, 2, 3, 2]
    assert packed.rows.tolist() == [[0, 1, 3, 4], [2, 0, 0, 0], [0, 1, 5, 0]]
    assert [packed.rows.flatten()[place].item() for place in packed.source] == [0, 1, 2, 3, 4, 5]
    assert packed.before.tolist() == [1, 3, 4, 2, 1, 5]  # of C D E, of H, of F G
    assert packed.completion.tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "shared"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.bfloat16, True, False),
        ("cuda", torch.float32, False, False),
        ("cpu", torch.float32, True, True),
    ],
)
def test_cuda_shares_the_keys_of_grouped_queries_in_16_bits_without_a_mask_only(
    device: str, dtype: torch.dtype, masked: bool, shared: bool
) -> None:
    assert packing.reads_groups(device, dtype, masked) == shared


def test_autocast_decides_what_attention_is_computed_in() -> None:
    query = torch.ones(1, 1, 1, 1)
    assert packing.computed_in(query) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert packing.computed_in(query) == torch.bfloat16


@pytest.mark.parametrize("window", [None, 2])
def test_copied_keys_of_grouped_queries_attend_as_shared_ones(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    packed = Packed.of(Inputs.of([[A, B], [G], [A, B]], [[C, D, E], [H], [F, G]]))
    states = [torch.randn(1, heads, 6, 8, dtype=torch.float64) for heads in (6, 2, 2)]
    calls: list[tuple[int, bool]] = []

    def attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **others: Any) -> torch.Tensor:
        calls.append((key.shape[1], others["enable_gqa"]))
        return scaled_dot_product_attention(query, key, *args, **others)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", attention)
    found = []
    for shared in (True, False):
        monkeypatch.setattr(packing, "reads_groups", lambda *args, shared=shared: shared)
        inputs = [each.clone().requires_grad_() for each in states]
        query, key, value = inputs
        out = packing.packed_attention(query, key, value, packed, sliding_window=window)
        out.mul(torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *(each.grad for each in inputs)])
    assert calls == [(2, True), (6, False)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ATTENTION)
def test_gradients_are_those_of_padded_rows_in_float64(kind: str, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION[kind], words, tmp_path)
    policy.model.double()
    prompts = [[10, 11, 12, 13, 14], [30, 31], [10, 11, 12, 13, 14], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
    completions = [[50, 51, 52], [53], list(range(54, 74)), [64, 65, 66]]
    found: list[list[torch.Tensor]] = []
    layouts: list[Layout] = ["padded", "packed"]
    for policy.layout in layouts:
        policy.model.zero_grad()
        inputs = Inputs.of(prompts, completions)
        logp, entropy = policy.forward(inputs, with_entropy=True)
        weights = torch.arange(1.0, 81.0, dtype=torch.float64).view(4, 20) * inputs.completion_mask
        (logp * weights + torch.as_tensor(entropy)).mul(inputs.completion_mask).sum().backward()
        found.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    scale = torch.nn.utils.get_total_norm(found[0])
    difference = [one - other for one, other in zip(*found, strict=True)]
    assert scale > 0 and torch.nn.utils.get_total_norm(difference) < 1e-6 * scale


def test_a_model_with_an_attention_of_its_own_is_padded(words: Path, tmp_path: Path) -> None:
    biased = BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    assert made(biased, words, tmp_path).layout != "packed"


def configured(words: Path, **model: Any) -> TrainablePolicy:
    return load_trainable_policy(config(model={"path": str(words), **model}), Accelerator(cpu=True))


def test_attention_that_the_user_chose_stays_and_is_padded(words: Path) -> None:
    policy = configured(words, attention="sdpa")
    assert policy.layout == "shared" and policy.bare_model.config._attn_implementation == "sdpa"


def test_checkpointed_activations_are_packed_too(words: Path) -> None:
    policy, plain = configured(words, gradient_checkpointing=True), configured(words)
    assert policy.layout == plain.layout == "packed" and policy.checkpointed
    found = []
    for each in (policy, plain):
        logp, _ = each.forward(Inputs.of([[5, 6], [5, 6]], [[7, 8, 9], [10, 11]]))
        logp.sum().backward()
        found.append([p.grad for p in each.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def kept(model: Any, lengths: list[int]) -> int:
    """Bytes that the forward pass of completions of these lengths keeps for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = Inputs.of([[1, 2]] * len(lengths), [[3] * length for length in lengths])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, Packed.of(inputs))
    return sum(storages.values())


def test_a_long_row_among_short_ones_does_not_burst_the_budget(words: Path, tmp_path: Path) -> None:
    # Qwen3-0.6B's proportions, whose queries, keys and values are wide.
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = made(Qwen3Config(**shape, intermediate_size=96, num_hidden_layers=2), words, tmp_path).model
    equal, mixed, budget = [128] * 4, [256] + [4] * 60, 512
    batches = [[mixed[index] for index in part] for part in by_budget([[1, 2]] * 61, mixed, budget)]
    assert sum(map(len, batches)) == 61
    assert max(kept(model, batch) for batch in batches) < 1.5 * kept(model, equal)
