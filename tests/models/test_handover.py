"""The weights go to a sampler, and into a merged model, one tensor at a time and without copies."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from handrail import UserError
from handrail.models.generate import CopySampler
from handrail.models.trainable import TrainablePolicy
from handrail.models.vllm import VllmSampler, converts
from handrail.training.policies import load_trainable_policy
from tests.conftest import config

SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def policy(**changes: Any) -> TrainablePolicy:
    return load_trainable_policy(config(**changes), Accelerator(cpu=True))


class FakeVllm:
    """Takes weights as vLLM does: each is read once, in the order in which it comes."""

    def __init__(self, take: Callable[[Iterable[tuple[str, Tensor]]], None]) -> None:
        self.take = take

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.take(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> None: ...


def sampler(model: Any, take: Callable[[Iterable[tuple[str, Tensor]]], None]) -> VllmSampler:
    """A sampler on a GPU, as far as it can tell."""
    made = VllmSampler.__new__(VllmSampler)
    made.spread = False
    made.model, made.llm, made.on_cpu = model, FakeVllm(take), False
    return made


def test_vllm_reads_the_trainers_own_memory() -> None:
    found: dict[str, int] = {}
    trained = policy()

    def take(weights: Iterable[tuple[str, Tensor]]) -> None:
        found.update({name: value.data_ptr() for name, value in weights})

    sampler(trained.bare_base, take).update_weights(trained.weights())
    own = {name: value.data_ptr() for name, value in trained.bare_model.state_dict().items()}
    assert len(found) > 10 and found == {name: own[name] for name in found}


def one_at_a_time(alive: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, and note how many of those before are still held."""
    held: list[weakref.ref[Tensor]] = []
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
        alive.append(sum(each() is not None for each in held))
        value = torch.ones(20, 8) if name == "lm_head.weight" else torch.ones(8)
        held.append(weakref.ref(value))
        yield name, value
        del value


def test_merged_weights_reach_a_sampler_one_at_a_time() -> None:
    plain = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    alive: list[int] = []

    def take(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _ in weights:
            pass

    sampler(plain, take).update_weights(one_at_a_time(alive))
    copied = CopySampler(plain, 1.0, set(), torch.device("cpu"))
    copied.update_weights(one_at_a_time(alive))
    assert alive == [0, 1, 1, 0, 1, 1]  # the one before, as long as its name is bound
    assert bool((copied.model.lm_head.weight == 1).all()) and copied.model.dtype == torch.bfloat16


def test_experts_that_checkpoints_keep_apart_reach_vllm_as_in_a_checkpoint() -> None:
    names: set[str] = set()
    merged = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    assert converts(merged) and not converts(Qwen3ForCausalLM(Qwen3Config(**SMALL)))

    def take(weights: Iterable[tuple[str, Tensor]]) -> None:
        names.update(name for name, _ in weights)

    sampler(merged, take).update_weights(merged.state_dict().items())
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names


def test_a_merged_model_is_gathered_in_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = policy(lora={"rank": 2, "save": "merged"})
    whole = dict(trained.weights())
    moved: list[str] = []

    def on_gpu(model: Any) -> Iterator[tuple[str, Any]]:
        for name, value in whole.items():

            def cpu(name: str = name, value: Tensor = value) -> Tensor:
                moved.append(name)
                return value

            yield name, SimpleNamespace(cpu=cpu)

    monkeypatch.setattr(trained, "weights", on_gpu)
    trained.save(tmp_path)
    assert moved == [*whole] and load_file(tmp_path / "model.safetensors").keys() == whole.keys()


def test_a_copy_to_sample_from_is_rounded_before_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[set[torch.dtype]] = []
    to = nn.Module.to

    def move(self: nn.Module, *args: Any, **others: Any) -> nn.Module:
        moved.append({parameter.dtype for parameter in self.parameters()})
        return to(self, *args, **others)

    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    monkeypatch.setattr(nn.Module, "to", move)
    CopySampler(model, 1.0, set(), torch.device("cpu"))
    assert moved == [{torch.bfloat16}]


def test_memory_that_runs_out_in_vllm_is_not_its_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    plain = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    with pytest.raises(UserError, match=r"^out of memory while sampling; lower .*sampler\.cache_gib"):
        sampler(plain, full).update_weights(plain.state_dict().items())
    fake = SimpleNamespace(LLM=full, SamplingParams=full, TokensPrompt=full)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # which the sampler sets
        monkeypatch.setenv(name, "")
    settings = config(sampler={"name": "vllm"})
    with pytest.raises(UserError, match=r"^out of memory while starting vLLM; lower sampler\.cache_gib"):
        VllmSampler(settings.model, settings.sampler, settings.rollout, plain, {0}, torch.device("cpu"))
