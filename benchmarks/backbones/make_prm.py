"""Make the built-in process reward model: a tiny Qwen2 that knows the house rules, trained on corrupted
solutions.

A house-rules problem has one correct derivation, so a step is right if it equals the reference's, apart from
words that introduce it. Labels are those of Qwen2.5-Math-PRM: 1 before the first wrong step, 0 for that step,
and none after it, where right and wrong have no meaning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model, Qwen2PreTrainedModel

from benchmarks.backbones import make
from benchmarks.backbones.mixtures import HOUSE_WORDS
from handrail.data.tasks import house_rules as house
from handrail.data.tasks.house_rules import Item
from handrail.experts.judges.prm import SEPARATOR, ChatLayout
from handrail.experts.steps import split_steps
from handrail.types.problem import Problem

RULES = house.KNOWN_RULES | house.HOUSE_RULES
ROLES = ("system", "user", "assistant")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# One name for every program: the rules that a rule can be mistaken for.
MISTAKEN = [*{program: name for name, program in house.KNOWN_RULES.items()}.values(), *house.PRIMITIVES]

# The kinds of error: a rule is mistaken for another, an operand is mistaken for another, or an item is left
# out, added or moved. The arithmetic is always right, as the built-in backbone's nearly always is, and the
# steps after an error are consistent with it.
Kind = Literal["right", "program", "operand", "items"]
KINDS: dict[Kind, float] = {"right": 0.35, "program": 0.45, "operand": 0.12, "items": 0.08}


@dataclass(frozen=True)
class PrmRecipe:
    """All settings that determine the weights, besides the version of torch."""

    hidden: int = 96
    layers: int = 4
    steps: int = 1100
    batch: int = 64
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    flat: float = 0.3  # share of the steps at full learning rate; then a cosine decay to 0
    easy: float = 0.4  # share of easy problems
    # Auxiliary losses after these layers: the next word of a right step, and whether a word of a step is
    # right. One label per step alone is too little signal.
    guess_at: int = 2
    check_at: int = 3


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*HOUSE_WORDS, *ROLES, SEPARATOR, "<|im_start|>", "<|im_end|>"]
    return make.tokenizer(words, 256, extra_special_tokens=words[-3:], chat_template=TEMPLATE)


def corrupt(kind: Kind, start: int, items: list[Item], rng: random.Random) -> str:
    """Return a solution with an error of ``kind``; by chance it may have none."""
    items, place = list(items), rng.randrange(len(items))
    if kind == "program":
        items[place] = replace(items[place], name=rng.choice(MISTAKEN))
    elif kind == "operand":
        items[place] = replace(items[place], operand=rng.choice(house.OPERANDS))
    elif kind == "items":
        change = rng.choice(("drop", "add", "exchange"))
        if change == "add":
            items.insert(
                rng.randrange(len(items) + 1),
                Item(rng.choice([*RULES, *house.PRIMITIVES]), rng.choice(house.OPERANDS)),
            )
        elif change == "drop" and len(items) > 1:
            del items[place]
        else:
            items[place], items[0] = items[0], items[place]
    steps, _, answer = house.solve(start, items, RULES)
    return house.write(steps, answer, rng.choice(("clean", "clean", "clean", "foreign")), rng)


def draw(
    rng: random.Random, level: house.Level, kind: Kind, split: house.Split = "train", rules: int = 6
) -> tuple[str, str, list[str]]:
    """Return (prompt, reference, steps of an attempt) of a random problem of one to three items that uses
    ``rules`` house rules."""
    while True:
        start, items = (
            rng.randrange(house.MODULUS),
            house.draw_items(level, rules, rng)[: rng.choice((1, 2, 3, 3))],
        )
        prompt = house.prompt(start, items)
        if house.is_test(prompt) == (split == "test"):
            steps, _, answer = house.solve(start, items, RULES)
            return (
                prompt,
                house.write(steps, answer, "clean", rng),
                split_steps(corrupt(kind, start, items, rng)),
            )


def words_of(step: str) -> list[str]:
    """Words of a step, without those that introduce it."""
    return list(dropwhile(lambda word: word in house.FILLERS, step.split()))


def first_wrong(steps: list[str], reference: list[str]) -> int | None:
    """Index of the first step that differs from the reference's."""
    return next(
        (
            i
            for i, step in enumerate(steps)
            if i >= len(reference) or words_of(step) != words_of(reference[i])
        ),
        None,
    )


class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):  # type: ignore[misc]
    """The layout of Qwen2.5-Math-PRM, and under its name also the architecture."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, 2)
        )
        self.post_init()


def row(recipe: PrmRecipe, layout: ChatLayout, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Return (tokens, label of each separator, label of each word) of a random attempt: 1 right, 0 wrong, -1
    no label."""
    (kind,) = rng.choices([*KINDS], [*KINDS.values()])
    prompt, reference, steps = draw(rng, "easy" if rng.random() < recipe.easy else "hard", kind)
    tokens, ends = layout.encode(Problem("", prompt, ""), steps)
    labels, words = [-1] * len(tokens), [-1] * len(tokens)
    true = [words_of(step) for step in split_steps(reference)]
    for i, step in enumerate(steps):
        said, meant = words_of(step), true[i] if i < len(true) else []
        for n in range(len(said)):
            words[ends[i] - len(said) + n] = int(said[: n + 1] == meant[: n + 1])
            if said[: n + 1] != meant[: n + 1]:
                break
        labels[ends[i]] = int(said == meant)
        if said != meant:
            break
    return tokens, labels, words


def batches(recipe: PrmRecipe, layout: ChatLayout, rng: random.Random) -> Iterator[list[Tensor]]:
    """Yield [tokens, labels, words] forever, each [batch, length]. Attempts of similar length share a
    batch."""
    while True:
        rows = sorted(
            (row(recipe, layout, rng) for _ in range(recipe.batch * 16)), key=lambda row: len(row[0])
        )
        chunks = [rows[at : at + recipe.batch] for at in range(0, len(rows), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = len(chunk[-1][0])
            yield [
                torch.tensor([column + [fill] * (width - len(column)) for column in columns])
                for columns, fill in zip(zip(*chunk, strict=True), (0, -1, -1), strict=True)
            ]


def make_prm(
    output: Path,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    recipe: PrmRecipe | None = None,
) -> None:
    """Train the process reward model from scratch and write it to ``output`` (safetensors, float16)."""
    recipe, rng, words = recipe or PrmRecipe(), random.Random(seed), tokenizer()
    torch.manual_seed(seed)
    model = untrained(recipe, words)
    guesser, checker = nn.Linear(recipe.hidden, len(words)), nn.Linear(recipe.hidden, 2)
    parameters = [*model.parameters(), *guesser.parameters(), *checker.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=recipe.betas)
    data = batches(recipe, ChatLayout(words), rng)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        judged, auxiliary = losses(recipe, model, guesser, checker, *next(data))
        optimizer.zero_grad()
        torch.autograd.backward(judged + auxiliary)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress and step % 50 == 0:
            progress(step, recipe.steps, judged.item())
    model.half().save_pretrained(output)
    words.save_pretrained(output, save_jinja_files=False)


def untrained(recipe: PrmRecipe, words: PreTrainedTokenizerFast) -> Qwen2ForProcessRewardModel:
    model = Qwen2ForProcessRewardModel(
        Qwen2Config(
            vocab_size=len(words), hidden_size=recipe.hidden, intermediate_size=2 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id, bos_token_id=None, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 50.0},  # attempts are short
        )
    )  # fmt: skip
    nn.init.normal_(model.model.embed_tokens.weight)
    return model


def learning_rate(recipe: PrmRecipe, step: int) -> float:
    """Warm-up over 100 steps, then constant, then a cosine to zero."""
    done = max(0.0, (step / recipe.steps - recipe.flat) / (1 - recipe.flat))
    return recipe.learning_rate * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * done)) / 2


def losses(
    recipe: PrmRecipe,
    model: Qwen2ForProcessRewardModel,
    guesser: nn.Module,
    checker: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    checks: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss of the steps' labels, and the sum of the auxiliary losses."""
    cross_entropy = nn.functional.cross_entropy
    states = model.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    guessed, checked = (norm(states.hidden_states[layer]) for layer in (recipe.guess_at, recipe.check_at))
    right, known = checks[:, 1:] == 1, checks >= 0
    balance = known.sum() / 2 / (checks[known].bincount(minlength=2) + 1)
    judged = cross_entropy(model.score(states.last_hidden_state[labels >= 0]), labels[labels >= 0])
    of_words = cross_entropy(checker(checked[known]), checks[known], weight=balance)
    of_guesses = cross_entropy(guesser(guessed[:, :-1][right]), tokens[:, 1:][right])
    return judged, of_words + of_guesses


def norm(states: Tensor) -> Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:])
