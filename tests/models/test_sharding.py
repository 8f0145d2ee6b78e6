"""What several processes make of a model: its shards, and what of it they train."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from handrail import UserError, train
from handrail._util.launch import Fsdp
from handrail.models.config import ModelConfig
from handrail.models.sharding import ShardedModel
from handrail.models.trainable import TrainablePolicy
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


def shards_after_loading(directory: Path) -> None:
    if os.environ["RANK"] == "1":  # which must get the weights from the main process
        AutoModelForCausalLM.from_pretrained = None
    policy = TrainablePolicy(
        ModelConfig(path="builtin:house-tiny", device="cpu"),
        accelerator=Accelerator(cpu=True),
        fsdp=Fsdp(reshard_after_forward=False),
        own_sampler=lambda policy: None,  # type: ignore[arg-type, return-value]
    )
    policy.score([[5, 6]], [[7, 8]])
    policy.join()
    found = [isinstance(each, DTensor) for each in policy.model.parameters()]
    (directory / os.environ["RANK"]).write_text(json.dumps(found))


def test_what_loading_and_scoring_gather_is_freed(tmp_path: Path) -> None:
    """The optimizer would not train what is not in shards when it is made. Only one process reads weights."""
    together(2, shards_after_loading, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert all(found) and len(found) > 10


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
