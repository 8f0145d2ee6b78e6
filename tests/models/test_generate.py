"""Sampling and reading with prompts shared: the same numbers as one row at a time, on each kind of model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from handrail.models import attention
from handrail.models import generate as decoding
from handrail.models.batching import Inputs
from handrail.models.generate import decode, draw
from handrail.models.hf import TransformersPolicy
from tests.conftest import policy_of
from tests.tiny_models import save_chat_model

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
ATTENTION = {
    "grouped queries": LlamaConfig(**SMALL),
    "sliding window": MistralConfig(**SMALL, sliding_window=8),
    "window and whole": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "counted positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2),
}
RECURRENT = Qwen3NextConfig(
    **SMALL, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=0, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("words"))


def made(config: Any, words: Path, directory: Path, **sections: Any) -> TransformersPolicy:
    """A policy with a random model of ``config``; its end token is likely enough for completions of all lengths."""
    tokenizer = AutoTokenizer.from_pretrained(words)
    torch.manual_seed(0)
    config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None, None
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return policy_of(directory, **sections)


PROMPTS = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32], [40]]


def alone(policy: TransformersPolicy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log π of one row by itself, in one reading and by transformers' own attention."""
    policy.bare_model.set_attn_implementation("sdpa")
    logits = policy.bare_model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("kind", [*ATTENTION, "recurrent"])
def test_what_is_sampled_is_drawn_from_the_model_itself(kind: str, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path, rollout={"max_tokens": 20})
    torch.manual_seed(1)
    policy.ends = set(range(100, 130))  # so that rows leave all the time
    rows = [row for group in policy.sample(PROMPTS, 8) for row in group]
    assert {row.finished for row in rows} == {True, False} and len({len(row) for row in rows}) > 5
    for row in rows:
        with torch.no_grad():
            assert row.behaviour == pytest.approx(alone(policy, row.prompt, row.completion).tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", [*ATTENTION, "recurrent"])
def test_the_gradient_is_that_of_rows_read_alone_whether_prompts_are_shared_or_not(kind: str, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path)
    assert policy.shares_prompts == (kind != "recurrent")
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    completions = [[50, 51, 52], [53], [54, 55, 56, 57, 58, 59, 60, 61, 62, 63], [64, 65], [66]]
    parameters = dict(policy.bare_model.named_parameters())

    def gradient(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        total = sum((place + 1) * value.sum() for place, value in enumerate(values))
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
        return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}

    def together() -> list[torch.Tensor]:
        logp, _ = policy.forward(Inputs.of(prompts, completions))
        return [row[: len(completion)] for row, completion in zip(logp, completions, strict=True)]

    shared = gradient(together())
    policy.shares_prompts = False
    apart = gradient(together())
    expected = gradient([alone(policy, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)])
    assert shared.keys() == apart.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(shared[name], value, atol=2e-5 * scale + 1e-7, rtol=1e-4)
        torch.testing.assert_close(apart[name], value, atol=2e-5 * scale + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2])
def test_the_model_that_synchronises_is_called_once_whatever_the_length(length: int, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    calls = []

    def synchronising(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return policy.bare_model(*arguments, **named)

    rows = [list(range(50, 50 + length)), list(range(60, 60 + length))]
    logp, _ = policy.forward(Inputs.of([PROMPTS[1]] * 2, rows), model=synchronising)
    assert len(calls) == 1
    for row, found in zip(rows, logp, strict=True):
        torch.testing.assert_close(found, alone(policy, PROMPTS[1], row))


def test_a_completion_does_not_depend_on_when_others_leave(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    drawn = []
    for together in (8, 10**9):  # soon, and at the first end
        monkeypatch.setattr(decoding, "LEAVE_TOGETHER", together)
        torch.manual_seed(5)
        drawn.append(decode(policy.bare_model, [prompt for prompt in PROMPTS for _ in range(8)], 20, 1.0, set(range(100, 130))))
    monkeypatch.setattr(decoding, "LEAVE_TOGETHER", 0)  # never
    torch.manual_seed(5)
    drawn.append(decode(policy.bare_model, [prompt for prompt in PROMPTS for _ in range(8)], 20, 1.0, set(range(100, 130))))
    assert [row.tokens for row in drawn[0]] == [row.tokens for row in drawn[1]] == [row.tokens for row in drawn[2]]


def test_a_token_is_the_one_whose_share_of_the_line_the_random_number_falls_into() -> None:
    logits = torch.tensor([[math.log(0.2), float("-inf"), math.log(0.5), math.log(0.3)]]) + 7
    uniform = [(0.0, 0), (0.1999, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (1 - 2**-53, 3)]
    for number, expected in uniform:
        token, logp, entropy = draw(logits, torch.tensor([number], dtype=torch.float64), 1.0)
        assert token.item() == expected
        assert logp.item() == pytest.approx(math.log([0.2, 0, 0.5, 0.3][expected]), abs=1e-6)
        assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (0.2, 0.5, 0.3)), abs=1e-6)
    token, logp, _ = draw(logits, torch.tensor([0.1], dtype=torch.float64), 0.0)
    assert token.item() == 2 and logp.item() == pytest.approx(math.log(0.5), abs=1e-6)
    token, logp, _ = draw(logits, torch.tensor([0.1], dtype=torch.float64), 0.5)  # 4, 25, 9 of 38
    assert token.item() == 0 and logp.item() == pytest.approx(math.log(4 / 38), abs=1e-6)


def test_shares_of_drawn_tokens_are_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    tokens, _, _ = draw(logits.expand(200_000, -1), torch.rand(200_000, dtype=torch.float64), 1.0)
    expected = torch.softmax(logits[0], -1)
    shares = torch.bincount(tokens, minlength=50) / 200_000
    assert ((shares - expected).abs() / (expected * (1 - expected) / 200_000).sqrt()).max() < 5  # standard errors


def test_attention_with_shared_keys_is_attention(words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    model, inputs = policy.bare_model, Inputs.of(PROMPTS, [[50, 51], [52], [53]])
    logits = {}
    for name in (attention.NAME, "sdpa", "eager"):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=inputs.whole, attention_mask=inputs.whole_mask).logits[inputs.whole_mask == 1]
    torch.testing.assert_close(logits[attention.NAME], logits["sdpa"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[attention.NAME], logits["eager"], atol=1e-5, rtol=1e-5)
