"""What several processes make of a model: its shards, and what of it they train."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from handrail import UserError, train
from handrail._util.launch import Fsdp
from handrail.models.sharding import ShardedModel, Turns
from handrail.training.policies import load_trainable_policy
from tests.conftest import config
from tests.forks import together
from tests.tiny_models import save_chat_model
from tests.training.test_loop import lines


def shard_buffers(directory: Path) -> None:
    """As transformers loads a checkpoint: one process of a host reads it, the others have zeros."""
    device, rank = Accelerator(cpu=True).device, int(os.environ["RANK"])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes))
    model.register_buffer("scale", torch.tensor([3.0 if rank == 0 else 0.0]))
    sharded = ShardedModel(model, Fsdp(), device)
    found = [sharded.whole.scale.item(), sharded.trained.scale.item()]
    sharded.whole.scale.fill_(5.0)  # a checkpoint is loaded
    sharded.scatter()
    (directory / f"{rank}.json").write_text(json.dumps([*found, sharded.trained.scale.item()]))


def test_every_process_has_the_buffers_of_the_checkpoint(tmp_path: Path) -> None:
    together(2, shard_buffers, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [3.0, 3.0, 5.0]


def load_another_model(directory: Path) -> None:
    policy = load_trainable_policy(config(train={"fsdp": True}), Accelerator(cpu=True))
    with pytest.raises(UserError, match="holds another model"):
        policy.load_state(directory / "other")
    (directory / os.environ["RANK"]).touch()


def test_no_process_waits_if_the_main_one_cannot_load_a_checkpoint(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "other")
    together(2, load_another_model, tmp_path)
    assert {"0", "1"} <= {file.name for file in tmp_path.iterdir()}


def test_a_model_in_shards_is_not_called_from_a_thread() -> None:
    """Calls of several threads would come in another order in every process."""
    turns = Turns(None, lambda kind: None)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as thread, pytest.raises(UserError, match="set sampler.staleness = 0"):
        thread.submit(turns.take, 1, lambda: None).result()


def train_beside_a_vision_tower(directory: Path) -> None:
    settings = config(
        model={"path": str(directory / "model")}, method={"name": "luffy"}, verifier={"name": "math"},
        rollout={"max_tokens": 4}, train={"steps": 2, "problems_per_step": 2, "updates_per_step": 1},
    )  # fmt: skip
    train(settings, directory / "run")


def test_what_text_does_not_reach_is_not_trained(tmp_path: Path) -> None:
    """DDP would wait for its gradient and end the run in the second update."""
    model = save_chat_model(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    text = Gemma3TextConfig(vocab_size=vocabulary, num_key_value_heads=1, head_dim=8, **sizes)
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **sizes)
    both = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    both.save_pretrained(model)
    together(2, train_beside_a_vision_tower, tmp_path)
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "run/model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision" in name or "projector" in name for name in moved)
