"""Make the built-in backbones: tiny Llamas, trained from scratch.

They learn arithmetic, the meaning of the known names, and to *follow a plan* if one is given. The names that
the hard problems use get a random meaning in every training example, so the model learns no particular one.
See ``benchmarks.backbones.mixtures``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.backbones.mixtures import (
    HOUSE_WORDS,
    SUITE_WORDS,
    house_example,
    suite_example,
)
from handrail.data.tasks import house_rules as house

Mixture = Callable[[Mapping[str, float], random.Random], tuple[str, str]]


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights, besides the version of torch."""

    words: list[str]
    example: Mixture
    shares: Mapping[str, float]
    """How often ``example`` draws each of its kinds."""
    hidden: int = 96
    layers: int = 3
    kv_heads: int = 2
    steps: int = 4350
    batch: int = 64
    learning_rate: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.98)
    digits: bool = False  # a number's embedding is initialized as that of its tens plus that of its ones
    flat: float = 0.3  # share of the steps at full learning rate; then a cosine decay to 0


SUITE_SHARES = {
    "easy": 0.20, "planned": 0.10, "bare": 0.03, "sum": 0.06,
    "named": 0.30, "planned procedure": 0.25, "bare procedure": 0.06,
}  # fmt: skip


def suite_recipe(hidden: int, steps: int, learning_rate: float = 4e-3) -> Recipe:
    return Recipe(
        SUITE_WORDS, suite_example, SUITE_SHARES, hidden=hidden, kv_heads=4, steps=steps,
        learning_rate=learning_rate, digits=True
    )  # fmt: skip


RECIPES = {
    "house-tiny": Recipe(HOUSE_WORDS, house_example, {"easy": 0.52, "planned": 0.40, "bare": 0.08}),
    "suite-weak": suite_recipe(hidden=64, steps=1500),
    "suite-middle": suite_recipe(hidden=96, steps=2500),
    "suite-strong": suite_recipe(hidden=112, steps=2900, learning_rate=3e-3),
}


def tokenizer(words: list[str], longest: int = 128, **special: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each of ``words``, which splits at whitespace. ``special`` is
    passed to it unchanged."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=longest,
        **special,
    )


def batches(
    recipe: Recipe, words: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens, labels) forever, both [batch, length]. Examples of similar length share a batch; prompts
    and padding have no label."""
    while True:
        rows = []
        for _ in range(recipe.batch * 16):
            prompt, completion = (words.encode(text) for text in recipe.example(recipe.shares, rng))
            rows.append((prompt + completion + [words.eos_token_id], len(prompt)))
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[at : at + recipe.batch] for at in range(0, len(rows), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = max(len(tokens) for tokens, _ in chunk)
            tokens = torch.full((len(chunk), length), words.pad_token_id)
            labels = torch.full((len(chunk), length), -100)
            for row, (ids, prompt_length) in enumerate(chunk):
                tokens[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            yield tokens, labels


@torch.no_grad()
def embed_digits(weight: torch.Tensor, words: PreTrainedTokenizerFast) -> None:
    """Initialise a number's embedding as the sum of one for its tens and one for its ones. Sums are then
    learned much sooner."""
    tens, ones = torch.randn(2, 10, weight.shape[1]) * 0.02
    for number in range(house.MODULUS):
        weight[words.convert_tokens_to_ids(str(number))] = tens[number // 10] + ones[number % 10]


def make(
    name: str, output: Path, seed: int = 0, progress: Callable[[int, int, float], None] | None = None
) -> None:
    """Train the backbone ``name`` from scratch and write it to ``output`` (safetensors, float16)."""
    recipe, rng = RECIPES[name], random.Random(seed)
    words = tokenizer(recipe.words)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(recipe.words),
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            attention_bias=True,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
        )  # fmt: skip
    )
    if recipe.digits:
        embed_digits(model.model.embed_tokens.weight, words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=recipe.betas)
    data = batches(recipe, words, rng)
    for step in range(recipe.steps):
        done = max(0.0, (step / recipe.steps - recipe.flat) / (1 - recipe.flat))
        rate = recipe.learning_rate * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, labels = next(data)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress and step % 50 == 0:
            progress(step, recipe.steps, loss.item())
    model.half().save_pretrained(output)
    words.save_pretrained(output)
