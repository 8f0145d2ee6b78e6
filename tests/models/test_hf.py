"""The Hugging Face policy on a tiny chat model whose padding token is its end token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from handrail import UserError
from handrail.models.hf import TransformersPolicy
from handrail.training.lengths import split_by_length
from handrail.training.policies import load_policy
from handrail.types.problem import Problem
from handrail.types.trajectory import Author
from tests.conftest import config, policy_of
from tests.tiny_models import TEMPLATE, save_chat_model

PROBLEM = Problem("p", "What is 2 + 3?", "5", ("2 + 3 = 5",))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def seen(policy: TransformersPolicy, problem: Problem, plan: str | None = None) -> str:
    return str(policy.tokenizer.decode(policy.renderer.prompt(problem, plan)))


def test_a_text_prompt_is_a_users_message_and_the_assistants_turn_is_opened(chat_model: Path) -> None:
    assert seen(policy_of(chat_model), PROBLEM) == "<|user|>What is 2 + 3?<|end|><|assistant|>"


def test_the_template_wraps_the_prompt_within_the_users_message(chat_model: Path) -> None:
    policy = policy_of(chat_model, data={"prompt_template": "Q: {prompt} A:"})
    assert seen(policy, PROBLEM) == "<|user|>Q: What is 2 + 3? A:<|end|><|assistant|>"


def test_chat_can_be_turned_off(chat_model: Path) -> None:
    assert seen(policy_of(chat_model, data={"chat": False}), PROBLEM) == "What is 2 + 3?"


def test_the_system_message_comes_first_unless_the_data_has_its_own(chat_model: Path) -> None:
    policy = policy_of(chat_model, data={"system": "Be brief."})
    assert seen(policy, PROBLEM) == "<|system|>Be brief.<|end|><|user|>What is 2 + 3?<|end|><|assistant|>"
    own = Problem("p", [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 3?"}], "5")
    assert seen(policy, own) == "<|system|>Think.<|end|><|user|>2 + 3?<|end|><|assistant|>"


def test_the_plan_is_in_the_users_last_message(chat_model: Path) -> None:
    policy = policy_of(chat_model)
    assert (
        seen(policy, PROBLEM, "add {prompt}")
        == "<|user|>What is 2 + 3?\n\nPlan:\nadd {prompt}<|end|><|assistant|>"
    )
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2 + 3?"},
    ]
    chat = "<|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>2 + 3?\n\nPlan:\nadd<|end|><|assistant|>"
    assert seen(policy, Problem("p", turns, "5"), "add") == chat
    assert turns[-1]["content"] == "2 + 3?"


def test_a_reference_ends_in_the_end_token(chat_model: Path) -> None:
    policy = policy_of(chat_model)
    tokens = policy.renderer.completion("2 + 3 = 5")
    assert tokens[-1] == policy.tokenizer.eos_token_id and tokens.count(policy.tokenizer.eos_token_id) == 1
    assert policy.tokenizer.decode(tokens) == "2 + 3 = 5<|end|>"


@pytest.mark.parametrize("closing", ["", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"])
def test_a_turn_ends_with_the_templates_end_token_and_not_the_tokenizers(
    closing: str, chat_model: Path, tmp_path: Path
) -> None:
    model, words = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    turn_end, words.eos_token = words.eos_token_id, "<|system|>"
    words.chat_template += closing
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    policy = policy_of(tmp_path, rollout={"max_tokens": 24})
    assert policy.renderer.end == turn_end and policy.renderer.ends == {turn_end, words.eos_token_id}
    assert turn_end in {
        row.tokens[-1] for row in policy.generate(prompts(policy)[:1] * 32, range(32)) if row.finished
    }


def prompts(policy: TransformersPolicy) -> list[list[int]]:
    return [
        policy.renderer.prompt(Problem("p", text, ""))
        for text in ("2?", "What is 2 + 3?", "what is two and three and three and two?")
    ]


def test_sampled_completions_stop_at_their_first_end_token(chat_model: Path) -> None:
    policy = policy_of(chat_model, rollout={"max_tokens": 24, "batch_size": 7})
    asked = [prompt for prompt in prompts(policy) for _ in range(16)]
    rows = policy.generate(asked, range(48))
    end = policy.tokenizer.eos_token_id
    assert [row.prompt_ids for row in rows] == asked
    assert {row.finished for row in rows} == {True, False}
    for row in rows:
        assert (end in row.tokens) == row.finished and end not in row.tokens[:-1]
        assert row.finished or len(row) == 24
        assert row.author.tolist() == [Author.POLICY] * len(row)
        for name in ("sampling_logp", "old_logp", "entropy"):
            assert row.columns[name].shape == (len(row),) and row.columns[name].isfinite().all()
        assert torch.equal(row.columns["old_logp"], row.columns["sampling_logp"])
        assert row.text == policy.tokenizer.decode(row.tokens[: -1 if row.finished else None])


def test_every_end_token_of_the_generation_config_ends_a_completion(chat_model: Path, tmp_path: Path) -> None:
    model, words = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    other = words.convert_tokens_to_ids("<|user|>")
    model.generation_config.eos_token_id = [words.eos_token_id, other]
    model.lm_head.weight.data[other] = model.lm_head.weight.data[words.eos_token_id]
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    policy = policy_of(tmp_path, rollout={"max_tokens": 24})
    rows = policy.generate(prompts(policy)[:1] * 64, range(64))
    assert {row.tokens[-1] for row in rows if row.finished} == {words.eos_token_id, other}
    assert not any({words.eos_token_id, other} & set(row.tokens[:-1]) for row in rows)


def plain(policy: TransformersPolicy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return log π of a single row, without padding."""
    logits = (
        policy.bare_model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        / policy.temperature
    )
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0].detach()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_scores_do_not_depend_on_padding(chat_model: Path, temperature: float, budget: int) -> None:
    policy = policy_of(chat_model, rollout={"temperature": temperature}, train={"micro_batch_tokens": budget})
    before = prompts(policy)
    after = [
        policy.renderer.completion(text)
        for text in ("2 + 3 = 5, so it is five", "5", "two and three is five")
    ]
    for prompt, completion, scored in zip(before, after, policy.score(before, after), strict=True):
        torch.testing.assert_close(scored, plain(policy, prompt, completion), atol=1e-4, rtol=1e-4)


def test_padding_does_not_shift_the_positions_of_a_model_that_counts_them(
    chat_model: Path, tmp_path: Path
) -> None:
    words = AutoTokenizer.from_pretrained(chat_model)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "initializer_range": 0.5}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(words), eos_token_id=words.eos_token_id, **sizes)
    ).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    policy = policy_of(tmp_path, rollout={"max_tokens": 8})
    rows = policy.generate(prompts(policy) * 2, range(6))
    for row, scored in zip(
        rows, policy.score([row.prompt_ids for row in rows], [row.token_ids for row in rows]), strict=True
    ):
        torch.testing.assert_close(scored, plain(policy, row.prompt_ids, row.tokens), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scored, row.column("sampling_logp"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_scores_equal_the_log_probabilities_of_sampling(chat_model: Path, temperature: float) -> None:
    policy = policy_of(chat_model, rollout={"temperature": temperature, "max_tokens": 12})
    rows = policy.generate(prompts(policy) * 4, range(12))
    assert len({tuple(row.tokens) for row in rows}) > 3  # the model's own top_k = 1 would change the samples
    for row, scored in zip(
        rows, policy.score([row.prompt_ids for row in rows], [row.token_ids for row in rows]), strict=True
    ):
        torch.testing.assert_close(scored, row.column("sampling_logp"), atol=1e-4, rtol=0)


def test_tokens_are_sampled_at_the_temperature(chat_model: Path) -> None:
    policy = policy_of(chat_model, rollout={"temperature": 0.5, "max_tokens": 1, "batch_size": 4096})
    prompt = prompts(policy)[1]
    rows = policy.generate([prompt] * 4096, range(4096))
    probabilities = torch.softmax(policy.bare_model(torch.tensor([prompt])).logits[0, -1].detach() / 0.5, -1)
    shares = torch.bincount(torch.cat([row.token_ids for row in rows]), minlength=len(probabilities)) / len(
        rows
    )
    assert (shares - probabilities).abs().max() < 0.04  # five standard errors at most
    assert rows[0].columns["entropy"].item() == pytest.approx(
        -(probabilities * probabilities.log()).sum().item(), abs=1e-3
    )


def test_a_saved_model_loads_with_equal_weights_and_its_own_generation_defaults(
    chat_model: Path, tmp_path: Path
) -> None:
    policy = policy_of(chat_model)
    with torch.no_grad():
        next(policy.bare_model.parameters()).add_(1)
    policy.save(tmp_path)
    loaded, mine = AutoModelForCausalLM.from_pretrained(tmp_path), policy.bare_model.state_dict()
    assert loaded.state_dict().keys() == mine.keys()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())
    assert loaded.generation_config.repetition_penalty == 3.0
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


CHAT = Problem("p", [{"role": "user", "content": "2 + 3?"}], "5", where="chat.jsonl, line 3")


def test_chat_messages_need_a_chat_template() -> None:
    with pytest.raises(
        UserError,
        match=(
            "chat.jsonl, line 3, field prompt: it is chat messages, but builtin:house-tiny has no chat "
            "template"
        ),
    ):
        load_policy(config(), Accelerator(cpu=True)).renderer.prompt(CHAT)
    with pytest.raises(
        UserError, match="data.chat is on, but the tokenizer of builtin:house-tiny has no chat template"
    ):
        load_policy(config(data={"chat": True}), Accelerator(cpu=True))


def test_chat_messages_are_refused_if_chat_is_off(chat_model: Path) -> None:
    with pytest.raises(UserError, match="field prompt: it is chat messages, but data.chat is off"):
        policy_of(chat_model, data={"chat": False}).renderer.prompt(CHAT)


def test_a_template_that_refuses_the_messages_is_a_user_error(chat_model: Path) -> None:
    policy = policy_of(chat_model, data={"system": "Be brief."})
    policy.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="chat.jsonl, line 3, field prompt: .*System role not supported"):
        policy.renderer.prompt(CHAT)


def test_prompts_are_checked_even_if_the_model_has_no_context_length(chat_model: Path) -> None:
    policy = policy_of(chat_model, data={"chat": False})
    policy.bare_model.config.max_position_embeddings = 0
    with pytest.raises(UserError, match="chat.jsonl, line 3, field prompt"):
        split_by_length(policy, [PROBLEM, CHAT])
