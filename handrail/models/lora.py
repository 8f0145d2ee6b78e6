"""LoRA through peft: small added matrices are trained, the model's own weights stay frozen.

Few runs need peft, which takes long to import, so the functions import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from handrail._util.errors import UserError
from handrail._util.seeds import derive
from handrail.models.config import LoraConfig
from handrail.models.loading import ADAPTER_WEIGHTS


def with_adapter(model: Any, config: LoraConfig, base: str, seed: int) -> Any:
    """Add new float32 adapters to ``model``, initialized from ``seed``.

    Raises UserError if ``lora.targets`` names no layer, or a layer with tied weights: merging the adapter
    would change both layers.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(derive(seed, "lora") % 2**32)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets = {config.targets!r}: {str(error).splitlines()[0]}") from error
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in tied:
            raise UserError(
                f"lora.targets = {config.targets!r}: {name} shares its weights with another layer; "
                "leave it out"
            )
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def load_adapter(model: Any, directory: Path) -> None:
    """Load the adapter weights that ``save_pretrained`` wrote.

    Raises UserError if they do not fit the layers.
    """
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, load_file(directory / ADAPTER_WEIGHTS))
    except RuntimeError as error:
        raise UserError(
            f"{directory} holds an adapter of another shape; resume with the run's own [lora]"
        ) from error
    if result.unexpected_keys:
        raise UserError(f"{directory} holds an adapter of other layers; resume with the run's own [lora]")


def merge_weights(base: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each of the model's own tensors with its adapter merged in; ``base`` stays
    unchanged."""
    from peft.tuners.lora import LoraLayer

    changed = {
        f"{name}.base_layer.weight": layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for name, value in base.state_dict().items():
        if name in changed:
            (adapter,) = changed[name].active_adapters
            yield (
                name.replace(".base_layer.", "."),
                value + changed[name].get_delta_weight(adapter).to(value.dtype),
            )
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value
