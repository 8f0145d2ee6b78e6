"""The trainable policy: adapters, GGUF files, gradient checkpointing and the KL divergence, in the real
loop."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig

from handrail import Author, Context, Group, Problem, Trajectory, UserError, train
from handrail.methods.grpo import Grpo
from handrail.methods.imitating import imitate
from handrail.models.batching import Inputs
from handrail.models.config import LoraConfig
from handrail.models.generate import CopySampler
from handrail.models.loading import load_model
from handrail.models.lora import with_adapter
from handrail.models.vllm import VllmSampler
from handrail.training.policies import load_trainable_policy
from tests.conftest import Handrail, config, policy_of
from tests.tiny_models import save_chat_model, save_gguf
from tests.training.test_golden import ScriptedGrpo
from tests.training.test_loop import Scripted, lines

LORA = {"rank": 4, "alpha": 8.0}
TINY_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def short(steps: int, **lora: Any) -> Any:
    return config(train={"steps": steps, "learning_rate": 1e-2, "checkpoint_every": 1}, lora={**LORA, **lora})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(directory / "model.safetensors"))


def test_only_the_adapter_is_trained_and_a_resumed_run_is_identical(
    tmp_path: Path,
) -> None:
    train(short(4), tmp_path / "whole", method=Scripted)
    train(short(2), tmp_path / "parts", method=Scripted)
    train(short(4), tmp_path / "parts", method=Scripted, resume=True)
    whole, parts = (
        load_file(tmp_path / f"{name}/model/adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(
        torch.equal(value, parts[name]) for name, value in whole.items()
    )
    assert lines(tmp_path / "whole/metrics.jsonl") == lines(tmp_path / "parts/metrics.jsonl")
    assert any(
        value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name
    )  # they are initialized with zeros
    assert not (tmp_path / "whole/model/model.safetensors").exists()
    small = sum(
        file.stat().st_size for file in (tmp_path / "whole/checkpoints/step-000004").rglob("*.safetensors")
    )
    assert (
        small
        < 1e6
        < sum(value.numel() * 4 * 3 for value in load_model(config().model)[0].state_dict().values())
    )


def test_an_adapter_loads_in_peft_and_here_and_equals_the_merged_model(tmp_path: Path) -> None:
    train(short(2), tmp_path / "adapter", method=Scripted)
    train(short(2, save="merged"), tmp_path / "merged", method=Scripted)
    inputs = Inputs.of([[5, 6, 7]], [[8, 9]])

    def logits(model: Any) -> torch.Tensor:
        return torch.as_tensor(model(input_ids=inputs.whole).logits.detach())

    before = load_model(config().model)[0]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter/model", dtype="float32")
    over = PeftModel.from_pretrained(load_model(config().model)[0], str(tmp_path / "adapter/model"))
    ours = load_model(config(model={"path": str(tmp_path / "adapter/model")}).model)[0]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/model", dtype="float32")
    assert (logits(before) - logits(plain)).abs().max() > 1e-3
    for other in (over, ours, whole):
        torch.testing.assert_close(logits(other), logits(plain), atol=1e-4, rtol=1e-4)
    assert weights(tmp_path / "merged/model").keys() == weights(Path(before.name_or_path)).keys()


def test_an_adapter_over_bfloat16_weights_learns_in_float32(tmp_path: Path) -> None:
    changed = short(3).model_copy(update={"model": config(model={"dtype": "bfloat16"}).model})
    train(changed, tmp_path / "run", method=Repairing)
    adapter = load_file(tmp_path / "run/model/adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    rows = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert rows[-1]["loss"] < rows[0]["loss"] and all(
        0 < row["sampler/mismatch"] < 0.1 for row in rows
    )  # sampled without the trainer's rounding
    policy = load_trainable_policy(changed, Accelerator(cpu=True))
    (drawn,) = policy.generate([[5, 6, 7]], [1])
    assert policy.importance_weight_cap == 2 and len(drawn) and drawn.columns["old_logp"].isnan().all()
    assert drawn.columns["sampling_logp"].isfinite().all()


def test_an_adapter_samples_in_the_precision_of_its_model() -> None:
    with pytest.raises(
        UserError, match="the trained model itself samples, in model.dtype; leave sampler.dtype out"
    ):
        config(lora=LORA, model={"dtype": "bfloat16"}, sampler={"dtype": "float32"})


def test_targets_without_a_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.targets = \['nowhere'\]"):
        train(config(lora={"targets": ["nowhere"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_layer_with_tied_weights_gets_no_adapter() -> None:
    tied, untied = (
        AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=tied)
        )
        for tied in (True, False)
    )
    targets = LoraConfig(targets=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="lm_head shares its weights"):
        with_adapter(tied, targets, "base", 0)
    with_adapter(untied, targets, "base", 0)


def test_an_adapter_that_peft_wrote_uses_its_models_tokenizer(chat_model: Path, tmp_path: Path) -> None:
    train(
        config(model={"path": str(chat_model)}, lora=LORA, rollout={"max_tokens": 8}, train={"steps": 1}),
        tmp_path / "run",
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "run/model" / file).unlink()
    _, words = load_model(config(model={"path": str(tmp_path / "run/model")}).model)
    assert words.chat_template


def test_a_model_whose_defaults_contradict_themselves_is_saved(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "eos_token_id": 0}'
    )
    train(
        config(
            model={"path": str(tmp_path / "model")}, lora={**LORA, "save": "merged"},
            rollout={"max_tokens": 8},
            train={"steps": 1, "checkpoint_every": 0},
        ),
        tmp_path / "run",
    )  # fmt: skip
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_what_is_wrong_with_an_adapter_is_said_of_the_setting_that_names_it(tmp_path: Path) -> None:
    train(short(1), tmp_path / "run", method=Scripted)
    adapter = tmp_path / "run/model"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="^model.path: the adapter .* has no adapter_model.safetensors"):
        load_model(config(model={"path": str(adapter)}).model)
    with pytest.raises(UserError, match="^experts.teacher: the adapter .* has no adapter_model.safetensors"):
        load_model(config(model={"path": str(adapter)}).model, "experts.teacher")
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../gone"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="^experts.teacher: the adapter .* was trained on ../gone"):
        load_model(config(model={"path": str(adapter)}).model, "experts.teacher")


def test_an_adapter_finds_its_model_from_any_directory(
    handrail: Handrail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path / "base")
    (tmp_path / "d.jsonl").write_text('{"prompt": "what is two", "answer": "2"}\n')
    (tmp_path / "run.toml").write_text(
        'model = {path = "base", device = "cpu"}\ndata = {train = "d.jsonl"}\nlora = {rank = 2}\nrollout = '
        "{max_tokens = 2}\n"
        "train = {steps = 1}\n"
    )
    assert handrail("train", "run.toml", "--output", "run").code == 0
    adapter = tmp_path / "run/model"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")

    def loads_from(base: str) -> None:
        (adapter / "adapter_config.json").write_text(
            json.dumps({**settings, "base_model_name_or_path": base})
        )
        load_model(config(model={"path": str(adapter)}).model)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loads_from(str(tmp_path / "base"))
    loads_from("../../base")  # relative to the adapter
    with pytest.raises(
        UserError,
        match=r"run/model was trained on ../gone, which does not exist; set base_model_name_or_path",
    ):
        loads_from("../gone")
    with pytest.raises(UserError, match="was trained on /gone/base, which does not exist"):
        loads_from("/gone/base")
    with pytest.raises(
        UserError,
        match="^model.path: the adapter .*run/model needs its model: base cannot .*no directory of that name",
    ):
        loads_from("base")


def test_a_gguf_file_equals_the_model_it_was_made_from(chat_model: Path, tmp_path: Path) -> None:
    file = save_gguf(chat_model, tmp_path / "model.gguf")
    expected, words = load_model(config(model={"path": str(chat_model)}).model)
    found, theirs = load_model(config(model={"path": str(file)}).model)
    assert expected.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    text = "<|user|>what is two and three<|end|>"
    assert theirs.encode(text) == words.encode(text) and theirs.chat_template == words.chat_template
    train(config(model={"path": str(file)}, rollout={"max_tokens": 8}), tmp_path / "run")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.vocab_size
        == found.config.vocab_size
    )


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("nothing")
    with pytest.raises(UserError, match="model.gguf cannot be loaded"):
        train(config(model={"path": str(tmp_path / "model.gguf")}), tmp_path / "run")
    with pytest.raises(UserError, match="there is no file .*other.gguf"):
        train(config(model={"path": str(tmp_path / "other.gguf")}), tmp_path / "run")


def test_gradient_checkpointing_gives_the_same_run(tmp_path: Path) -> None:
    train(config(train={"steps": 2}), tmp_path / "kept", method=Scripted)
    train(
        config(train={"steps": 2}, model={"gradient_checkpointing": True}),
        tmp_path / "again",
        method=Scripted,
    )
    for left, right in zip(
        lines(tmp_path / "kept/metrics.jsonl"), lines(tmp_path / "again/metrics.jsonl"), strict=True
    ):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == (
                pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
            ), key


def test_gradient_checkpointing_really_recomputes_activations(chat_model: Path) -> None:
    calls = []
    for again in (False, True):
        policy = load_trainable_policy(
            config(model={"path": str(chat_model), "gradient_checkpointing": again}), Accelerator(cpu=True)
        )
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        policy.bare_model.model.layers[0].mlp.register_forward_pre_hook(counted)
        policy.forward(Inputs.of([[5, 6]], [[7, 8]]))[0].sum().backward()
        calls.append(count)
    assert calls == [1, 2]


@pytest.mark.parametrize("kind", [GPT2Config(n_embd=32, n_layer=2, n_head=4), OPTConfig(**TINY_OPT)])
def test_gradient_checkpointing_does_not_turn_on_dropout(kind: Any, chat_model: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(chat_model)
    kind.vocab_size, kind.eos_token_id, kind.pad_token_id, kind.bos_token_id = (
        len(words),
        words.eos_token_id,
        None,
        None,
    )
    AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    inputs, found = Inputs.of([[5, 6]], [[7, 8]]), []
    for again in (False, True):
        policy = load_trainable_policy(
            config(model={"path": str(tmp_path), "gradient_checkpointing": again}), Accelerator(cpu=True)
        )
        logp, _ = policy.forward(inputs)
        logp.sum().backward()
        found.append((logp.detach(), next(policy.bare_model.parameters()).grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_kl_term_is_measured_from_the_starting_model_and_limits_learning(
    lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    extra = {"lora": lora} if lora else {}
    settings = {"steps": 8, "learning_rate": 1e-2 if lora else 3e-4}
    start = policy_of(Path("builtin:house-tiny"))
    rows = start.generate([[5, 6, 7], [8, 9]] * 4, range(8))
    moved = []
    for kl in (0.0, 10.0):
        train(
            config(train=settings, method={"name": "grpo", "kl": kl}, **extra),
            tmp_path / f"{kl}",
            method=ScriptedGrpo,
        )
        end = policy_of(tmp_path / f"{kl}/model")
        scores = end.score([row.prompt_ids for row in rows], [row.token_ids for row in rows])
        moved.append(
            sum(
                (row.column("sampling_logp") - score).sum().item()
                for row, score in zip(rows, scores, strict=True)
            )
            / len(rows)
        )
    assert moved[1] < moved[0] / 2


def test_with_a_kl_term_no_rollout_is_dropped(tmp_path: Path) -> None:
    train(config(train={"steps": 1}, method={"name": "grpo", "kl": 0.1}), tmp_path / "run")
    (_, row) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["tokens/dropped"] == 0 and row["tokens/trained"] == row["tokens/sampled"]


def test_in_bfloat16_a_copy_samples_and_is_updated_with_the_policy(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "train": {"steps": 3, "learning_rate": 3e-3}}
    train(config(**changes), tmp_path / "run", method=Repairing)
    rows = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert all(0 < row["sampler/mismatch"] < 0.1 for row in rows) and all(
        row["grad_norm/all"] > 0 for row in rows
    )
    train(
        config(**{**changes, "train": {**changes["train"], "steps": 1, "checkpoint_every": 1}}),
        tmp_path / "parts",
        method=Repairing,
    )
    train(config(**changes), tmp_path / "parts", method=Repairing, resume=True)
    assert lines(tmp_path / "parts/metrics.jsonl") == lines(tmp_path / "run/metrics.jsonl")
    policy = load_trainable_policy(config(**changes), Accelerator(cpu=True))
    assert isinstance(policy.sampler, CopySampler) and {
        p.dtype for p in policy.sampler.model.parameters()
    } == {torch.bfloat16}
    copied, ours = (model.model.rotary_emb.inv_freq for model in (policy.sampler.model, policy.bare_model))
    assert torch.equal(copied, ours)  # in bfloat16, distant positions would have other values
    frozen = {**changes, "train": {**changes["train"], "steps": 6}, "sampler": {"max_mismatch": 0.1}}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"sampler's log-probabilities are .* nats from"),
    ):
        # the copy is not updated yet
        patch.setattr(CopySampler, "update_weights", lambda self, weights: None)
        train(config(**frozen), tmp_path / "stale", method=Repairing)


class Repairing(Grpo):
    """A method that imitates every reference, whatever the rollouts did."""

    async def guide(self, group: Group, ctx: Context) -> Group:
        return imitate(group, ctx)


def test_with_several_updates_old_log_probabilities_are_scored_before_the_first(
    tmp_path: Path,
) -> None:
    changes = {"model": {"dtype": "bfloat16"}, "train": {"steps": 2, "updates_per_step": 2}}
    train(config(**changes), tmp_path / "run")
    policy = load_trainable_policy(config(**changes), Accelerator(cpu=True))
    one, two = policy.generate([[5, 6, 7]] * 2, range(2))
    assert all(row.column("old_logp").isnan().all() for row in (one, two))
    shown = Trajectory.by(Author.REFERENCE, [5, 6, 7], [8, 9])
    known = torch.full((len(two),), -7.0)  # as a method may set it
    group = Group(Problem("p", "x", "1"), [one, shown, two.with_columns(old_logp=known), spliced(one)])
    (found,) = policy.with_old_logp([group])
    scored = policy.score(
        [row.prompt_ids for row in group.trajectories], [row.token_ids for row in group.trajectories]
    )
    first, reference, given, mixed = found.trajectories
    assert torch.equal(first.columns["old_logp"], scored[0]) and not torch.equal(
        first.columns["sampling_logp"], scored[0]
    )
    assert reference.column("old_logp").isnan().all() and torch.equal(given.columns["old_logp"], known)
    assert (
        torch.equal(mixed.columns["old_logp"][:-2], scored[3][:-2])
        and mixed.columns["old_logp"][-2:].isnan().all()
    )


def spliced(row: Trajectory) -> Trajectory:
    """Return the row followed by two tokens of another author."""
    return row.append([8, 9], Author.TEACHER, finished=True)


def test_the_model_before_training_reads_shared_prompts_itself(chat_model: Path) -> None:
    policy = load_trainable_policy(config(model={"path": str(chat_model)}), Accelerator(cpu=True), True)
    prompts, completions = [[5, 6, 7]] * 2, [[8, 9], [10, 11, 12]]
    before = policy.score(prompts, completions)
    for parameter in policy.model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    for scored, expected in zip(policy.score(prompts, completions, "reference"), before, strict=True):
        torch.testing.assert_close(scored, expected)


@pytest.mark.parametrize(
    ("raised", "reason"), [(AssertionError(), "AssertionError()"), (ValueError("no room\nat all"), "no room")]
)
def test_a_model_that_vllm_cannot_run_is_named_with_the_reason(
    raised: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise raised

    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=refuse, SamplingParams=refuse, TokensPrompt=refuse)
    )
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # which the sampler sets
        monkeypatch.setenv(name, "")
    model = SimpleNamespace(config=SimpleNamespace(to_json_file=lambda *args, **settings: None))
    settings = config(sampler={"name": "vllm"})
    with pytest.raises(UserError) as refused:
        VllmSampler(settings.model, settings.sampler, settings.rollout, model, {0}, torch.device("cpu"))
    assert str(refused.value) == f"sampler: vLLM cannot run builtin:house-tiny: {reason}"
