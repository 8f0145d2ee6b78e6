"""``accelerate launch``: what it asks for is done, or refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator

from handrail import UserError
from handrail._util.launch import Fsdp, launched, read, require_precision
from handrail.models.sharding import layers
from handrail.models.trainable import TrainablePolicy
from handrail.training.policies import load_trainable_policy
from tests import forks
from tests.conftest import HARD, Handrail, config
from tests.training.test_loop import lines

SHORT = ("train.steps=1", "train.problems_per_step=4", "eval.limit=2", f"data.train={HARD}&n=64")


def launch(directory: Path, arguments: Sequence[str] = (), settings: Sequence[str] = ()) -> tuple[int, str]:
    """Run ``accelerate launch ARGUMENTS -m handrail train ...`` on the CPU, without a user's own settings;
    return (exit code, all output)."""
    train = ["-m", "handrail", "train", "examples/quick.toml", "--output", str(directory / "run")]
    changes = [part for each in (*SHORT, *settings) for part in ("--set", each)]
    return forks.launch(
        "accelerate.commands.accelerate_cli",
        "launch", *arguments, *train, *changes,
        without=("ACCELERATE", "FSDP", "MASTER"),
        environment={"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(directory / "home")},
    )  # fmt: skip


def test_accelerate_launch_without_settings_trains_in_one_process(tmp_path: Path) -> None:
    code, said = launch(tmp_path)
    assert code == 0, said[-3000:]
    assert "error" not in said and "Traceback" not in said
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2


def test_a_configuration_file_of_accelerate_shards_the_model(tmp_path: Path) -> None:
    """In bfloat16, and with a layer gathered until its backward pass."""
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }
    settings = {
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "num_processes": 2,
        "fsdp_config": fsdp,
    }
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps(settings))
    code, said = launch(
        tmp_path, ["--config_file", str(file)], ["model.dtype=bfloat16", "train.checkpoint_every=1"]
    )
    assert code == 0, said[-3000:]
    names = sorted(path.name for path in tmp_path.glob("run/checkpoints/step-000001/optimizer*"))
    assert names == [f"optimizer-0000{place}-of-00002.safetensors" for place in (1, 2)]
    assert lines(tmp_path / "run/metrics.jsonl")[1]["sampler/mismatch"] < 0.1


def test_one_process_in_place_of_several_is_refused(tmp_path: Path) -> None:
    code, said = launch(tmp_path, ["--num_processes", "2"])
    assert code and "has started one process in place of several" in said
    assert not (tmp_path / "run").exists()


REFUSALS = {
    "ACCELERATE_USE_DEEPSPEED=true": "DeepSpeed is not supported",
    "ACCELERATE_USE_MEGATRON_LM=true": "Megatron-LM is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG=true": "a parallelism_config is not supported",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE=DATA_PARALLEL": "start with torchrun",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR": "set dynamo_backend to no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": "whose size is train.micro_batch_tokens",
    "ACCELERATE_MIXED_PRECISION=bf16": "mixed_precision is bf16, but model.dtype is float32",
    "ACCELERATE_MIXED_PRECISION=fp8": "mixed_precision is fp8, but model.dtype is float32",
    "FSDP_VERSION=1": "set fsdp_version to 2",
    "FSDP_OFFLOAD_PARAMS=true": "set it to false",
    "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP": "can only be TRANSFORMER_BASED_WRAP or NO_WRAP",
    "FSDP_SHARDING_STRATEGY=HYBRID_SHARD": "set fsdp_reshard_after_forward",
    "FSDP_RESHARD_AFTER_FORWARD=FULL_SHARD": "can only be true or false",
    "FSDP_STATE_DICT_TYPE=FULL_STATE_DICT": "can only be SHARDED_STATE_DICT",
    "FSDP_FORWARD_PREFETCH=true": "belongs to version 1",
    "FSDP_ACTIVATION_CHECKPOINTING=true": "set model.gradient_checkpointing = true",
    "FSDP_IGNORED_MODULES=lm_head": "leave it out",
}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What this process was launched with is read again, in the test and after it."""
    launched.cache_clear()
    yield
    launched.cache_clear()


@pytest.mark.parametrize("setting", REFUSALS)
def test_what_cannot_be_honoured_is_refused(
    setting: str, handrail: Handrail, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    name, _, value = setting.partition("=")
    if name.startswith("FSDP"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    Path("a.toml").write_text(
        'model.path = "builtin:house-tiny"\ndata.train = "task:house-rules?n=4"\nverifier.name = "exact"\n'
    )
    done = handrail("train", "a.toml")
    assert (
        done.code == 2 and done.err.startswith("error: accelerate launch: ") and REFUSALS[setting] in done.err
    )
    assert done.err.count("\n") == 1 and not Path("runs/a").exists()


def test_the_settings_of_accelerate_launch_are_read() -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    require_precision(plain, "bfloat16")
    require_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bfloat16")
    assert read({}) is None and read(plain) is None
    sharded = plain | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert read(sharded) == Fsdp()
    chosen = {
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "False",
    }
    assert read(sharded | chosen) == Fsdp(("A", "B"), False, False)
    assert read(sharded | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}) == Fsdp(())


def test_layers_are_named_or_those_of_transformers(policy: TrainablePolicy) -> None:
    model = policy.bare_model
    every = list(model.model.layers)
    assert layers(model, Fsdp()) == layers(model, Fsdp((type(every[0]).__name__,))) == every
    assert layers(model, Fsdp(())) == []
    with pytest.raises(UserError, match="names NoLayer, which is no layer of the model"):
        layers(model, Fsdp(("NoLayer",)))


def test_one_process_has_nothing_to_share() -> None:
    policy = load_trainable_policy(config(train={"fsdp": True}), Accelerator(cpu=True))
    assert policy.shards is None and policy.bare_model is policy.model
