"""Sampling and scoring with shared prompts give the same numbers as one row at a time, for each kind of
model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
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
from handrail.models.batching import Inputs, Layout
from handrail.models.cached import CachedModel
from handrail.models.generate import Completion, draw, generate
from handrail.models.hf import TransformersPolicy
from tests.conftest import policy_of
from tests.tiny_models import save_chat_model
from tests.waits import Waits

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
ATTENTION = {
    "grouped queries": LlamaConfig(**SMALL),
    "sliding window": MistralConfig(**SMALL, sliding_window=8),
    "window and whole": Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "counted positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2),
}
RECURRENT = Qwen3NextConfig(
    **SMALL, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=0,
    linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("words"))


def made(config: Any, words: Path, directory: Path, **sections: Any) -> TransformersPolicy:
    """Make a policy with a random model of ``config``; its end token is likely enough for completions of all
    lengths."""
    tokenizer = AutoTokenizer.from_pretrained(words)
    torch.manual_seed(0)
    config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = (
        len(tokenizer),
        tokenizer.eos_token_id,
        None,
        None,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return policy_of(directory, **sections)


ENDS = set(range(100, 130))
"""So many that rows leave the batch all the time."""
PROMPTS = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32], [40]]


def alone(policy: TransformersPolicy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return log π of a single row, in one forward pass with transformers' own attention."""
    policy.bare_model.set_attn_implementation("sdpa")
    logits = (
        policy.bare_model(torch.tensor([prompt + completion]), use_cache=False)
        .logits[0, len(prompt) - 1 : -1]
        .float()
    )
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("kind", [*ATTENTION, "recurrent"])
def test_completions_are_sampled_from_the_models_distribution(kind: str, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path, rollout={"max_tokens": 20})
    policy.renderer.ends = ENDS
    rows = policy.generate(PROMPTS * 16, range(48))
    assert {row.finished for row in rows} == {True, False} and len({len(row) for row in rows}) > 5
    for row in rows:
        with torch.no_grad():
            torch.testing.assert_close(
                row.column("sampling_logp"), alone(policy, row.prompt_ids, row.tokens), atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("kind", [*ATTENTION, "recurrent"])
def test_the_gradient_equals_that_of_single_rows_with_and_without_shared_prompts(
    kind: str, words: Path, tmp_path: Path
) -> None:
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path)
    assert policy.layout == ("padded" if kind == "recurrent" else "packed")
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    completions = [[50, 51, 52], [53], [54, 55, 56, 57, 58, 59, 60, 61, 62, 63], [64, 65], [66]]
    parameters = dict(policy.bare_model.named_parameters())

    def gradient(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        total = sum((place + 1) * value.sum() for place, value in enumerate(values))
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
        return {name: each for name, each in zip(parameters, grads, strict=True) if each is not None}

    def together() -> list[torch.Tensor]:
        logp, _ = policy.forward(Inputs.of(prompts, completions))
        return [row[: len(completion)] for row, completion in zip(logp, completions, strict=True)]

    layouts: list[Layout] = ["padded"] if kind == "recurrent" else ["packed", "shared", "padded"]
    found = []
    for layout in layouts:
        policy.layout = layout
        found.append(gradient(together()))
    expected = gradient(
        [alone(policy, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    )
    for each in found:
        assert each.keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(each[name], value, atol=2e-5 * scale + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2])
def test_the_synchronizing_model_is_called_once_for_any_length(
    length: int, words: Path, tmp_path: Path
) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    calls = []

    class Synchronizing(torch.nn.DataParallel):  # type: ignore[type-arg]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.module = policy.bare_model

        def forward(self, *arguments: Any, **named: Any) -> Any:
            calls.append(arguments)
            return self.module(*arguments, **named)

    rows = [list(range(50, 50 + length)), list(range(60, 60 + length))]
    logp, _ = policy.forward(Inputs.of([PROMPTS[1]] * 2, rows), model=Synchronizing())
    assert len(calls) == 1
    for row, found in zip(rows, logp, strict=True):
        torch.testing.assert_close(found, alone(policy, PROMPTS[1], row))


def drawn(
    policy: TransformersPolicy, prompts: list[list[int]], seeds: Sequence[int], limits: Sequence[int]
) -> list[Completion]:
    return generate(policy.bare_model, prompts, seeds, limits, 1.0, ENDS)


def test_a_completion_does_not_depend_on_when_others_leave_the_batch(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    found = []
    for together in (8, 10**9, 0):  # after few steps, at the first end, and never
        monkeypatch.setattr("handrail.models.cached.LEAVE_TOGETHER", together)
        found.append([row.tokens.tolist() for row in drawn(policy, prompts, range(24), [20] * 24)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", [*ATTENTION, "recurrent"])
def test_a_completion_depends_only_on_its_prompt_and_its_seed(kind: str, words: Path, tmp_path: Path) -> None:
    """It does not depend on its neighbours, its place or the number of completions generated at once, so
    processes can share them in any way."""
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path, rollout={"max_tokens": 20})
    policy.renderer.ends = ENDS
    asked = [(prompt, 1000 * place + number) for place, prompt in enumerate(PROMPTS) for number in range(8)]
    whole = policy.generate([prompt for prompt, _ in asked], [seed for _, seed in asked])
    expected = dict(zip([seed for _, seed in asked], whole, strict=True))
    assert len({tuple(row.tokens) for row in whole}) > 20
    other = made(ATTENTION.get(kind, RECURRENT), words, tmp_path, rollout={"max_tokens": 20, "batch_size": 5})
    other.renderer.ends = ENDS
    parts = [
        (other, asked),
        (policy, asked[::-1]),
        (policy, asked[0::2]),
        (policy, asked[1::2]),
        *((policy, [pair]) for pair in asked),
    ]
    for sampling, part in parts:
        for (_, seed), row in zip(
            part, sampling.generate([prompt for prompt, _ in part], [seed for _, seed in part]), strict=True
        ):
            assert row.tokens == expected[seed].tokens and row.finished == expected[seed].finished
            for name in ("sampling_logp", "entropy"):
                torch.testing.assert_close(row.column(name), expected[seed].column(name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["grouped queries", "recurrent"])
def test_each_completion_has_its_own_length_limit(kind: str, words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION.get(kind, RECURRENT), words, tmp_path, rollout={"batch_size": 5})
    policy.renderer.ends = ENDS
    prompts, limits = PROMPTS * 8, [1 + 5 * number % 24 for number in range(24)]
    long = policy.generate(prompts, range(24), 24)
    cut = policy.generate(prompts, range(24), limits)
    assert sorted(limits) == list(range(1, 25)) and {row.finished for row in cut} == {True, False}
    for whole, row, limit in zip(long, cut, limits, strict=True):
        assert row.tokens == whole.tokens[:limit] and len(row.column("sampling_logp")) == len(
            row.column("entropy")
        ) == len(row)
        assert row.finished == (row.tokens[-1] in ENDS) and (row.finished or len(row) == limit)


def test_an_end_token_in_the_last_position_finishes_a_completion(words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    ended = next(
        row
        for row in drawn(policy, [PROMPTS[0]] * 24, range(24), [20] * 24)
        if row.finished and len(row.tokens) > 1
    )
    n = len(ended.tokens)
    seed = next(
        seed
        for seed in range(24)
        if drawn(policy, [PROMPTS[0]], [seed], [20])[0].tokens.tolist() == ended.tokens.tolist()
    )
    exact, short = drawn(policy, [PROMPTS[0]] * 2, [seed] * 2, [n, n - 1])
    assert exact.finished and exact.tokens.tolist() == ended.tokens.tolist()
    assert not short.finished and short.tokens.tolist() == ended.tokens.tolist()[:-1]


class Uniform(CachedModel):
    """In place of a model, the same distribution over 10 tokens at every place."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        self.logits = torch.zeros(len(prompts), 10)

    def keep(self, rows: torch.Tensor) -> None:
        self.logits = self.logits[rows]

    def follow(self, tokens: torch.Tensor) -> None: ...


def test_one_question_is_asked_of_a_gpu_per_token() -> None:
    model = SimpleNamespace(device=torch.device("cpu"))
    with Waits() as waits:
        found = generate(model, [[1]] * 6, range(6), [9, 9, 9, 9, 9, 4], 1.0, {3}, kind=Uniform)
    assert waits.count <= max(len(each.tokens) for each in found)
    for each in found[:5]:  # of nine tokens, or fewer with the end token last and nowhere else
        assert each.finished == (3 in each.tokens.tolist())
        assert 3 not in each.tokens.tolist()[:-1] and (each.finished or len(each.tokens) == 9)
    assert {each.finished for each in found} == {True, False} and len(found[5].tokens) <= 4


def test_draw_selects_tokens_by_inverse_cumulative_probability() -> None:
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


def test_frequencies_of_drawn_tokens_equal_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    tokens, _, _ = draw(logits.expand(200_000, -1), torch.rand(200_000, dtype=torch.float64), 1.0)
    expected = torch.softmax(logits[0], -1)
    shares = torch.bincount(tokens, minlength=50) / 200_000
    assert (
        (shares - expected).abs() / (expected * (1 - expected) / 200_000).sqrt()
    ).max() < 5  # standard errors


def test_attention_without_copies_equals_standard_attention(words: Path, tmp_path: Path) -> None:
    policy = made(ATTENTION["grouped queries"], words, tmp_path)
    model, inputs = policy.bare_model, Inputs.of(PROMPTS, [[50, 51], [52], [53]])
    logits = {}
    for name in (attention.NAME, "sdpa", "eager"):
        model.set_attn_implementation(name)
        logits[name] = model(input_ids=inputs.whole, attention_mask=inputs.whole_mask).logits[
            inputs.whole_mask == 1
        ]
    torch.testing.assert_close(logits[attention.NAME], logits["sdpa"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[attention.NAME], logits["eager"], atol=1e-5, rtol=1e-5)


def test_cudnn_attends_only_while_shapes_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a kernel for every new shape."""
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), shape=(2, 4, 1, 8), is_cuda=True)
    monkeypatch.setattr(attention, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(attention, "can_use_cudnn_attention", lambda params: True)
    assert not attention.shares(on_gpu, on_gpu, on_gpu, on_gpu)
    with attention.repeating():
        assert attention.shares(on_gpu, on_gpu, on_gpu, on_gpu)
    assert not attention.shares(on_gpu, on_gpu, on_gpu, on_gpu)

    allowed: list[list[SDPBackend]] = []

    def allow(kernels: list[SDPBackend]) -> nullcontext[None]:
        allowed.append(kernels)
        return nullcontext()

    monkeypatch.setattr(attention, "sdpa_kernel", allow)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **others: (on_gpu, None))
    assert attention.sdpa(None, on_gpu, on_gpu, on_gpu, None)[0] is on_gpu
    assert SDPBackend.FLASH_ATTENTION in allowed[0] and SDPBackend.CUDNN_ATTENTION not in allowed[0]
