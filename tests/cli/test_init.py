"""``handrail init``: train accepts the file that it writes, unchanged."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from handrail.training.config import load_config
from tests.cli.test_commands import ROWS, assert_refused, jsonl
from tests.conftest import Handrail

BARE = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
SHORT = ("--set", "train.steps=1", "--set", "rollout.group_size=2")


@pytest.mark.parametrize(
    ("rows", "method"),
    [(BARE, "grpo"), ([*ROWS, {**BARE[0], "reference": "1 " * 100}], "grpo+sft")],
    ids=["bare", "long"],
)
def test_the_first_configuration_trains_as_it_is(
    rows: list[dict[str, Any]], method: str, handrail: Handrail, tmp_path: Path
) -> None:
    data, held_out = (
        str(jsonl(tmp_path / "it's.jsonl", rows)),
        str(jsonl(tmp_path / 'held "out".jsonl', BARE)),
    )
    done = handrail("init", "builtin:house-tiny", data, "--held-out", held_out, "--output", "first.toml")
    assert done.code == 0, done.err
    config = load_config("first.toml")
    assert config.model.path == "builtin:house-tiny" and config.data.train[0].path == data
    assert config.method == {"name": method} and config.verifier.name == "math"
    assert config.rollout.max_tokens == 123  # the prompt has 5 tokens, the context 128
    trained = handrail("train", "first.toml", *SHORT)
    assert trained.code == 0, trained.err
    assert "held-out held_out: " in trained.out


def test_every_setting_of_the_first_configuration_is_explained_and_commented_ones_are_valid(
    handrail: Handrail, tmp_path: Path
) -> None:
    assert handrail("init", "builtin:house-tiny", str(jsonl(tmp_path / "data.jsonl", ROWS))).code == 0
    text = Path("config.toml").read_text()
    assert (
        "max_tokens = 16  " in text and "the longest reference has 6 tokens" in text
    )  # 1.5 times as long, rounded up to a multiple of 16
    settings = [
        line for line in text.splitlines() if "=" in line and not line.startswith(("#  ", "# For", "# #:"))
    ]
    assert all("  # " in line for line in settings)
    Path("all.toml").write_text(re.sub(r"^# (?=\[?\w+(\]| = ))", "", text, flags=re.MULTILINE))
    everything = load_config("all.toml")
    assert everything.lora is not None and everything.model.dtype == "bfloat16" and everything.eval.sets


def test_rows_that_are_too_long_are_skipped_and_counted(handrail: Handrail, tmp_path: Path) -> None:
    long = {**BARE[0], "prompt": "1 " * 200}
    data, held_out = (
        str(jsonl(tmp_path / "data.jsonl", [*BARE, long, long])),
        str(jsonl(tmp_path / "held.jsonl", [long, *BARE])),
    )
    done = handrail("init", "builtin:house-tiny", data, "--held-out", held_out)
    assert done.code == 0, done.err
    text = Path("config.toml").read_text()
    assert re.search(
        r'^too_long = "skip" +# leaves out 3 problems, first \S+data.jsonl, line 5, field prompt: ',
        text,
        re.MULTILINE,
    )
    assert (
        "4 problems, 0 of them with a reference" in text
        and load_config("config.toml").data.too_long == "skip"
    )
    trained = handrail("train", "config.toml", *SHORT)
    assert trained.code == 0, trained.err


def test_a_column_map_is_taken_and_written(handrail: Handrail, tmp_path: Path) -> None:
    rows = [{"task": row["prompt"], "gold": {"value": row["answer"]}} for row in ROWS]
    data = str(jsonl(tmp_path / "data.jsonl", rows))
    done = handrail(
        "init", "builtin:house-tiny", data, "--column", "prompt=task", "--column", "answer=gold.value"
    )
    assert done.code == 0, done.err
    assert tomllib.loads(Path("config.toml").read_text())["data"]["columns"] == {
        "prompt": "task",
        "answer": "gold.value",
    }


def test_the_verifier_fits_the_data(handrail: Handrail, tmp_path: Path) -> None:
    assert handrail("init", "builtin:house-tiny", "task:house-rules?n=8", "--output", "task.toml").code == 0
    assert load_config("task.toml").verifier.name == "task"
    wrong = [{**row, "reference": "1 + 1 = 99"} for row in ROWS]
    done = handrail("init", "builtin:house-tiny", str(jsonl(tmp_path / "wrong.jsonl", wrong)))
    assert (
        done.code == 0 and "warning: the verifier 'math' only accepts 0 of the first 4 references" in done.out
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["./nowhere", "data.jsonl"], "model.path: ./nowhere"),
        (["builtin:house-tiny", "dta.jsonl"], "dta.jsonl: there is no such file; did you mean data.jsonl"),
        (["builtin:house-tiny", "data.jsonl", "--held-out", "no.jsonl"], "no.jsonl: there is no such file"),
        (
            ["builtin:house-tiny", "data.jsonl", "--output", "data.jsonl"],
            "data.jsonl exists and is not overwritten",
        ),
        (["builtin:house-tiny", "data.jsonl", "--column", "prompt"], "--column takes our_field=their_column"),
    ],
)
def test_unusable_arguments_are_refused_in_one_sentence_and_nothing_is_written(
    arguments: list[str], part: str, handrail: Handrail, tmp_path: Path
) -> None:
    before = jsonl(tmp_path / "data.jsonl", ROWS).read_bytes()
    assert_refused(handrail("init", *arguments), part, output=Path("config.toml"))
    assert (tmp_path / "data.jsonl").read_bytes() == before


def test_a_second_init_keeps_the_edited_file(handrail: Handrail, tmp_path: Path) -> None:
    data = str(jsonl(tmp_path / "data.jsonl", ROWS))
    assert handrail("init", "builtin:house-tiny", data).code == 0
    Path("config.toml").write_text(json.dumps("mine"))
    assert_refused(handrail("init", "builtin:house-tiny", data), "config.toml exists and is not overwritten")
    assert Path("config.toml").read_text() == json.dumps("mine")
