"""Run TRL's own tests of GRPOTrainer against GuidedGRPOTrainer:
``python -m tests.engines.trl_own CHECKOUT``, with a checkout of https://github.com/huggingface/trl.

Every test runs with GRPOTrainer and again with GuidedGRPOTrainer in its place, whose default is
``method="grpo"``. It prints the outcomes and every test whose outcomes differ. Nothing is downloaded: the
tests' tiny models are random ones of the same kinds, written into a hub's cache, with one small tokenizer
for all of them. Tests of vision models, vLLM and GPUs are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

GUIDED = "HANDRAIL_GUIDED"
CHECKOUT = "HANDRAIL_TRL"
DIMENSIONS = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 1024, "num_labels": 1,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
MODELS = {
    "trl-internal-testing/tiny-Cohere2ForCausalLM": "Cohere2ForCausalLM",
    "trl-internal-testing/tiny-Gemma2ForCausalLM": "Gemma2ForCausalLM",
    "trl-internal-testing/tiny-GptOssForCausalLM": "GptOssForCausalLM",
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": "LlamaForCausalLM",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": "MistralForCausalLM",
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": "Qwen2ForCausalLM",
    "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5": "Qwen2ForSequenceClassification",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "trl-internal-testing/tiny-Qwen3ForSequenceClassification": "Qwen3ForSequenceClassification",
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": "Qwen3MoeForCausalLM",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen2ForCausalLM",
}
"""Names on the hub, and the classes of transformers."""


def save_models(cache: Path) -> None:
    """Write the models as a hub's cache holds them."""
    import torch
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    templates = Path(trl.__file__).parent / "chat_templates"
    for name, class_name in MODELS.items():
        family = "qwen3" if "Qwen3" in name else "qwen2_5"
        words = tokenizer((templates / f"{family}.jinja").read_text())
        model_class = getattr(transformers, class_name)
        ends = {key: getattr(words, key) for key in ("eos_token_id", "pad_token_id")} | {"bos_token_id": None}
        torch.manual_seed(0)
        config = model_class.config_class(vocab_size=len(words), **DIMENSIONS, **ends)
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0")
        model_class(config).save_pretrained(folder / "snapshots/0")
        words.save_pretrained(folder / "snapshots/0")


def tokenizer(template: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [template], trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def zen(checkout: Path) -> dict[str, Any]:
    """Return the tests' dataset, each configuration's splits, from the script that TRL makes it with."""
    import datasets

    specification = importlib.util.spec_from_file_location(
        "zen", checkout / "scripts" / "generate_zen_dataset.py"
    )
    assert specification and specification.loader
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.DatasetDict,
            "push_to_hub",
            lambda splits, _, config_name: found.update({config_name: splits}),
        )
        script.main(0.1, True, "")
    return found


def pytest_configure() -> None:
    """Serve the dataset, and put the guided trainer in GRPOTrainer's place if it is to be tested."""
    import datasets
    import trl
    from trl import import_utils

    # Checks that the installed version of TRL no longer has; they only choose which tests are skipped.
    import_utils.__getattr__ = lambda name: partial(bool, 0)
    configurations = zen(Path(os.environ[CHECKOUT]))

    def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
        splits = configurations[name]
        if streaming:
            splits = datasets.IterableDatasetDict(
                {key: each.to_iterable_dataset() for key, each in splits.items()}
            )
        return splits[split] if split else splits

    datasets.load_dataset = load_dataset
    if GUIDED in os.environ:
        from handrail.engines.trl import GuidedGRPOTrainer

        trl.GRPOTrainer = GuidedGRPOTrainer


def outcomes(checkout: Path, cache: Path, guided: bool, select: str) -> dict[str, str]:
    """Run the tests with one of the two trainers, and return each test's outcome: passed, or the reason."""
    report = cache / "report.xml"
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", CHECKOUT: str(checkout),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    } | ({GUIDED: "1"} if guided else {})  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "tests.engines.trl_own", "-p", "no:cacheprovider"]
    tests = cache / "trl_tests"  # another name than this package's
    shutil.copytree(checkout / "tests", tests, dirs_exist_ok=True)
    command += [f"--rootdir={cache}", str(tests / "test_grpo_trainer.py"), "--tb=no", "-q"]
    command += ["-k", select, f"--junit-xml={report}", "--disable-warnings"]
    subprocess.run(command, env=environment, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = [
            (each.tag, each.get("message", ""))
            for each in case
            if each.tag in ("failure", "error", "skipped")
        ]
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = " ".join(failed[0])[:200] if failed else "passed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--select", default="not VLM and not Slow and not vllm", help="as pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_models(Path(directory))
        plain, guided = (
            outcomes(options.checkout, Path(directory), each, options.select) for each in (False, True)
        )
    for name in sorted(plain | guided):
        print(f"{plain.get(name)} | {guided.get(name)} | {name}")
    for trainer, found in (("GRPOTrainer", plain), ("GuidedGRPOTrainer", guided)):
        print(trainer, dict(Counter(each.split(" ")[0] for each in found.values())))
    different = [name for name in plain if plain[name].split(" ")[0] != guided.get(name, "").split(" ")[0]]
    print("different:", ", ".join(different) or "none")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
