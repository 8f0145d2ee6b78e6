"""Data as users have it, in the real loop, with a Hugging Face model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from handrail import train
from tests.conftest import config
from tests.tiny_models import save_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"), context=2048)


def run(model: Path, source: str, output: Path, **verifier: Any) -> list[dict[str, Any]]:
    """Train one LUFFY step on ``source`` and return its samples."""
    settings = config(
        model={"path": str(model)}, data={"train": source}, method={"name": "luffy"},
        verifier={"extract": None, **verifier},
        rollout={"group_size": 3, "max_tokens": 12}, train={"steps": 1, "problems_per_step": 2},
    )  # fmt: skip
    tree = settings.model_dump(exclude_none=True)
    summary = train(type(settings).model_validate(tree), output)
    assert summary["steps"] == 1
    AutoTokenizer.from_pretrained(output / "model")
    AutoModelForCausalLM.from_pretrained(output / "model")
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert all(
        sample["prompt"].startswith("<|user|>") and sample["prompt"].endswith("<|assistant|>")
        for sample in samples
    )
    return samples


def references(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["author"][0] == "reference"]


def test_a_jsonl_file_that_a_user_wrote(model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "Tom has 3 boxes of 12 eggs. How many eggs?",
            "answer": 36,
            "reference": "3 * 12 = 36\n#### 36",
        },
        {
            "prompt": "What is 2 + 3?",
            "answer": "5",
            "reference": ["2 + 3 = 5\n#### 5", "#### 6"],
            "source": "mine",
        },
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = references(run(model, str(file), tmp_path / "run", name="math"))
    assert {sample["problem"] for sample in found} == {"mine.jsonl:1", "mine.jsonl:2"}
    assert all(
        sample["reward"] == (sample["text"] != "#### 6") and sample["tokens"][-1] == "<|end|>"
        for sample in found
    )


def test_luffys_own_layout_in_parquet(model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "openr1", "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
            "target": [{"role": "assistant", "content": f"It is \\boxed{{{n + 1}}}."}],
            "ability": "math", "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
            "extra_info": {"index": n},
        }
        for n in range(4)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "luffy.parquet")
    found = references(run(model, str(tmp_path / "luffy.parquet"), tmp_path / "run", name="math"))
    assert len(found) == 2 and all(sample["reward"] == 1 and "boxed" in sample["text"] for sample in found)


@pytest.mark.parametrize("verifier", ["math", "reasoning-gym"])
def test_gsm_symbolic_with_its_worked_solutions(verifier: str, model: Path, tmp_path: Path) -> None:
    found = references(run(model, "reasoning-gym:gsm_symbolic?n=8&seed=3", tmp_path / "run", name=verifier))
    assert len(found) == 2 and all(sample["reward"] == 1 and "####" in sample["text"] for sample in found)


def test_math_in_its_published_layout_and_a_float_answer(model: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": "What is $2 + 3$?", "solution": "Adding gives $\\boxed{5}$.", "level": "Level 1"},
        {"problem": "What is $10^{-5}$?", "solution": "It is $\\boxed{0.00001}$.", "level": "Level 1"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "math.parquet")
    found = references(run(model, str(tmp_path / "math.parquet"), tmp_path / "run", name="math"))
    assert {sample["text"] for sample in found} == {row["solution"] for row in rows}
    assert all(sample["reward"] == 1 for sample in found)


def test_multiple_choice_prompts_contain_the_choices(model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Which is {n}?",
            "choices": ["1", "2"],
            "answer": n - 1,
            "reference": f"#### {'AB'[n - 1]}",
        }
        for n in (1, 2)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mmlu.parquet")
    samples = run(model, str(tmp_path / "mmlu.parquet"), tmp_path / "run", name="normalized")
    assert all("A. 1\nB. 2<" in sample["prompt"] for sample in samples)
    assert all(sample["reward"] == 1 for sample in references(samples))
