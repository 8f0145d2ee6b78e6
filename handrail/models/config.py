"""Settings of models and of sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from handrail._util.section import Section


class ModelConfig(Section):
    """The model to train."""

    path: str
    """A Hugging Face model directory or hub name, a GGUF file, an adapter's directory, or ``builtin:NAME``
    (``handrail model list``)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of computations; trained weights are always kept and saved in float32, because bfloat16
    rounds small updates away."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto`` uses a GPU if there is one; ``cpu`` never does."""
    attention: str = "auto"
    """Attention implementation by its transformers name (``eager``, ``sdpa``, ``flash_attention_2``);
    ``auto`` lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    compile: bool = False
    """Compile the layers and the output layer's arithmetic with torch.compile. The first update then takes
    half a minute longer, and the others are faster on a GPU (docs/gpu.md). It needs a C compiler."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; enable it only if you trust the model's author."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) through peft. If this section is present, only the adapters
    are trained; the model's own weights stay in ``model.dtype``."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter, by the suffixes of their names; ``all-linear`` means every linear layer
    except the output layer."""
    save: Literal["adapter", "merged"] = "adapter"
    """What ``model/`` contains after training: only the adapter, or the whole model with the adapter merged
    into it."""


class SamplerConfig(Section):
    """The engine that samples rollouts."""

    name: Literal["transformers", "vllm"] = "transformers"
    """``transformers`` samples with the model in training; ``vllm`` runs vLLM in the same process, or in
    those of ``--samplers``, and copies the weights to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type that the sampler computes in; ``auto`` means ``model.dtype``."""
    cache_gib: float = Field(2.0, gt=0)
    """Memory for vLLM's KV cache, in GiB, on each GPU."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of GPUs that share the weights of one sampler, if that is too large for one; for vLLM in
    ``--samplers``."""
    importance_weight_cap: float = Field(2.0, ge=0)
    """Cap on the importance weights (the trainer's probability of a token divided by the sampler's), which
    correct for a sampler that differs from the trainer; 0 turns the correction off. A float32 model that does
    its own sampling needs none."""
    staleness: int = Field(0, ge=0)
    """Number of steps that ``handrail train --ray --samplers`` samples ahead, with weights that are as many
    steps old; 0 samples every step with the newest weights."""
    max_mismatch: float | None = Field(None, gt=0)
    """Stop the run if the mean difference per token between the sampler's and the trainer's log-probabilities
    exceeds this many nats; the default is 0.01 if both compute in float32, else 0.5."""

    @model_validator(mode="after")
    def _check_engine(self) -> SamplerConfig:
        if self.tensor_parallel > 1 and self.name != "vllm":
            raise ValueError(
                f"sampler.tensor_parallel = {self.tensor_parallel} is for vLLM; leave it out, or set "
                'sampler.name = "vllm"'
            )
        return self

    def computes_in(self, model: ModelConfig) -> str:
        """Return the number type that the sampler of ``model`` computes in."""
        return model.dtype if self.dtype == "auto" else self.dtype

    def largest_mismatch(self, model: ModelConfig) -> float:
        """Return ``max_mismatch`` or its default for ``model``."""
        exact = model.dtype == self.computes_in(model) == "float32"
        return self.max_mismatch or (0.01 if exact else 0.5)


class RolloutConfig(Section):
    """Rollouts: the completions that the policy samples."""

    group_size: int = Field(8, ge=1)
    """Completions in the group of each problem; LUFFY counts the reference as one of them."""
    max_tokens: int = Field(256, ge=1)
    """Maximum length of a completion in tokens; longer ones are cut off."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 always picks the likeliest token, which suits evaluation but not training."""
    require_end: bool = True
    """Give no reward to a completion that is cut off at ``max_tokens``, whatever it says."""
    batch_size: int = Field(256, ge=1)
    """Number of sequences sampled at once; lower it if memory runs out."""
