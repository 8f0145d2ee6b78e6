"""TRL with vLLM in the trainer's process (``vllm_mode="colocate"``).

``make test-vllm`` runs these tests in their own environment; without vLLM they are skipped. Each run has a
process of its own, because vLLM's engine is released only when its process ends:
``python -m tests.engines.test_trl_vllm DIRECTORY METHOD UPDATES`` trains for three generations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_chat_model

DIFFERENCE = "sampling/sampling_logp_difference/mean"
FIGURES = ("loss", "grad_norm", "reward", DIFFERENCE)


def has_z(completions: list[str], **columns: Any) -> list[float]:
    return [float("z" in completion) for completion in completions]


def train(directory: Path, method: str, updates: int) -> None:
    """Print the logs of a run on the CPU, as JSON; ``method`` "trl" is GRPOTrainer itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from handrail.engines.trl import GuidedGRPOTrainer

    rows = [
        {"prompt": f"what is {word}", "answer": word, "reference": f"a z\n\nb z\n\n{word} z"}
        for word in ("two", "three", "and", "is")
    ]
    settings = GRPOConfig(
        output_dir=str(directory / "out"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.05,
        vllm_max_model_length=64,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        num_iterations=updates,
        max_completion_length=8,
        max_steps=3 * updates,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    common = {"model": str(directory / "model"), "args": settings, "reward_funcs": has_z}
    data = Dataset.from_list(rows * 4)
    trainer: Any = (
        GRPOTrainer(**common, train_dataset=data)
        if method == "trl"
        else GuidedGRPOTrainer(method=method, **common, train_dataset=data)
    )
    trainer.train()
    print(json.dumps([row for row in trainer.state.log_history if "loss" in row]))


def logs(directory: Path, method: str, updates: int = 1) -> list[dict[str, float]]:
    if not (directory / "model").exists():
        save_chat_model(directory / "model", hidden_size=128)  # vLLM's attention needs heads of 32 on a CPU
    command = [sys.executable, "-m", "tests.engines.test_trl_vllm", str(directory), method, str(updates)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    return list(json.loads(line))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    return tmp_path_factory.mktemp("trl-vllm")


def test_grpo_is_trls_own(directory: Path) -> None:
    ours, theirs = logs(directory, "grpo"), logs(directory, "trl")
    assert [[row[key] for key in FIGURES] for row in ours] == [
        [row[key] for key in FIGURES] for row in theirs
    ]


@pytest.mark.parametrize("updates", [1, 2])
def test_references_join_what_vllm_samples_with_the_newest_weights(directory: Path, updates: int) -> None:
    rows = logs(directory, "sort", updates)
    assert len(rows) == 3 * updates
    assert rows[0]["handrail/groups/guided"] > 0 and rows[0]["grad_norm"] > 0
    # Each update moves the weights by 0.01. vLLM computes in bfloat16.
    differences = [row[DIFFERENCE] for row in rows if DIFFERENCE in row]
    assert len(differences) == 3 and max(differences) < 0.1


def test_hints_are_shown_to_vllm(directory: Path) -> None:
    rows = logs(directory, "actguide")
    assert rows[0]["handrail/actguide/guided"] > 0 and rows[0]["handrail/actguide/steps_shown"] > 0


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
