"""Peak memory and time of an update with a large vocabulary, with and without the logits of all positions in
memory: ``python -m benchmarks.head``.

A llama with random weights, the real update and optimizer; each measurement in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from handrail._util.memory import peak_resident
from handrail._util.processes import accelerator
from handrail.methods import build
from handrail.models import head
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.training.config import parse_config
from handrail.training.policies import load_trainable_policy
from handrail.training.update import Update
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory

PROMPT, ROWS = 32, 8


def save_model(directory: Path, vocabulary: int, hidden: int, layers: int) -> Path:
    tokenizer = load_model(ModelConfig(path="builtin:house-tiny", device="cpu"))[1]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_groups(tokens: int, vocabulary: int) -> list[Group]:
    """Groups of ROWS completions with credit, of ``tokens`` completion tokens in all."""
    generator = torch.Generator().manual_seed(0)
    length, out = 256, []
    for _ in range(tokens // (ROWS * length)):
        prompt = torch.randint(5, vocabulary, (PROMPT,), generator=generator).tolist()
        rows = torch.randint(5, vocabulary, (ROWS, length), generator=generator).tolist()
        members = [
            Trajectory.by(Author.POLICY, prompt, row).with_advantage((-1.0) ** place)
            for place, row in enumerate(rows)
        ]
        out.append(Group(Problem("p", "", ""), members))
    return out


def measure(model: Path, options: argparse.Namespace) -> None:
    """Print the peak memory of this process in bytes and the seconds of an update after the first."""
    settings: dict[str, Any] = {
        "model": {"path": str(model), "device": "cpu"},
        "data": {"train": "task:house-rules"},
        "train": {"micro_batch_tokens": 2 * options.tokens},
    }
    config = parse_config(settings)
    device = accelerator("cpu")
    policy = load_trainable_policy(config, device)
    optimizer = device.prepare(torch.optim.AdamW(policy.model.parameters(), lr=1e-6))
    update = Update(build({"name": "grpo"}, config.rollout), policy, device, optimizer, config.train)
    groups, seconds = random_groups(options.tokens, options.vocabulary), []
    for _ in range(options.rounds):
        started = time.perf_counter()
        update(groups)
        seconds.append(time.perf_counter() - started)
    print(f"peak {peak_resident()} {median(seconds[1:])}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=4096, help="completion tokens of the update")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, help="logits in memory at once: measure in this process")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.chunk:
        head.CHUNK = options.chunk
        return measure(Path(options.model), options)
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(Path(directory), options.vocabulary, options.hidden, options.layers)
        found = {}
        for name, chunk in (("all logits at once", 2**62), ("in chunks", head.CHUNK)):
            command = [sys.executable, "-m", "benchmarks.head", *arguments]
            command += ["--chunk", str(chunk), "--model", str(model)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name] = [float(value) for value in output.rsplit("peak ", 1)[1].split()]
            print(f"{name}: {found[name][0] / 2**30:.2f} GiB, {found[name][1]:.1f} s an update")
    plain, chunked = found.values()
    print(f"{chunked[0] / plain[0]:.3f} of the memory, {chunked[1] / plain[1]:.2f} of the time")


if __name__ == "__main__":
    main(sys.argv[1:])
