"""Log-probabilities in chunks: the same numbers and gradients as from all logits, in less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from handrail.models import head
from handrail.models.head import ChunkedLogProbs, from_logits, log_probs
from handrail.models.hf import TransformersPolicy
from tests.conftest import config, policy_of
from tests.tiny_models import save_chat_model
from tests.training.test_golden import GOLDEN, ScriptedGrpo, curve

Found = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(head, "CHUNK", size)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def test_a_distribution_by_hand(chunk: Callable[[int], None]) -> None:
    chunk(1)  # p = 1/8, 1/4, 5/8
    hidden = torch.tensor([[log(1), log(2), log(5)]] * 2, requires_grad=True)
    logp, entropy = log_probs(hidden, linear(torch.eye(3)), torch.tensor([[2, 0], [1, 1]]), with_entropy=True)
    assert entropy is not None
    expected = torch.tensor([[log(5 / 8), log(1 / 8)], [log(1 / 4), log(1 / 4)]])
    torch.testing.assert_close(logp, expected)
    assert entropy.tolist() == pytest.approx([0.9002561] * 2)  # 3/8·ln 2 + 1/2·ln 2 + 5/8·ln 8/5
    (logp * torch.tensor([[1.0, 0.0], [2.0, 3.0]])).sum().backward()
    # e_2 − p, and 5·(e_1 − p)
    expected = torch.tensor([[-1 / 8, -1 / 4, 3 / 8], [-5 / 8, 15 / 4, -25 / 8]])
    torch.testing.assert_close(hidden.grad, expected)


def found(dtype: torch.dtype, with_entropy: bool, limit: int, temperature: float = 0.7) -> Found:
    """Log-probabilities, entropies and both gradients of 37 positions with three targets each."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64).to(dtype).requires_grad_()
    weight, targets = torch.randn(101, 16, dtype=torch.float64), torch.randint(101, (37, 3))
    targets[3] = 5  # the same target three times
    of_logp, of_entropy = torch.randn(37, 3, dtype=torch.float64), torch.randn(37, dtype=torch.float64)
    layer = linear(weight.to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK", limit)
        logp, entropy = log_probs(hidden, layer, targets, temperature, with_entropy)
        loss = (logp * of_logp).sum() + (0 if entropy is None else (entropy * of_entropy).sum())
        torch.as_tensor(loss).backward()
    spread = logp.new_zeros(()) if entropy is None else entropy.detach()
    return logp.detach(), spread, torch.as_tensor(hidden.grad), torch.as_tensor(layer.weight.grad)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("limit", [1, 101 * 10, 101 * 36])
def test_chunks_equal_all_logits_at_once(with_entropy: bool, limit: int) -> None:
    plain = found(torch.float64, with_entropy, 10**9)
    for exact, other in zip(plain, found(torch.float64, with_entropy, limit), strict=True):
        torch.testing.assert_close(other, exact, rtol=1e-12, atol=1e-12)
    for exact, other in zip(plain, found(torch.float32, with_entropy, limit), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(chunk: Callable[[int], None]) -> None:
    chunk(20)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    targets = torch.randint(7, (5, 2))

    def compute(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = ChunkedLogProbs.apply(
            hidden, weight, targets, 1.3, True, torch.float64, False
        )
        return out

    assert torch.autograd.gradcheck(compute, (hidden.requires_grad_(), weight.requires_grad_()))


def test_bfloat16_keeps_float32_sums_and_gradients(chunk: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    layer, targets = linear(torch.randn(50, 64) / 8), torch.randint(50, (512, 1))
    hidden = torch.randn(512, 64, requires_grad=True)
    seen: list[list[Tensor]] = []
    for limit, dtype in ((10**9, torch.float32), (10**9, torch.bfloat16), (50 * 16, torch.bfloat16)):
        chunk(limit)
        hidden.grad = layer.weight.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logp, _ = log_probs(hidden, layer, targets)
        logp.mean().backward()
        seen.append([logp.detach(), torch.as_tensor(hidden.grad), torch.as_tensor(layer.weight.grad)])
    assert all(value.dtype == torch.float32 for value in seen[2])
    for exact, plain, chunked in zip(*seen, strict=True):
        assert (chunked - exact).norm() <= 1.1 * (plain - exact).norm()


def test_a_frozen_layer_gets_no_gradient(chunk: Callable[[int], None]) -> None:
    chunk(1)
    layer = linear(torch.eye(4)).requires_grad_(False)
    hidden = torch.ones(3, 4, requires_grad=True)
    log_probs(hidden, layer, torch.tensor([[0], [1], [2]]))[0].sum().backward()
    assert layer.weight.grad is None and hidden.grad is not None


def peak(limit: int, chunk: Callable[[int], None]) -> int:
    """Most bytes in use between the hidden states and their gradient, beyond what was there before."""
    chunk(limit)
    layer, hidden = linear(torch.zeros(4000, 16)), torch.zeros(600, 16, requires_grad=True)
    with profile(profile_memory=True) as run:
        logp, entropy = log_probs(hidden, layer, torch.zeros(600, 1, dtype=torch.long), with_entropy=True)
        (logp.sum() + torch.as_tensor(entropy).sum()).backward()
    sizes = [event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor(sizes).cumsum(0).max())


def test_the_memory_is_that_of_a_chunk(chunk: Callable[[int], None]) -> None:
    whole, chunked = (peak(limit, chunk) for limit in (10**9, 4000 * 50))
    assert whole > 3 * 4000 * 600 * 4 > 8 * chunked


@pytest.mark.parametrize("kind", ["soft-capped", "biased"])
def test_a_model_that_does_more_than_multiply_keeps_its_logits(
    kind: str, chat_model: Path, tmp_path: Path, chunk: Callable[[int], None]
) -> None:
    words = AutoTokenizer.from_pretrained(chat_model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["num_key_value_heads"] = 2
    sizes |= {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": 0}
    torch.manual_seed(0)
    if kind == "soft-capped":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=0.5))
    else:
        model = PhiForCausalLM(PhiConfig(**sizes))
        model.lm_head.bias.data.normal_()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    policy = policy_of(tmp_path)
    assert policy.head_is_last == (kind != "soft-capped")
    chunk(1)
    check(policy)


def test_an_adapter_on_the_output_layer_counts(chat_model: Path, chunk: Callable[[int], None]) -> None:
    policy = policy_of(chat_model, lora={"rank": 2, "targets": ["lm_head"]})
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    chunk(1)
    check(policy)


def check(policy: TransformersPolicy) -> None:
    """Scores are those of the model's own logits."""
    prompt, completion = [5, 6, 7], [8, 9, 10, 11]
    logits = policy.bare_model(torch.tensor([prompt + completion])).logits[:, 2:-1].flatten(0, 1)
    expected, _ = from_logits(logits.detach(), torch.tensor(completion)[:, None], 1.0, False)
    for scored in policy.score([prompt] * 2, [completion] * 2):
        torch.testing.assert_close(scored, expected[:, 0], atol=1e-5, rtol=1e-5)


def test_a_run_in_chunks_has_the_golden_curve(tmp_path: Path, chunk: Callable[[int], None]) -> None:
    chunk(500)
    golden = [json.loads(line) for line in (GOLDEN / "grpo.jsonl").read_text().splitlines()]
    for row, expected in zip(curve(ScriptedGrpo, tmp_path / "run"), golden, strict=True):
        numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=2e-3, abs=1e-6)


def test_the_built_in_models_never_need_chunks(chat_model: Path) -> None:
    policy = policy_of(Path("builtin:house-tiny"))
    assert len(policy.bare_model.lm_head.weight) * config().train.micro_batch_tokens <= head.CHUNK
