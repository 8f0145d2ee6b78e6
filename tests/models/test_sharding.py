"""What a model in shards is made of, in several processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from handrail._util.launch import Fsdp
from handrail.models.sharding import ShardedModel
from tests.forks import together


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
