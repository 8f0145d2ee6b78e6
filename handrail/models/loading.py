"""Loading models and tokenizers from directories, the hub, GGUF files and adapters; no pickles."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from handrail._util.errors import UserError
from handrail._util.hub import look_up
from handrail._util.memory import enough_memory
from handrail.models.builtin import locate
from handrail.models.config import ModelConfig

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which every tokenizer has at least one."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_model(
    config: ModelConfig, field: str = "model.path", dtype: str = "float32", empty: bool = False
) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a directory, a hub name, a GGUF file, an adapter's directory or
    ``builtin:NAME``.

    An adapter is merged into its base model. ``empty``: True for weights on the meta device, which take no
    memory, if the path is that of a plain model. Raises UserError, naming ``field``, if the model cannot be
    loaded.
    """
    path = Path(locate(config.path, field))
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", ADAPTER)):
        hint = f"; did you mean {path / 'model'}?" if (path / "model").is_dir() else ""
        raise UserError(
            f"{field}: {config.path} is not a Hugging Face model directory (it has no config.json){hint}"
        )
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise UserError(f"{field}: there is no file {config.path}")
    if not path.exists():
        look_up(str(path), "model", field)
    try:
        with enough_memory("load"):
            load = _loader(path)
            load = partial(_from_directory, empty=True) if empty and load is _from_directory else load
            model, tokenizer = load(config, dtype, field)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        lines = (str(error).strip() or repr(error)).splitlines()
        first_line = " ".join(lines) if lines[0].rstrip().endswith(":") else lines[0]
        missing = "" if path.exists() else "; there is no directory of that name either"
        raise UserError(
            f"{field}: {config.path} cannot be loaded as a causal language model: {first_line}{missing}"
        ) from error
    if any("RewardModel" in name for name in model.config.architectures or []):
        raise UserError(f"{field}: {config.path} is a reward model, not a causal language model")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{field}: the tokenizer of {config.path} has no end-of-sequence token, so no completion "
            "could end"
        )
    return model, tokenizer


def _loader(path: Path) -> Callable[[ModelConfig, str, str], tuple[Any, Any]]:
    if path.suffix.lower() == ".gguf":
        return _from_gguf
    return _from_adapter if (path / ADAPTER).is_file() else _from_directory


def _from_directory(config: ModelConfig, dtype: str, field: str, empty: bool = False) -> tuple[Any, Any]:
    path, trusted = locate(config.path), config.trust_remote_code
    if Path(path).is_dir():
        AutoConfig.from_pretrained(path, trust_remote_code=trusted)  # first, as the others need it
        _require_files(Path(path))
    attention = None if config.attention == "auto" else config.attention
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    if empty:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, trust_remote_code=trusted, attn_implementation=attention
            )
        with suppress(OSError):  # without that file, it follows from the model's settings
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model.eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=trusted, attn_implementation=attention
    )
    return model, tokenizer


def _require_files(directory: Path) -> None:
    """Raise FileNotFoundError if a model's directory has no tokenizer or no weights that can be read."""
    if not any(found for pattern in TOKENIZERS for found in directory.glob(pattern)):
        raise FileNotFoundError(
            "it has no tokenizer (tokenizer.json); copy the files of the tokenizer that the model was "
            "trained with"
        )
    if any(directory.glob("*.safetensors")):
        return
    if pickles := sorted(directory.glob("*.bin")):
        raise FileNotFoundError(
            f"its weights are a pickle, {pickles[0].name}, which could run any code; save them as safetensors"
        )
    raise FileNotFoundError("it has no weights (model.safetensors); complete the download or the copy")


def _from_gguf(config: ModelConfig, dtype: str, field: str) -> tuple[Any, Any]:
    """Load a GGUF file, dequantized so that the weights can be trained and saved."""
    file = Path(locate(config.path))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    plain = copy.deepcopy(read.config)
    del plain.quantization_config
    attention = None if config.attention == "auto" else config.attention
    model = AutoModelForCausalLM.from_config(plain, dtype=dtype, attn_implementation=attention)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def _from_adapter(config: ModelConfig, dtype: str, field: str) -> tuple[Any, Any]:
    from peft import PeftModel

    directory = Path(locate(config.path))
    if not (directory / ADAPTER_WEIGHTS).is_file():  # peft would fall back to a pickle
        raise UserError(
            f"{field}: the adapter {config.path} has no {ADAPTER_WEIGHTS}; save it as safetensors"
        )
    changes = {"path": base_of(directory, field)}
    model, tokenizer = load_model(
        config.model_copy(update=changes), f"{field}: the adapter {config.path} needs its model", dtype
    )
    if (directory / "tokenizer_config.json").is_file():  # peft itself does not write one
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    return PeftModel.from_pretrained(model, directory).merge_and_unload(), tokenizer


def base_of(adapter: Path, field: str) -> str:
    """Find an adapter's base model: a path or a hub name.

    Raises UserError, naming ``field``, if the path does not exist.
    """
    named = str(json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
    # A relative path starts at the adapter or here; joining leaves an absolute one unchanged.
    for path in (adapter / named, Path(named)):
        if path.exists():
            return str(path)
    if not HUB_NAME.fullmatch(named):
        raise UserError(
            f"{field}: the adapter {adapter} was trained on {named}, which does not exist; set "
            f"base_model_name_or_path in {adapter / ADAPTER} to where that model is now"
        )
    return named


def savable(model: Any) -> Any:
    """Return ``model``, which transformers would otherwise refuse to save if it sets a temperature without
    do_sample, as some published models do."""
    model.generation_config.do_sample = True
    return model


def absolute(path: str) -> str:
    """Make a model's path independent of the working directory; a hub name stays as it is."""
    located = locate(path)
    return os.path.abspath(located) if Path(located).exists() else located
