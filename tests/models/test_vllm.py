"""vLLM as the sampler. ``make test-vllm`` runs these tests in their own environment; without vLLM they are
skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from tests.tiny_models import save_chat_model

pytest.importorskip("vllm")

VOWELS = '''"""Something that a random model can learn in a few steps."""
def reward(problem, completion):
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
'''


def written(directory: Path, **sections: Any) -> Path:
    """Write a configuration of a few steps of GRPO."""
    import tomli_w

    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"what is {word}", "answer": word} for word in ("two", "three", "and", "is")]
    (directory / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "vowels.py").write_text(VOWELS)
    tree: dict[str, Any] = {
        "model": {"path": str(directory.parent / "model"), "device": "cpu"},
        "data": {"train": str(directory / "problems.jsonl")},
        "verifier": {"name": f"{directory / 'vowels.py'}:reward", "workers": 1},
        "rollout": {"group_size": 8, "max_tokens": 16, "require_end": False},
        "sampler": {"name": "vllm", "cache_gib": 0.25},
        "train": {"steps": 12, "problems_per_step": 4, "learning_rate": 3e-3, "checkpoint_every": 6},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    (directory / "config.toml").write_text(tomli_w.dumps(tree))
    return directory / "config.toml"


def handrail(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process, because vLLM's engine is released only when its process ends."""
    command = [sys.executable, "-m", "handrail.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def trained(directory: Path, *arguments: str, **sections: Any) -> list[dict[str, Any]]:
    """Return the metrics of a run's steps."""
    done = handrail(
        "train", str(written(directory, **sections)), "--output", str(directory / "run"), *arguments
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random model whose attention vLLM supports."""
    root = tmp_path_factory.mktemp("vllm")
    save_chat_model(root / "model", hidden_size=128)
    return root


def rewards(rows: list[dict[str, Any]]) -> list[float]:
    return [row["reward"] for row in rows]


def test_vllm_gets_the_weights_after_every_update_and_learns_like_transformers(root: Path) -> None:
    # In groups of 8, some seeds end in equal completions of one token, and no update leaves that state.
    learning: dict[str, Any] = {
        "rollout": {"group_size": 32},
        "train": {"learning_rate": 2e-3, "steps": 18},
    }
    ours = trained(root / "transformers", sampler={"name": "transformers"}, **learning)
    theirs = trained(root / "vllm", **learning)
    assert all(row["sampler/mismatch"] < 1e-4 for row in theirs)
    for rows in (ours, theirs):
        assert rewards(rows)[0] < 0.1 and fmean(rewards(rows)[-3:]) > 0.9


def test_an_output_layer_that_is_the_embeddings_is_updated(root: Path) -> None:
    """vLLM packs it when it starts, with random weights."""
    tied = AutoConfig.from_pretrained(root / "model", tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tied).save_pretrained(root / "tied")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "tied")
    rows = trained(root / "shared", model={"path": str(root / "tied")}, train={"steps": 3})
    assert len(rows) == 3 and all(row["sampler/mismatch"] < 1e-4 for row in rows)


def test_a_model_that_vllm_cannot_sample_from_is_one_sentence(root: Path) -> None:
    """On a CPU, vLLM has no attention for heads of 24."""
    file = written(root / "unsupported", model={"path": "builtin:house-tiny"})
    done = handrail("train", str(file), "--output", str(root / "unsupported/run"))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "sampler: vLLM cannot run builtin:house-tiny: Unsupported CPU attention" in done.stderr


def test_weights_of_experts_are_updated_or_the_run_stops_with_the_reason(root: Path) -> None:
    """On a CPU, vLLM 0.32 packs experts when it is created, and then ignores new weights for them."""
    words = AutoTokenizer.from_pretrained(root / "model")
    mixture = MixtralConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=256, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(mixture).save_pretrained(root / "mixture")
    words.save_pretrained(root / "mixture")
    done = handrail(
        "train",
        str(written(root / "mixed", model={"path": str(root / "mixture")}, train={"steps": 1})),
        "--output",
        str(root / "mixed/run"),
    )
    if done.returncode:
        assert done.returncode == 2 and "nats from the trainer's" in done.stderr, done.stderr[-3000:]
    else:
        (row,) = [json.loads(line) for line in (root / "mixed/run/metrics.jsonl").read_text().splitlines()][
            1:
        ]
        assert row["sampler/mismatch"] < 1e-4


def test_a_trained_model_gives_the_same_completions_in_vllm_and_transformers(root: Path) -> None:
    trained(root / "saved", train={"steps": 2}, sampler={"name": "transformers"})
    model = root / "saved/run/model"
    script = (
        "import sys, json\nfrom vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, dtype='float32', kv_cache_memory_bytes=2**28, "
        "max_model_len=64)\n"
        "out = llm.generate([{'prompt_token_ids': [10, 11, 12]}], SamplingParams(temperature=0, "
        "max_tokens=8, ignore_eos=True))\n"
        "print(json.dumps(list(out[0].outputs[0].token_ids)))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    ids = [10, 11, 12]
    for _ in range(8):
        ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
    assert json.loads(done.stdout.splitlines()[-1]) == ids[3:]
    assert AutoTokenizer.from_pretrained(model).chat_template


def test_merged_adapters_reach_vllm_also_with_several_updates_and_after_resuming(
    root: Path,
) -> None:
    changes: dict[str, Any] = {
        "lora": {"rank": 4},
        "train": {"steps": 4, "updates_per_step": 2, "learning_rate": 1e-2, "checkpoint_every": 2},
    }
    rows = trained(root / "lora", **changes)
    assert all(row["sampler/mismatch"] < 1e-3 for row in rows) and len(rows) == 4
    changes["train"] |= {"steps": 6}
    assert len(trained(root / "lora", "--resume", **changes)) == 6


def test_a_run_stops_if_weights_do_not_reach_vllm(root: Path) -> None:
    config = written(root / "stale", train={"steps": 1})
    script = (
        "import sys\nfrom handrail.models import vllm\nvllm.VllmSampler.update_weights = lambda self, "
        "weights: None\n"
        "from handrail.cli import main\nsys.argv = ['handrail', 'train', sys.argv[1], '--output', "
        "sys.argv[2]]\nmain()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", script, str(config), str(root / "stale/run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 2 and "nats from the trainer's" in done.stderr, done.stderr[-3000:]
