"""Models that tests make for themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_chat_model(directory: Path, context: int = 256) -> Path:
    """A tiny random model of any text, with a chat template, whose padding token is its end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["what is two and three"] * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=context, initializer_range=0.2, eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
            bos_token_id=None,
        )
    )  # fmt: skip
    model.lm_head.weight.data[words.eos_token_id] *= 3  # so that some completions end early
    # A model's own defaults must not decide how it is sampled.
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=3.0, eos_token_id=words.eos_token_id)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
