"""The parts, in an order that loses least if the run is cut off."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from handrail._util.processes import accelerator
from handrail.methods import build
from handrail.methods.batch import pack
from handrail.models import head
from handrail.models.config import ModelConfig
from handrail.models.generate import CopySampler
from handrail.models.loading import load_model
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import Config, parse_config
from handrail.training.policies import load_trainable_policy
from handrail.training.run import adamw
from handrail.training.update import Update
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory

PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, as the maker states them, by a part of the GPU's name."""

GROUP = 8
NO_TESTS = 5
"""Exit code of pytest if it finds no test."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. The model has the shape of Qwen3-0.6B."""

    model: dict[str, int] = field(
        default_factory=lambda: {
            "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        }
    )  # fmt: skip
    tokens: tuple[int, ...] = (8192, 16384)  # read in one update
    row: int = 512  # prompt and completion
    prompt: int = 64
    compiled: tuple[bool, ...] = (False, True)  # model.compile
    rounds: int = 4
    chunks: tuple[int, ...] = (2**24, 2**26, 2**28)
    batches: tuple[int, ...] = (64, 256)
    length: int = 256  # of sampled completions
    step: tuple[str, ...] = (
        "--problems",
        "16",
        "--tokens",
        "128",
        "--rounds",
        "3",
        "--dead",
        "0,0.5",
        "--dtype",
        "bfloat16",
    )
    learn: tuple[str, ...] = (
        "examples/smollm2-gsm.toml", "--jobs", "12", "--runs", "GRPO,LUFFY,SFT on failures,SORT",
        "--set", "compare.seeds=[1, 2, 3]", "--set", "model.dtype=bfloat16", "--set", "eval.every=0",
        "--set", "train.micro_batch_tokens=16384", "--set", "train.checkpoint_every=0",
    )  # fmt: skip


FULL = Sizes()
TINY = Sizes(
    model={
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    },
    tokens=(256,), row=32, prompt=8, compiled=(False,), rounds=1,
    chunks=(2**10, 2**12), batches=(4,), length=8,
    step=("--device", "cpu", "--problems", "2", "--group-size", "2", "--tokens", "4", "--rounds", "1",
          "--dead", "0", "--methods", "grpo"),
    learn=("examples/demo.toml", "--jobs", "1", "--set", "train.steps=1", "--set", "compare.seeds=[0]",
           "--set", "eval.limit=4", "--set", "model.device=cpu"),
)  # fmt: skip

Result = dict[str, Any]
Part = Callable[[Sizes, Path, float, Result], Iterator[None]]
"""Fills its result, the last argument, which holds what an earlier call measured before it was cut off;
yields wherever it may be cut off. Given are also the folder of the results and the seconds left."""


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_flops() -> float | None:
    """Peak operations per second in bfloat16; None if unknown."""
    return next((value for name, value in PEAK.items() if name in device_name()), None)


def dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median duration of ``work``, after one call to warm up."""
    found = []
    for _ in range(rounds + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return median(found[1:])


def measured_memory() -> float | None:
    """Most GiB that were allocated on the GPU since the last call; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


# Models and rows


def save_model(sizes: Sizes, directory: Path) -> Path:
    """A model with random weights, and the tokenizer of a built-in model, whose tokens are its first."""
    tokenizer = load_model(ModelConfig(path="builtin:house-tiny", device="cpu"))[1]
    torch.manual_seed(0)
    config = Qwen3Config(**sizes.model, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def settings(
    model: Path, sizes: Sizes, lora: bool = False, tokens: int = 8192, compile: bool = False
) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": dtype(), "compile": compile},
        "data": {"train": "task:house-rules"},
        "rollout": {"max_tokens": sizes.length, "batch_size": max(sizes.batches)},
        "train": {"micro_batch_tokens": tokens},
    }
    return parse_config(tree | ({"lora": {}} if lora else {}))


def random_groups(sizes: Sizes, tokens: int) -> list[Group]:
    """Groups with credit whose ``tokens``, shared prompts counted once, fill one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    length, words = sizes.row - sizes.prompt, sizes.model["vocab_size"]
    out = []
    for _ in range(tokens // (sizes.prompt + GROUP * length)):
        prompt = torch.randint(5, words, (sizes.prompt,), generator=generator).tolist()
        rows = torch.randint(5, words, (GROUP, length), generator=generator).tolist()
        members = [
            Trajectory.by(Author.POLICY, prompt, row).with_advantage((-1.0) ** place)
            for place, row in enumerate(rows)
        ]
        out.append(Group(Problem("p", "", ""), members))
    return out


def flops_per_token(policy: TrainablePolicy, width: int) -> float:
    """Operations of forward and backward per token: 6 per weight of a matrix product (4 if it is frozen: no
    gradient of its own), and 6·layers·heads·head_dim·width for causal attention over rows of ``width``."""
    base, config = policy.bare_base, policy.bare_base.config
    tied = base.get_input_embeddings().weight
    weights = {id(p): p for p in policy.model.parameters() if p.ndim == 2}
    total: float = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in weights.values())
    if base.get_output_embeddings().weight is not tied:
        total -= (6.0 if tied.requires_grad else 4.0) * tied.numel()  # looked up, not multiplied
    heads = config.num_attention_heads * config.head_dim
    return float(total + 6.0 * config.num_hidden_layers * heads * width)


# The parts


def tests(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """The tests that a GPU can break."""
    yield
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(60, left))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    if done.returncode not in (0, NO_TESTS) and "failed" not in counts:  # a file that cannot be imported
        raise RuntimeError(f"pytest ended with code {done.returncode}: {'; '.join(failed[:3])}")
    out |= {**counts, "exit": done.returncode, "failures": failed[:60]}


def update(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """Update with all weights and with LoRA, against the model's bare forward and backward pass."""
    out |= {"dtype": dtype(), "peak_flops": peak_flops()}
    rows = out.setdefault("rows", [])
    done = [(row["kind"], row["compiled"], row["limit"]) for row in rows]
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(sizes, Path(directory))
        for kind, compile in itertools.product(("full", "lora"), sizes.compiled):
            missing = [tokens for tokens in sizes.tokens if (kind, compile, tokens) not in done]
            if not missing:
                continue
            yield
            device = accelerator("auto")
            config = settings(model, sizes, kind == "lora", max(sizes.tokens), compile)
            policy = load_trainable_policy(config, device)
            optimizer = device.prepare(adamw(policy, config.train))
            whole = Update(build({"name": "grpo"}, config.rollout), policy, device, optimizer, config.train)
            for tokens in missing:
                yield
                measured = measured_update(whole, sizes, tokens)
                rows.append({"kind": kind, "compiled": compile, "limit": tokens, **measured})
                print(json.dumps(rows[-1]), flush=True)


def measured_update(update: Update, sizes: Sizes, tokens: int) -> dict[str, Any]:
    policy, groups = update.policy, random_groups(sizes, tokens)
    batches = list(pack(update.samples(groups), 2 * tokens, policy.layout))
    (prompts, completions) = (
        sum(len(group.trajectories[0].prompt_ids) for group in groups),
        sum(len(member) - 1 for group in groups for member in group.trajectories),
    )
    read = prompts + completions
    ids = torch.randint(5, sizes.model["vocab_size"], (max(1, read // sizes.row), sizes.row))
    ids = ids.to(policy.accelerator.device)

    def bare() -> None:
        policy.model.zero_grad()
        with policy.autocast():
            logits = policy.model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.autograd.backward(loss)

    def ours() -> None:
        policy.model.zero_grad()
        update.backward(batches, len(batches))

    measured_memory()
    times = {"update": seconds(lambda: update(groups), sizes.rounds)}
    memory = measured_memory()
    times["backward"] = seconds(ours, sizes.rounds)
    times["bare"] = seconds(bare, sizes.rounds)
    bare_memory, flops, peak = measured_memory(), flops_per_token(policy, sizes.row), peak_flops()
    rates = {name: count / times[name] for name, count in zip(times, (read, read, ids.numel()), strict=True)}
    return {
        "tokens": read,
        "micro_batches": len(batches),
        "seconds": times,
        "tokens_per_second": rates,
        "mfu": {name: rate * flops / peak for name, rate in rates.items()} if peak else None,
        "of_bare": rates["backward"] / rates["bare"],
        "gib": {"update": memory, "bare": bare_memory},
    }


def output_layer(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """Log-probabilities and their gradient by number of logits in memory at once."""
    device = accelerator("auto").device
    words, width = sizes.model["vocab_size"], sizes.model["hidden_size"]
    cast = getattr(torch, dtype())
    layer = nn.Linear(width, words, bias=False, device=device)
    hidden = torch.randn(sizes.tokens[0], width, device=device, requires_grad=True)
    targets, default = torch.randint(words, (len(hidden), 1), device=device), head.CHUNK

    def work() -> None:
        with torch.autocast(device.type, cast, enabled=cast == torch.bfloat16):
            logp, _ = head.log_probs(hidden, layer, targets)
        torch.autograd.backward(logp.sum())

    out["positions"], by_chunk = len(hidden), out.setdefault("by_chunk", {})
    for chunk in (*sizes.chunks, 2**62):
        name = "all at once" if chunk == 2**62 else f"{chunk}"
        if name in by_chunk:
            continue
        yield
        head.CHUNK = chunk
        measured_memory()
        try:
            duration = seconds(work, sizes.rounds)
        finally:
            head.CHUNK = default
        by_chunk[name] = {"seconds": duration, "gib": measured_memory()}


def sampling(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """Sampling with transformers' model, no completion ending early."""
    out["dtype"], rows = dtype(), out.setdefault("rows", [])
    missing = [batch for batch in sizes.batches if batch not in [row["batch"] for row in rows]]
    with tempfile.TemporaryDirectory() as directory:
        config = settings(save_model(sizes, Path(directory)), sizes)
        policy = load_trainable_policy(config, accelerator("auto"))
        policy.renderer.ends = set()
        if isinstance(policy.sampler, CopySampler):
            policy.sampler.ends = set()
        for batch in missing:
            yield
            generator = torch.Generator().manual_seed(0)
            words = sizes.model["vocab_size"]
            distinct = torch.randint(5, words, (max(1, batch // GROUP), sizes.prompt), generator=generator)
            prompts = [distinct[row % len(distinct)].tolist() for row in range(batch)]
            measured_memory()
            duration = seconds(lambda prompts=prompts: policy.generate(prompts, range(len(prompts))), 1)  # type: ignore[misc]
            rate = batch * sizes.length / duration
            rows.append({"batch": batch, "tokens_per_second": rate, "gib": measured_memory()})


def step(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """A whole step against one of TRL's."""
    yield
    try:
        import trl
    except ImportError:
        out["skipped"] = "TRL is not installed"
        return
    command = [sys.executable, "-m", "benchmarks.step_time", *sizes.step]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(60, left))
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    out |= {"trl": trl.__version__, "table": done.stdout.strip()}


def learning(sizes: Sizes, folder: Path, left: float, out: Result) -> Iterator[None]:
    """What methods learn, several runs side by side on the one GPU; goes on when run again."""
    yield
    if "examples/smollm2-gsm.toml" in sizes.learn and not Path("models/smollm2-135m").exists():
        out["skipped"] = "there is no models/smollm2-135m: handrail model fetch smollm2-135m"
        return
    output = folder / "learning"
    command = [sys.executable, "-m", "handrail.cli", "compare", *sizes.learn, "--output", str(output)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = running.communicate(timeout=max(60, left))
    except subprocess.TimeoutExpired:
        running.terminate()  # every run writes a checkpoint
        printed, _ = running.communicate()
    if running.returncode:
        raise RuntimeError(printed.strip().splitlines()[-1] if printed.strip() else "stopped")
    summary = json.loads((output / "summary.json").read_text())
    out |= {"verdict": summary["verdict"], "methods": summary["methods"]}


PARTS: dict[str, Part] = {
    "tests": tests,
    "update": update,
    "output-layer": output_layer,
    "sampling": sampling,
    "step": step,
    "learning": learning,
}
