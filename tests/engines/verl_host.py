"""verl's trainer on a CPU: its own queue, agent loops, reward loop, FSDP worker and updates.

Two parts replace what needs a GPU: the server (``Server``, in place of vLLM) and the group of
workers, which is one worker in this process.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import ray
import torch
import transfer_queue
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, open_dict
from torch._C._distributed_c10d import HashStore
from torch.distributed.tensor import DTensor
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from handrail.engines.verl import GuidedPPOTrainer
from handrail.types.trajectory import Group
from tests.conftest import HARD

MODEL = Path("handrail/models/builtin/house-tiny")
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}{{ last | default('') }}"


REWARDS = '''
import re

def reward(data_source, solution_str, ground_truth, extra_info=None):
    """exact: 1 for the answer; coin: 1 for about half of all completions."""
    if data_source == "coin":
        return {"score": float(sum(map(ord, solution_str)) % 2)}
    found = re.search(r"# ([\\d ]+)$", solution_str)
    return {"score": float(found is not None and found[1].strip() == ground_truth)}
'''


def dataset(directory: Path, reward: str, source: str = f"{HARD}&n=32") -> Path:
    """Write problems with references and plans, as the example does."""
    spec = importlib.util.spec_from_file_location("prepare", "examples/verl/prepare.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    file = directory / f"{reward}.parquet"
    datasets.Dataset.from_list(example.rows(source, reward)).to_parquet(file)
    return file


def chat_model(directory: Path) -> Path:
    """Write the built-in backbone with a chat template, which verl needs."""
    copied = Path(shutil.copytree(MODEL, directory / "model", dirs_exist_ok=True))
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return copied


def configured(
    directory: Path, reward: str = "coin", overrides: Sequence[str] = (), **section: Any
) -> DictConfig:
    """A configuration of two steps of four problems with four rollouts each.

    ``section``: ``algorithm.handrail``.
    """
    (directory / "rewards.py").write_text(REWARDS)
    file = dataset(directory, reward)
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[
            "algorithm.adv_estimator=handrail", "trainer.v1.trainer_mode=handrail",
            f"data.train_files={file}", f"data.val_files={file}", "data.train_batch_size=4",
            "data.max_prompt_length=64", "data.max_response_length=48", "data.dataloader_num_workers=0",
            "data.seed=1", f"actor_rollout_ref.model.path={chat_model(directory)}",
            "actor_rollout_ref.model.use_remove_padding=false",
            "actor_rollout_ref.model.enable_gradient_checkpointing=false",
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            f"{actor}.strategy=fsdp2", f"{actor}.ppo_mini_batch_size=4", f"{actor}.optim.lr=1e-3",
            f"{actor}.ppo_micro_batch_size_per_gpu=2", f"{actor}.fsdp_config.use_torch_compile=false",
            f"+{actor}.fsdp_config.mixed_precision={{param_dtype: fp32, reduce_dtype: fp32}}",
            f"{rollout}.name=vllm", f"{rollout}.n=4", f"{rollout}.log_prob_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.ref.fsdp_config.use_torch_compile=false",
            "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}",
            f"{rollout}.agent.num_workers=1", "reward.num_workers=1",
            f"reward.custom_reward_function.path={directory / 'rewards.py'}",
            "reward.custom_reward_function.name=reward",
            "trainer.device=cpu", "trainer.n_gpus_per_node=1", "trainer.logger=[console]",
            "trainer.val_before_train=false", "trainer.total_training_steps=2", "trainer.save_freq=-1",
            f"trainer.default_local_dir={directory / 'checkpoints'}", "trainer.resume_mode=disable",
            "transfer_queue.enable=true",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1", *overrides,
        ])  # fmt: skip
    if section:
        with open_dict(config):
            config.algorithm.handrail = section
    return config


class Server:
    """A server with vLLM's interface, which samples with transformers."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL.resolve(), dtype=torch.float32).eval()
        self.step, self.seen = 0, dict[tuple[int, ...], int]()

    def update(self, weights: dict[str, torch.Tensor], step: int) -> None:
        self.model.load_state_dict(weights)
        self.step, self.seen = step, {}

    @torch.no_grad()
    def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        seed = sampling_params.get("seed")
        if seed is None:  # the first request for a prompt in a step always gets the same completion
            key = (self.step, *prompt_ids)
            self.seen[key] = self.seen.get(key, 0) + 1
            seed = int(hashlib.sha256(repr((key, self.seen[key])).encode()).hexdigest()[:8], 16)
        random = torch.Generator().manual_seed(seed)
        tokens, logps, cache = list[int](), list[float](), None
        read = torch.tensor([prompt_ids])
        while len(tokens) < sampling_params.get("max_tokens", 48) and (not tokens or tokens[-1] != 1):
            out = self.model(read, past_key_values=cache, use_cache=True)
            cache, logp = out.past_key_values, out.logits[0, -1].float().log_softmax(-1)
            read = torch.multinomial(logp.exp(), 1, generator=random)[None]
            tokens.append(int(read))
            logps.append(float(logp[tokens[-1]]))
        return TokenOutput(
            token_ids=tokens,
            log_probs=logps,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )


class OneWorker:
    """A group of one worker, in this process."""

    def __init__(self, config: DictConfig) -> None:
        role = "actor_ref" if config.actor.use_kl_loss else "actor"
        # "actor_ref" is no role of verl's: with rollouts, the worker would start a server.
        self.worker = ActorRolloutRefWorker(copy.deepcopy(config), role="actor")  # which changes it
        self.worker.role = role
        self.worker.init_model()
        self.engine = self.worker.actor.engine
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.engine.optimizer_step = self._kept(self.engine.optimizer_step)
        self._dispatch_info = {"actor": [0]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(value) for name, value in self.engine.module.state_dict().items()}

    def _kept(self, step: Any) -> Any:
        def kept() -> Any:
            parameters = self.engine.module.named_parameters()
            self.before.append(self.weights())
            self.gradients.append({name: whole(p.grad) for name, p in parameters if p.grad is not None})
            return step()

        return kept


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Host:
    """What all trainers of a test run share: the queue, the server, agent loops and the reward loop."""

    def __init__(self, config: DictConfig) -> None:
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
        transfer_queue.init(config.transfer_queue)
        self.server = ray.remote(Server).remote()
        balancer = ray.remote(GlobalRequestLoadBalancer).remote({"server": self.server})
        self.client = LLMServerClient(config, balancer)
        self.reward_loop_manager = RewardLoopManager(config)
        self.agent_loop_manager = AgentLoopManagerTQ.create(
            config, self.client, None, self.reward_loop_manager.reward_loop_worker_handles
        )

    def close(self) -> None:
        transfer_queue.close()
        ray.shutdown()
        torch.distributed.destroy_process_group()


class OnCpu(PPOTrainerSync):  # type: ignore[misc]  # verl has no types
    """The trainer's set-up without a resource pool of GPUs."""

    host: Host

    def _setup(self) -> None:
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
        self.ref_in_actor = self.config.actor_rollout_ref.model.lora_rank > 0
        self.actor_rollout_wg = self.ref_policy_wg = OneWorker(self.config.actor_rollout_ref)
        self.reward_loop_manager = self.host.reward_loop_manager
        self.teacher_model_manager = self.distillation_config = None
        self.llm_server_manager = SimpleNamespace(get_client=lambda: self.host.client)
        self.calls: list[str] = []
        """What the servers were told, in order."""
        self.checkpoint_manager = SimpleNamespace(
            update_weights=self.to_server, sleep_replicas=lambda: self.calls.append("sleep")
        )
        self._load_checkpoint()

    def to_server(self, step: int) -> None:
        self.calls.append("wake")
        ray.get(self.host.server.update.remote(self.actor_rollout_wg.weights(), step))


class CpuTrainer(GuidedPPOTrainer, OnCpu):
    """Keeps the guided groups of every step, and what verl computes its metrics from."""

    def __init__(self, config: DictConfig) -> None:
        self.steps: list[list[tuple[int, Group]]] = []
        self.rollouts: list[Any] = []
        self.logged: list[dict[str, Any]] = []
        super().__init__(config)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self.steps.append(self.guided)
        return super()._update_actor(batch, metrics)

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *rest: Any, **named: Any) -> None:
        self.rollouts.append(transfer_queue.kv_batch_get(batch.keys, batch.partition_id))
        super()._compute_metrics(batch, metrics, *rest, **named)
        self.logged.append(dict(metrics))


def fitted(config: DictConfig, host: Host, cls: type[Any] = CpuTrainer) -> Any:
    """Train, and return the trainer."""
    cls.host = host
    trainer = cls(config)
    trainer.init()
    trainer.fit(host.agent_loop_manager)
    return trainer
