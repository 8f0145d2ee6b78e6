"""Tiny models that tests create."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_chat_model(
    directory: Path,
    context: int = 256,
    hidden_size: int = 32,
    special: Sequence[str] = (),
    template: str = TEMPLATE,
) -> Path:
    """Save a tiny random model that accepts any text, with a chat template; its padding token is its end
    token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["what is two and three"] * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.lm_head.weight.data[words.eos_token_id] *= 3  # so that some completions end early
    # A model's own generation defaults must not affect sampling.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=3.0, eos_token_id=words.eos_token_id
    )
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def save_gguf(directory: Path, file: Path) -> Path:
    """Write a Llama model's directory as one GGUF file of plain float32 tensors, in llama.cpp's layout."""
    from gguf import GGUFWriter, TokenType

    model, words = LlamaForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    core = json.loads(words.backend_tokenizer.to_str())
    special = {token["id"] for token in core["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words.convert_ids_to_tokens(range(len(words))))
    writer.add_token_types(
        [TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(len(words))]
    )
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_bos_token_id(words.eos_token_id)
    writer.add_chat_template(words.chat_template)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        ours = name.removesuffix(".weight")
        theirs = names.get(ours) or "blk.{}.{}".format(ours.split(".")[2], names[ours.split(".", 3)[3]])
        # llama.cpp rotates adjacent pairs, transformers rotates halves
        if theirs.endswith(("attn_q", "attn_k")):
            heads = c.num_attention_heads if theirs.endswith("q") else c.num_key_value_heads
            value = (
                value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
            )
        writer.add_tensor(f"{theirs}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
