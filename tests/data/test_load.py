"""Sources and layouts, on real files; every error message says what is wrong, where, and what to do."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from handrail._util.errors import BadRow, UserError
from handrail.data.layouts import LAYOUTS, final_answer, lookup
from handrail.data.load import describe, load, load_problems
from handrail.types.problem import Problem

GOOD = {"prompt": "1 + 1?", "answer": "2"}
USER = {"role": "user", "content": "1 + 1?"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jsonl(*rows: object, name: str = "data.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def parquet(rows: Sequence[dict[str, Any]], name: str = "data.parquet") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), name)
    return name


def refusal(source: str, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(source, columns or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


# Formats


ROWS = [{**GOOD, "reference": "1 + 1 = 2"}, {"prompt": "2 + 2?", "answer": "4", "reference": "2 + 2 = 4"}]
ANSWERS = ["2", "4"]


def check(problems: list[Problem], ids: list[str]) -> None:
    assert [problem.answer for problem in problems] == ANSWERS
    assert [problem.references for problem in problems] == [("1 + 1 = 2",), ("2 + 2 = 4",)]
    assert [problem.id for problem in problems] == ids
    assert all(problem.metadata == {} for problem in problems)


def test_jsonl() -> None:
    check(load_problems(jsonl(*ROWS)), ["data.jsonl:1", "data.jsonl:2"])


def test_json_list() -> None:
    Path("data.json").write_text(json.dumps(ROWS, indent=1))
    check(load_problems("data.json"), ["data.json:1", "data.json:2"])


def test_parquet_file_and_directory() -> None:
    check(load_problems(parquet(ROWS)), ["data.parquet:1", "data.parquet:2"])
    parquet(ROWS[:1], "many/a.parquet")
    parquet(ROWS[1:], "many/b.parquet")
    check(load_problems("many"), ["a.parquet:1", "b.parquet:1"])


def test_csv() -> None:
    """As pandas writes it: an index without a name, quotation marks, line breaks, empty cells."""
    datasets.Dataset.from_list(ROWS).to_csv("data.csv", index=True)
    check(load_problems("data.csv"), ["data.csv:2", "data.csv:3"])
    long = 'x, "y"\n' * 50_000
    rows = [{**GOOD, "reference": long, "plan": None}, {"prompt": "a", "answer": "0.50", "reference": None}]
    datasets.Dataset.from_list(rows).to_csv("long.csv")
    first, second = load_problems("long.csv")
    assert first.references == (long,) and first.plan is None and first.id == "long.csv:2"
    assert (second.answer, second.references, second.id) == ("0.50", (), "long.csv:50003")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,answer\na,b,c\n",
            "data.csv, line 2: its number of cells is 3 and the header's 2; put a cell",
        ),
        ("prompt,answer\n\na\n", "data.csv, line 3: its number of cells is 1 and the header's 2"),
        ('prompt,answer\na,b\n"c,d\n', "data.csv, line 3: it is not CSV (unexpected end of data)"),
        (
            "prompt;answer\na;b\n",
            "data.csv: its header is the one column 'prompt;answer'; separate",
        ),
        ("prompt,prompt\na,b\n", "data.csv: two columns are called 'prompt'"),
        ("prompt,answer\na,\n", "data.csv, line 2, field answer"),
        ('"prompt,answer\na,b\n', "data.csv, line 1: it is not CSV (unexpected end of data)"),
        ("\nprompt,answer\na\n", "data.csv, line 3: its number of cells is 1"),
        ("", "data.csv: it is empty"),
        ("prompt,answer\n", "data.csv: it is empty"),
    ],
)
def test_what_is_wrong_with_csv(text: str, message: str) -> None:
    Path("data.csv").write_text(text)
    assert refusal("data.csv").startswith(message)


def test_saved_dataset() -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    check(load_problems("saved"), ["saved:1", "saved:2"])
    assert "leave out '#test'" in refusal("saved#test")


def test_saved_dataset_keeps_its_selection_and_ignores_its_format() -> None:
    data = datasets.Dataset.from_list([*ROWS, {"prompt": "x", "answer": "x", "reference": "x"}]).select(
        [0, 1]
    )
    data.with_format("numpy").save_to_disk("saved")
    check(load_problems("saved"), ["saved:1", "saved:2"])


def test_saved_dataset_dict_and_split() -> None:
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk("saved")
    check(load_problems("saved"), ["saved:1", "saved:2"])
    assert [problem.id for problem in load_problems("saved#test")] == ["saved#test:1"]
    assert refusal("saved#dev") == "saved#dev: there is no split 'dev'; name one as saved#SPLIT: train, test"
    assert (
        load("saved").note == "saved: using the split 'train', of train, test; for another write saved#SPLIT"
    )
    assert load("saved#train").note == ""


SPLITS = ["saved", "files", "hub"]


def data_with_splits(kind: str, splits: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a source of ``kind`` with these splits; each has one problem, whose answer is the split's
    name."""
    rows = {split: [{"prompt": split, "answer": split}] for split in splits}
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(each) for split, each in rows.items()})
    if kind == "saved":
        made.save_to_disk("data")
    elif kind == "files":
        for split, each in rows.items():
            parquet(each, f"data/{split}-00000-of-00001.parquet")
    else:
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, config, split: made[split] if split else made
        )
    return "data"


@pytest.mark.parametrize("kind", SPLITS)
def test_train_is_chosen_among_several_splits_and_reported(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data_with_splits(kind, ["test", "train", "validation"], monkeypatch)
    loaded = load(source)
    assert [problem.answer for problem in loaded.problems] == ["train"]
    assert "using the split 'train', of " in loaded.note
    for split in ("train", "test", "validation"):
        assert [problem.answer for problem in load_problems(f"{source}#{split}")] == [split] and not load(
            f"{source}#{split}"
        ).note


@pytest.mark.parametrize("kind", SPLITS)
def test_the_only_split_is_used_and_several_without_train_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only, several = tmp_path / "only", tmp_path / "several"
    for directory in (only, several):
        directory.mkdir()
    monkeypatch.chdir(only)
    assert [problem.answer for problem in load_problems(data_with_splits(kind, ["test"], monkeypatch))] == [
        "test"
    ]
    monkeypatch.chdir(several)
    message = refusal(data_with_splits(kind, ["test", "validation"], monkeypatch))
    assert message.startswith("data: it has several splits, none of them 'train'; name one as data#SPLIT: ")
    assert "test" in message and "validation" in message


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "test-00000-of-00001.parquet"),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/test-00000-of-00001.parquet",
        ),
        (["train.parquet"], "test.parquet"),
        (["train.jsonl"], "test.jsonl"),
        (["train.json"], "test.json"),
        (["math_train.jsonl"], "math_test.jsonl"),
        (["train/a.parquet", "train/b.parquet"], "test/a.parquet"),
    ],
)
@pytest.mark.parametrize("directory", ["main", "a [1]*"])
def test_splits_are_recognized_by_file_names(train: list[str], test: str, directory: str) -> None:
    for number, name in enumerate([*train, test]):
        Path(directory, name).parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": str(number), "answer": name}
        if name.endswith("parquet"):
            parquet([row], f"{directory}/{name}")
        else:
            Path(directory, name).write_text(json.dumps([row] if name.endswith(".json") else row))
    Path(directory, "README.md").write_text("# A data set")
    assert [problem.answer for problem in load_problems(directory)] == train
    assert [problem.id for problem in load_problems(f"{directory}#train")] == [f"{name}:1" for name in train]
    assert [problem.answer for problem in load_problems(f"{directory}#test")] == [test]
    assert "there is no split 'dev'" in refusal(f"{directory}#dev")


def test_a_file_that_belongs_to_no_split_is_refused() -> None:
    for name in ("problems.jsonl", "problems-test.jsonl"):
        Path("mine").mkdir(exist_ok=True)
        jsonl(GOOD, name=f"mine/{name}")
    assert (
        refusal("mine")
        == "mine: by their names, handrail takes problems-test.jsonl for the split test, and problems.jsonl "
        "for none; name a single file, or rename one"
    )


def test_two_configurations_of_a_data_set_are_not_mixed() -> None:
    for name in ("main", "socratic"):
        parquet([GOOD], f"gsm8k/{name}/train-00000-of-00001.parquet")
    expected = (
        "gsm8k: its files are in several directories, gsm8k/main and gsm8k/socratic; name one of them, or "
        "a file"
    )
    assert refusal("gsm8k") == expected
    assert len(load_problems("gsm8k/main")) == 1


def test_damaged_saved_dataset() -> None:
    Path("saved").mkdir()
    Path("saved/dataset_info.json").write_text("{")
    assert "saved: the saved dataset cannot be read" in refusal("saved")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, split: str | None) -> datasets.Dataset:
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load_problems("org/name-1.5:main#test"), ["org/name-1.5:main#test:1", "org/name-1.5:main#test:2"])
    load("name")
    assert calls == [("org/name-1.5", "main", "test"), ("name", None, None)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    Path("problem").mkdir()
    message = refusal("problems")
    assert message.startswith(
        "problems: there is no such file, and the Hugging Face hub did not provide a dataset of that name"
    )
    assert "ConnectionError: Couldn't reach" in message and "did you mean problem?" in message


def test_import_is_light() -> None:
    check = (
        "import handrail.data.load, sys; assert not {'torch', 'datasets', 'pyarrow', 'reasoning_gym'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


# Layouts


def test_native_fields() -> None:
    chat = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "2?"}, USER]
    loaded = load(
        jsonl(
            {
                "prompt": [*chat[:3], {**USER, "name": None}],
                "answer": 2,
                "reference": ["a", "b"],
                "plan": "add",
                "id": 7,
                "level": {"x": 1},
            },
            {"prompt": "p", "answer": 0.5, "references": ["a"], "reference": None, "plan": None, "id": None},
        )
    )
    assert loaded.layout == "native"
    assert loaded.problems == [
        Problem("7", chat, "2", ("a", "b"), "add", {"level": {"x": 1}}),
        Problem("data.jsonl:2", "p", "0.5", ("a",)),
    ]


@pytest.mark.parametrize(
    "written, read", [(10**40 + 1, str(10**40 + 1)), ("1,234,567", "1,234,567"), (-3, "-3"), (" 2 ", " 2 ")]
)
def test_answers_are_kept_exactly(written: object, read: str) -> None:
    assert load_problems(jsonl({**GOOD, "answer": written}))[0].answer == read


NUMBERS = [
    (0.00001, "0.00001"),
    (-2.5e-7, "-0.00000025"),
    (1e16, "10000000000000000"),
    (36.0, "36"),
    (0.1, "0.1"),
    (Decimal("12.50"), "12.50"),
    (Decimal("1E-8"), "0.00000001"),
    (2**62, str(2**62)),
]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    "written, read",
    [
        ("0.50", "0.50"),
        ("1e-05", "0.00001"),
        ("-2.5E+3", "-2500"),
        ("36.0", "36.0"),
        ("0.1000000000000000055", None),
    ],
)
def test_numbers_of_json_keep_their_digits(name: str, written: str, read: str | None) -> None:
    row = f'{{"prompt": "p", "answer": {written}, "rate": 0.25}}'
    Path(name).write_text(f"[{row}]" if name == "data.json" else row)
    (problem,) = load_problems(name)
    assert (problem.answer, problem.metadata) == (read or written, {"rate": 0.25})
    assert (
        json.dumps(problem.metadata) == '{"rate": 0.25}'
        and copy.deepcopy(problem) == pickle.loads(pickle.dumps(problem)) == problem
    )


@pytest.mark.parametrize("written", ["1e-999999999", "1e999"])
def test_numbers_too_long_to_write_out_are_refused(written: str) -> None:
    Path("data.jsonl").write_text(f'{{"prompt": "p", "answer": {written}}}')
    assert "line 1, field answer: it is " in refusal("data.jsonl")


def test_single_precision_is_read_as_written() -> None:
    table = pyarrow.table(
        {"prompt": ["p", "q", "r"], "answer": pyarrow.array([0.1, 1e-5, 12], pyarrow.float32())}
    )
    pyarrow.parquet.write_table(table, "data.parquet")
    datasets.Dataset(table).save_to_disk("saved")
    for source in ("data.parquet", "saved"):
        assert [problem.answer for problem in load_problems(source)] == ["0.1", "0.00001", "12"]


@pytest.mark.parametrize("number, text", NUMBERS)
def test_numbers_are_written_without_an_exponent(number: object, text: str) -> None:
    row = {"prompt": "p", "answer": number, "id": number}
    assert [(problem.answer, problem.id) for problem in load_problems(parquet([row]))] == [(text, text)]


LUFFY = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Think."}, USER],
    "target": [{"role": "assistant", "content": "1 + 1 = 2"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 3, "split": "train"},
}


@pytest.mark.parametrize("write", [lambda rows: jsonl(*rows), parquet])
def test_luffy(write: Any) -> None:
    loaded = load(write([LUFFY, {**LUFFY, "target": None}]))
    first, second = loaded.problems
    assert loaded.layout == "LUFFY"
    assert (first.prompt, first.answer, first.references) == (LUFFY["prompt"], "2", ("1 + 1 = 2",))
    assert first.metadata == {
        key: LUFFY[key] for key in ("data_source", "ability", "reward_model", "extra_info")
    }
    assert second.references == ()


OPTIONAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"reference": []}, {"reference": ["r"]}),
    ({"references": []}, {"references": ["r"]}),
    ({"references": [None, ""]}, {"references": ["r"]}),
    ({"reference": [" "]}, {"reference": ["r"]}),
    ({"reference": ""}, {"reference": "r"}),
    ({"plan": ""}, {"plan": "p"}),
    ({"plan": " \n"}, {"plan": "p"}),
    ({"id": ""}, {"id": "i"}),
]


@pytest.mark.parametrize(("empty", "filled"), OPTIONAL)
@pytest.mark.parametrize("write", [lambda rows: jsonl(*rows), parquet])
def test_an_optional_column_may_be_empty(empty: dict[str, Any], filled: dict[str, Any], write: Any) -> None:
    source = write([{**GOOD, **empty}, {**GOOD, **filled}])
    bare, full = load_problems(source)
    assert bare == Problem(f"{source}:1", "1 + 1?", "2")
    assert (full.references, full.plan, full.id) != ((), None, f"{source}:2")


def test_empty_items_of_a_list_are_not_references() -> None:
    assert load_problems(jsonl({**GOOD, "reference": ["", "a", None, " "]}))[0].references == ("a",)


@pytest.mark.parametrize("target", [[], "", [{"role": "assistant", "content": ""}]])
def test_an_empty_target_in_luffys_layout_is_not_a_reference(target: object) -> None:
    assert load_problems(jsonl({**LUFFY, "target": target}))[0].references == ()


def test_luffy_text_target() -> None:
    assert load_problems(jsonl({**LUFFY, "target": "so 2"}))[0].references == ("so 2",)


def test_gsm8k() -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is 1000+24 = <<1000+24=1024>>1,024.\n#### 1,024"
    loaded = load(parquet([{"question": "How many?", "answer": answer}]))
    assert loaded.layout == "GSM8K"
    reference = "She sold 48/2 = 24 clips.\nThat is 1000+24 = 1,024.\n#### 1,024"
    assert loaded.problems == [Problem("data.parquet:1", "How many?", "1,024", (reference,))]


def test_trl() -> None:
    boxed, hashed = r"So \boxed{1} or \boxed{\frac{1}{\{2\}}}.", "Add.\n#### 5\n"
    loaded = load(jsonl(*({"prompt": "p", "solution": text} for text in (boxed, hashed, r"$\boxed{6}$."))))
    assert loaded.layout == "TRL"
    answers = [(problem.answer, problem.references) for problem in loaded.problems]
    assert answers == [
        (r"\frac{1}{\{2\}}", (boxed,)),
        ("5", (hashed,)),
        ("6", ()),
    ]  # an answer alone is no reference
    loaded = load(jsonl(*({"prompt": "p", "solution": text} for text in ("$5$", 5, "x"))))
    assert [(problem.answer, problem.references) for problem in loaded.problems] == [
        ("$5$", ()),
        ("5", ()),
        ("x", ()),
    ]


SOLUTION = r"Half of $84$ is $\boxed{42}$."
ASKED = {"role": "user", "content": "Q"}
PUBLIC: list[tuple[str, str, dict[str, Any], str, str, tuple[str, ...]]] = [
    (
        "MATH",
        "MATH",
        {"problem": "Q", "solution": SOLUTION, "level": "Level 1", "type": "Algebra"},
        "Q",
        "42",
        (SOLUTION,),
    ),
    (
        "NuminaMath-CoT",
        "MATH",
        {"source": "amc", "problem": "Q", "solution": SOLUTION, "messages": [ASKED]},
        "Q",
        "42",
        (SOLUTION,),
    ),
    (
        "math-ai/aime24",
        "MATH",
        {"id": 60, "problem": "Q", "solution": r"\boxed{42}", "url": "u"},
        "Q",
        "42",
        (),
    ),
    (
        "MATH-500",
        "MATH-500",
        {
            "problem": "Q",
            "solution": SOLUTION,
            "answer": "42",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/1.json",
        },
        "Q",
        "42",
        (SOLUTION,),
    ),
    (
        "OpenR1-Math",
        "MATH-500",
        {
            "problem": "Q",
            "solution": "Halve it.",
            "answer": "42",
            "uuid": "u",
            "generations": ["a", "b"],
            "messages": [ASKED],
        },
        "Q",
        "42",
        ("Halve it.",),
    ),
    ("DeepScaleR", "MATH-500", {"problem": "Q", "answer": "42", "solution": ""}, "Q", "42", ()),
    (
        "Big-Math",
        "MATH-500",
        {"problem": "Q", "answer": "42", "source": "s", "domain": ["d"], "llama8b_solve_rate": 0.5},
        "Q",
        "42",
        (),
    ),
    (
        "AIME 2024",
        "MATH-500",
        {"id": 60, "problem": "Q", "solution": SOLUTION, "answer": "042", "year": "2024"},
        "Q",
        "042",
        (SOLUTION,),
    ),
    (
        "Maxwell-Jia/AIME_2024",
        "AIME",
        {"ID": "I-1", "Problem": "Q", "Solution": "Halve.", "Answer": 42},
        "Q",
        "42",
        ("Halve.",),
    ),
    ("AIME 2025", "question and answer", {"question": "Q", "answer": "42"}, "Q", "42", ()),
    (
        "GSM8K",
        "GSM8K",
        {"question": "Q", "answer": "84/2=<<84/2=42>>42\n#### 42"},
        "Q",
        "42",
        ("84/2=42\n#### 42",),
    ),
    (
        "OlympiadBench",
        "OlympiadBench",
        {
            "question": "Q",
            "solution": ["Halve."],
            "final_answer": ["$42$"],
            "context": "Let $n=84$.",
            "image_1": None,
        },
        "Let $n=84$.\n\nQ",
        "$42$",
        ("Halve.",),
    ),
    (
        "OpenMathInstruct",
        "OpenMath",
        {"problem": "Q", "generated_solution": "Halve.", "expected_answer": "42"},
        "Q",
        "42",
        ("Halve.",),
    ),
    ("s1K", "s1K", {"question": "Q", "solution": "42", "cot_type": "math"}, "Q", "42", ()),
    (
        "DAPO",
        "verl",
        {"prompt": [ASKED], "reward_model": {"ground_truth": "42", "style": "rule"}},
        "Q",
        "42",
        (),
    ),
    ("verl's page", "verl", {"prompt": [ASKED], "reward_model": {"ground_truth": ["42"]}}, "Q", "42", ()),
    ("Skywork-OR1", "verl", {"prompt": [ASKED], "reward_model": {"ground_truth": '["42"]'}}, "Q", "42", ()),
    (
        "LUFFY's validation",
        "verl",
        {"prompt": [ASKED], "reward_model": {"ground_truth": "42"}, "extra_info": {"index": 1}},
        "Q",
        "42",
        (),
    ),
    (
        "MMLU",
        "question and answer",
        {"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "s"},
        "Q\n\nA. a\nB. b",
        "B",
        (),
    ),
    (
        "MMLU-Pro",
        "question and answer",
        {"question": "Q", "options": ["a", "b"], "answer": "B"},
        "Q\n\nA. a\nB. b",
        "B",
        (),
    ),
    (
        "ARC",
        "ARC",
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "Q\n\n1. a\n2. b",
        "2",
        (),
    ),
    (
        "AQuA",
        "AQuA",
        {"question": "Q", "options": ["A)21", "B) 42"], "correct": "B"},
        "Q\n\nA. 21\nB. 42",
        "B",
        (),
    ),
    (
        "GPQA",
        "GPQA",
        {
            "Question": "Q",
            "Correct Answer": "b",
            "Incorrect Answer 1": "c",
            "Incorrect Answer 2": "a",
            "Incorrect Answer 3": "d",
        },
        "Q\n\nA. a\nB. b\nC. c\nD. d",
        "B",
        (),
    ),
]


@pytest.mark.parametrize(
    "name, layout, row, prompt, answer, references", PUBLIC, ids=[case[0] for case in PUBLIC]
)
@pytest.mark.parametrize("write", [lambda rows: jsonl(*rows), parquet], ids=["jsonl", "parquet"])
def test_public_data_sets_are_read_untouched(
    name: str,
    layout: str,
    row: dict[str, Any],
    prompt: str,
    answer: str,
    references: tuple[str, ...],
    write: Any,
) -> None:
    loaded = load(write([row]))
    (problem,) = loaded.problems
    asked = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    assert (loaded.layout, asked, problem.answer, problem.references) == (layout, prompt, answer, references)


def test_documented_layouts_are_those_that_are_recognized() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    documented = dict(re.findall(r"^\| (.+?) \| (`.+?`) \|", text, re.MULTILINE))
    assert {layout.name for layout in LAYOUTS} | {"GSM8K"} <= set(documented)
    for layout in LAYOUTS:
        assert layout.needs <= set(re.findall("`(.+?)`", documented[layout.name])), layout.name


def test_a_loaded_source_says_which_column_each_field_comes_from() -> None:
    said = load(jsonl({"problem": "Q", "solution": SOLUTION, "id": "a"})).fields
    assert (
        said == r"prompt from problem, answer from the last \boxed{} or #### of solution, id, reference from "
        r"solution"
    )
    said = load(jsonl({"question": "Q", "options": ["a", "b"], "answer": "B", "category": "x"})).fields
    assert said == "prompt from question, answer as a letter, choices from options written into the prompt"
    assert load(jsonl(GOOD)).fields == "prompt, answer"


MIXED = {"question": "p", "answer": "Add.\n#### 5"}


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [MIXED, MIXED, {**MIXED, "answer": "5"}],
            r"line 3, field answer: its text holds no \boxed{ANSWER} and does not end in '####",
        ),
        ([MIXED, MIXED, {**MIXED, "answer": 5}], "line 3, field answer: its text holds no "),
        (
            [{**MIXED, "answer": "5"}, {**MIXED, "answer": "6"}, MIXED],
            "line 3, field answer: it is a worked solution, and most rows have a",
        ),
        (
            [{"prompt": "p", "solution": text} for text in (SOLUTION, SOLUTION, "so it is 42")],
            "line 3, field answer: its text holds no",
        ),
        ([{"problem": "p", "solution": "Obvious."}], "line 1, field answer: its text holds no"),
        (
            [{"problem": "p", "answer": text} for text in ("5", "proof", "notfound")],
            "line 2, field answer: it says that there is no answer",
        ),
        (
            [{"prompt": [USER], "reward_model": {"ground_truth": ["1", "2"]}}],
            "line 1, field answer: it is a list of 2; give one answer",
        ),
        (
            [{"question": "p", "answer": "5", "image_1": {"bytes": "x", "path": None}}],
            "line 1, field image_1: it holds an image",
        ),
        (
            [{"question": "p", "answer": "5", "images": [{"bytes": "x"}]}],
            "line 1, field images: it holds an image",
        ),
        (
            [{"question": "p", "answer": 2, "choices": ["a", "b"]}],
            "line 1, field answer: no choice has this number, counting from 0",
        ),
        (
            [{"question": "p", "answer": "c", "choices": ["a", "b"]}],
            "line 1, field answer: it is neither a choice's letter nor a choice",
        ),
        (
            [{"question": "p", "answer": "A", "choices": ["B", "A"]}],
            "line 1, field answer: it is the letter of one choice and the text of",
        ),
        (
            [{"question": "p", "answer": 0, "choices": [1, 2]}],
            "line 1, field choices: one of them is not text",
        ),
        (
            [{"question": "p", "answer": 0, "choices": "1, 2"}],
            "line 1, field choices: this is not a list of at least two choices",
        ),
        (
            [{"question": "p", "answer": 0, "choices": ["x"] * 27}],
            "line 1, field choices: there are more choices than labels",
        ),
    ],
)
def test_rows_that_would_be_read_wrongly_are_refused(rows: list[dict[str, Any]], said: str) -> None:
    assert refusal(jsonl(*rows)).startswith(f"data.jsonl, {said}")


def test_answers_are_extracted_from_worked_solutions_unless_there_are_references() -> None:
    row = {"prompt": "p", "answer": "Add.\n#### 5"}
    assert [(p.answer, p.references) for p in load_problems(jsonl(row))] == [("5", ("Add.\n#### 5",))]
    assert [(p.answer, p.references) for p in load_problems(jsonl({**row, "reference": "r"}))] == [
        ("5", ("r",))
    ]
    assert load_problems(jsonl(row), {"prompt": "prompt"})[0].answer == row["answer"]


def test_choices_are_shown_once_and_other_columns_of_that_name_are_metadata() -> None:
    shown = "Which?\nA) a\nB) b"
    row = {"prompt": [{"role": "user", "content": shown}], "answer": "b", "choices": ["a", "b"]}
    (problem,) = load_problems(jsonl(row))
    assert (problem.prompt, problem.answer) == (row["prompt"], "B")
    (problem,) = load_problems(jsonl({**GOOD, "choices": "two", "options": {"x": 1}}))
    assert (problem.prompt, problem.metadata) == (GOOD["prompt"], {"choices": "two", "options": {"x": 1}})
    (problem,) = load_problems(
        jsonl({"q": "p", "key": "b", "any": ["a", "b"]}), {"prompt": "q", "answer": "key", "choices": "any"}
    )
    assert (problem.prompt, problem.answer) == ("p\n\nA. a\nB. b", "B")


@pytest.mark.parametrize(
    "text", ["#### Step 1\nthen 5", "5", r"<think>\boxed{5}</think> So I gave up.", r"<think>\boxed{5}"]
)
def test_no_final_answer(text: str) -> None:
    assert final_answer(text) is None


def test_a_draft_in_the_thinking_is_no_answer() -> None:
    draft = r"<think>Is it \boxed{4}? No, \boxed{5</think>"
    rows = [
        {"problem": "p", "solution": f"{draft}Add.\n#### 6"},
        {"problem": "q", "solution": rf"{draft}\boxed{{7}}"},
    ]
    assert [(p.answer, p.references) for p in load_problems(jsonl(*rows))] == [
        ("6", (rows[0]["solution"],)),
        ("7", (rows[1]["solution"],)),
    ]


@pytest.mark.parametrize("text", [r"<think>\boxed{5}</think> So 5.", r"<think>So \boxed{5}"])
def test_an_answer_in_the_thinking_alone_is_refused(text: str) -> None:
    said = r"data.jsonl, line 1, field answer: its text after the thinking holds no \boxed{ANSWER}"
    assert refusal(jsonl({"problem": "p", "solution": text})).startswith(said)
    whole = {"question": "p", "answer": text}
    assert "field answer: it is a worked solution" in refusal(
        jsonl(*[{"question": "p", "answer": "5"}] * 2, whole)
    )


def test_an_unclosed_box_is_refused() -> None:
    with pytest.raises(BadRow):
        final_answer(r"\boxed{1")


def test_column_map() -> None:
    row = {"query": "p", "reward_model": {"ground_truth": 5}, "answer": "long text", "a.b": "r"}
    loaded = load(jsonl(row), {"prompt": "query", "answer": "reward_model.ground_truth", "reference": "a.b"})
    assert loaded.layout == "column map"
    metadata = {"reward_model": {"ground_truth": 5}, "answer": "long text"}
    assert loaded.problems == [Problem("data.jsonl:1", "p", "5", ("r",), metadata=metadata)]


def test_column_map_overrides_recognition() -> None:
    (problem,) = load_problems(jsonl({"question": "p", "answer": "a #### 5"}), {"prompt": "question"})
    assert (problem.answer, problem.references) == ("a #### 5", ())


def test_columns_that_the_map_does_not_name_are_metadata() -> None:
    row = {
        "q": "p",
        "a": "5",
        "id": "same",
        "reference": "https://example.org",
        "plan": 3,
        "references": {},
        "choices": 1,
    }
    first, second = load_problems(jsonl(row, row), {"prompt": "q", "answer": "a"})
    assert (first.id, second.id, first.references, first.plan) == ("data.jsonl:1", "data.jsonl:2", (), None)
    assert first.metadata == {key: value for key, value in row.items() if key not in ("q", "a")}


def test_column_map_refused() -> None:
    source = jsonl(GOOD)
    message = "data.jsonl: the column map has the unknown field 'promt'; the fields are prompt, answer, "
    assert refusal(source, {"promt": "prompt"}).startswith(message)
    message = (
        "data.jsonl, field answer: the column map names the column 'x.y', which does not exist; the "
        "columns are prompt, answer"
    )
    assert refusal(source, {"answer": "x.y"}) == message


# Bad files


def test_missing_file() -> None:
    jsonl(GOOD, name="train.jsonl")
    assert refusal("trian.jsonl") == "trian.jsonl: there is no such file; did you mean train.jsonl?"
    assert "nothing in . has a name like it" in refusal("zzzzzzz.json")
    assert "there is no directory no/such either" in refusal("no/such/x.jsonl")


def test_unusable_files() -> None:
    Path("data.tsv").write_text("prompt\tanswer\n")
    assert (
        refusal("data.tsv")
        == "data.tsv: '.tsv' files are not supported; convert it to one of .jsonl, .json, .parquet, .csv"
    )
    assert refusal(jsonl(GOOD) + "#test") == "data.jsonl#test: a single file has no splits; leave out '#test'"
    Path("bad.parquet").write_text("no parquet at all")
    assert "bad.parquet: it cannot be read as parquet" in refusal("bad.parquet")
    Path("nothing").mkdir()
    assert (
        "nothing: this directory holds no .jsonl, .json, .parquet, .csv file and no dataset of save_to_disk"
        in refusal("nothing")
    )


def test_unreadable_file() -> None:
    Path(jsonl(GOOD)).chmod(0)
    Path().chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root can read every file, so the test runs as another user
    try:
        assert "data.jsonl: it cannot be read (PermissionError" in refusal("data.jsonl")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "name, text", [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", ""), ("a.json", "[]")]
)
def test_empty_file(name: str, text: str) -> None:
    Path(name).write_text(text)
    assert refusal(name) == f"{name}: it is empty; give it at least one row"


def test_empty_parquet() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "a.parquet")
    assert refusal("a.parquet") == "a.parquet: it is empty; give it at least one row"


def test_blank_lines_line_endings_and_byte_order_mark() -> None:
    second = json.dumps({**GOOD, "answer": "a\u2028b"}, ensure_ascii=False)  # U+2028 does not end a line
    Path("data.jsonl").write_bytes(b"\xef\xbb\xbf" + f"\r\n{json.dumps(GOOD)}\r\n  \r\n{second}".encode())
    answers = {problem.id: problem.answer for problem in load_problems("data.jsonl")}
    assert answers == {"data.jsonl:2": "2", "data.jsonl:4": "a\u2028b"}


def test_not_utf8() -> None:
    Path("data.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xe9"}\n')
    assert refusal("data.jsonl") == "data.jsonl, line 2: it is not UTF-8; save the file as UTF-8"


def test_invalid_json() -> None:
    Path("data.jsonl").write_text(json.dumps(GOOD) + '\n\n{"prompt": }\n{"a"}\n')
    message = (
        "data.jsonl, line 3: it is not JSON (and in 1 more row); Expecting value at column 12: write one "
        "JSON object on each line"
    )
    assert refusal("data.jsonl") == message
    Path("data.json").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert refusal("data.json").startswith(
        "data.json, line 2, column 1: it is not JSON (Extra data); correct it, or name the file .jsonl"
    )
    Path("data.json").write_text(json.dumps(GOOD))
    assert refusal("data.json").startswith("data.json: it does not hold a list")


@pytest.mark.parametrize("text", [json.dumps([GOOD]), json.dumps([GOOD, GOOD], indent=1)])
def test_a_list_that_is_named_jsonl_is_told_its_name(text: str) -> None:
    Path("data.jsonl").write_text(text)
    said = "data.jsonl: it holds one JSON list, not an object on each line; name the file .json"
    assert refusal("data.jsonl") == said


@pytest.mark.parametrize("name", ["DATA.JSONL", "Data.Json", "data.PARQUET"])
def test_a_suffix_may_be_in_capitals(name: str) -> None:
    if name.endswith("PARQUET"):
        parquet([GOOD], name)
    else:
        Path(name).write_text(json.dumps([GOOD] if name.endswith("Json") else GOOD))
    assert load_problems(name)[0].answer == "2"
    Path("folder").mkdir()
    Path(name).rename(f"folder/{name}")
    assert load_problems("folder")[0].answer == "2"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("9" * 5000, "it holds a whole number of more than 4300 digits; write the number as text"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply to be read; put fewer brackets inside"),
    ],
)
def test_json_that_python_cannot_read(value: str, said: str) -> None:
    Path("data.jsonl").write_text(f'{{"prompt": "p", "answer": {value}}}')
    assert refusal("data.jsonl").startswith(f"data.jsonl, line 1: {said}")
    Path("data.json").write_text(f"[{value}]")
    assert refusal("data.json").startswith(f"data.json: {said}")


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"prompt": "1", "answer": "1", "prompt": "2"}', "prompt"),
        ('{"prompt": "1", "answer": "1", "extra": [[{"a": 1, "a": 2}]]}', "a"),
    ],
)
def test_a_key_that_is_repeated_is_refused(row: str, key: str) -> None:
    what = f"a key is repeated in an object; leave out one of the keys '{key}'"
    Path("data.jsonl").write_text(json.dumps(GOOD) + "\n" + row)
    assert refusal("data.jsonl") == f"data.jsonl, line 2: {what}"
    Path("data.json").write_text(f"[{json.dumps(GOOD)}, {row}]")
    assert refusal("data.json", {"answer": "answer"}) == f"data.json, row 2: {what}"
    Path("data.json").write_text(f"[{row}]")
    assert refusal("data.json", {"answer": "answer"}) == f"data.json, row 1: {what}"


def test_two_columns_of_one_name_are_refused() -> None:
    table = pyarrow.table([["1"], ["1"], ["2"]], names=["prompt", "answer", "prompt"])
    pyarrow.parquet.write_table(table, "data.parquet")
    said = "data.parquet: two columns are called 'prompt'; rename or leave out one of them"
    assert refusal("data.parquet") == said


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (pyarrow.array([None, 2**60], pyarrow.timestamp("us")), "OverflowError"),
        (pyarrow.array([None, 2**30], pyarrow.int32()).cast(pyarrow.date32()), "OverflowError"),
        (pyarrow.array([b"a", b"\xff"]).view(pyarrow.string()), "UnicodeDecodeError"),
    ],
    ids=["timestamp", "date", "text"],
)
def test_a_value_that_python_cannot_hold_harms_only_if_its_column_is_used(values: Any, error: str) -> None:
    columns = {"prompt": ["1", "2"], "answer": ["1", "2"], "when": values}
    pyarrow.parquet.write_table(pyarrow.table(columns), "data.parquet")
    first, second = load_problems("data.parquet")
    assert "when" in first.metadata and second.metadata == {}
    message = refusal("data.parquet", {"answer": "when"} if error == "UnicodeDecodeError" else {"id": "when"})
    field = "answer" if error == "UnicodeDecodeError" else "id"
    said = f"data.parquet, row 2, field {field}: the value of its column 'when' cannot be read; correct it"
    assert said in message and error in message


def test_an_unreadable_value_inside_a_column_is_named_by_its_dotted_path() -> None:
    truth = pyarrow.array([{"ground_truth": b"\xff"}]).cast(
        pyarrow.struct({"ground_truth": pyarrow.binary()})
    )
    column = pyarrow.StructArray.from_arrays([truth.field(0).view(pyarrow.string())], ["ground_truth"])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1"], "reward_model": column}), "data.parquet")
    said = "data.parquet, row 1, field answer: the value of its column 'reward_model' cannot be read"
    assert refusal("data.parquet").startswith(said)


# Bad rows


def test_missing_field() -> None:
    message = refusal(jsonl(GOOD, {"prompt": "p", "label": "5"}, GOOD, {"prompt": "p"}, {"answer": "p"}))
    assert message == (
        "data.jsonl, line 2, field answer: this row has no answer (and in 1 more row); "
        "fill in its 'answer', or leave the row out"
    )
    message = refusal(jsonl(*[{"question": "p", "answer": "so\n#### 1"}] * 4, {"question": "p"}))
    assert (
        message == "data.jsonl, line 5, field answer: this row has no answer; "
        "fill in its 'answer', or leave the row out"
    )
    message = refusal(jsonl({"prompt": "p", "label": "5"}, {"prompt": "q", "label": "6"}))
    assert message == (
        "data.jsonl, line 1, field answer: there is no column 'answer' (and in 1 more row); "
        "the row has prompt, label: rename one, or name it in the column map, "
        'columns = {answer = "their column"}'
    )


@pytest.mark.parametrize("source", ["", "#train"])
def test_an_empty_source_is_not_the_working_directory(source: str) -> None:
    jsonl(GOOD)
    assert refusal(source) == (
        f"the data source {source!r} names nothing; give a file, a directory or a dataset"
    )


def test_rows_that_all_lack_a_column_are_refused_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(row: Mapping[str, Any], path: str) -> Any:
        nonlocal calls
        calls += 1
        return lookup(row, path)

    monkeypatch.setattr("handrail.data.load.lookup", counted)
    message = refusal(jsonl(*[{"prompt": f"{number}?"} for number in range(1000)]))
    assert message.startswith("data.jsonl, line 1, field answer: there is no column 'answer' (and in 999")
    assert calls <= 10 * 1000  # a few for each row, not one for each pair of rows


def test_unrecognized_layout() -> None:
    message = refusal(parquet([{"task": "p", "label": "5"}] * 3))
    assert message.startswith(
        "data.parquet, row 1, field prompt: there is no column 'prompt' (and in 2 more rows)"
    )
    assert "the row has task, label: rename one" in message


def test_a_message_in_parts_of_text_is_one_text() -> None:
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "two", "image": None}]
    (problem,) = load_problems(parquet([{**GOOD, "prompt": [{**USER, "content": parts}]}]))
    assert problem.prompt == [{"role": "user", "content": "what is two"}]


BAD_ROWS: list[tuple[object, str, str]] = [
    (["prompt"], "", "the row is not an object; write it as"),
    ({**GOOD, "prompt": 5}, "prompt", "it is a number; make it text or a list of messages"),
    ({**GOOD, "prompt": " "}, "prompt", "it is empty"),
    ({**GOOD, "prompt": []}, "prompt", "it is empty"),
    ({**GOOD, "prompt": None}, "prompt", "it is null"),
    ({**GOOD, "prompt": "\ud800"}, "prompt", "it holds half a character"),
    ({**GOOD, "prompt": [{"role": "user"}]}, "prompt", "a message has no role or no text as content"),
    ({**GOOD, "prompt": ["hello"]}, "prompt", "a message has no role or no text as content"),
    (
        {**GOOD, "prompt": [{**USER, "content": [{"type": "text"}]}]},
        "prompt",
        "a message has no role or no text as content",
    ),
    (
        {**GOOD, "prompt": [{**USER, "content": [{"type": "image", "url": "x"}]}]},
        "prompt",
        "more than text; remove its part of type 'image'",
    ),
    (
        {**GOOD, "prompt": [{**USER, "role": "human"}]},
        "prompt",
        "unknown role; 'human' is none of system, user, assistant",
    ),
    (
        {**GOOD, "prompt": [USER, {**USER, "role": "assistant"}]},
        "prompt",
        "its last message is from the assistant; end it with the user's",
    ),
    ({**GOOD, "prompt": [{**USER, "role": "system"}]}, "prompt", "its last message is from the system"),
    ({**GOOD, "prompt": [{**USER, "content": ""}]}, "prompt", "it is empty"),
    ({**GOOD, "answer": None}, "answer", "it is empty (null); fill it in"),
    ({**GOOD, "answer": ""}, "answer", "it is empty"),
    ({**GOOD, "answer": True}, "answer", "it is true or false; make it text or a number"),
    ({**GOOD, "answer": ["2", "3"]}, "answer", "it is a list of 2; give one answer"),
    ({**GOOD, "answer": []}, "answer", "it is a list of 0"),
    ({**GOOD, "answer": [True]}, "answer", "it is true or false"),
    ({**GOOD, "answer": float("nan")}, "answer", "it is NaN or infinite"),
    ({**GOOD, "answer": float("-inf")}, "answer", "it is NaN or infinite"),
    ({**GOOD, "references": ["a", 5]}, "references", "the list holds something that is not text"),
    ({**GOOD, "reference": {"a": 1}}, "reference", "it is an object; make it text or a list of texts"),
    ({**GOOD, "plan": 3}, "plan", "it is a number; make it text"),
    ({**GOOD, "id": {}}, "id", "it is an object"),
]


@pytest.mark.parametrize("row, field, what", BAD_ROWS)
def test_bad_row(row: object, field: str, what: str) -> None:
    message = refusal(jsonl(GOOD, GOOD, row))
    assert message.startswith("data.jsonl, line 3, field " + field if field else "data.jsonl, line 3: ")
    assert what in message


@pytest.mark.parametrize(
    "row, field",
    [
        ({"prompt": "p", "solution": r"\boxed{5"}, r"answer: its last \boxed{ is never closed"),
        ({"prompt": "p", "solution": r"\boxed{}"}, "answer: it is empty"),
        (
            {**LUFFY, "target": [{"role": "assistant"}]},
            "reference: the list holds something that is not text",
        ),
        ({**LUFFY, "reward_model": {}}, "answer: there is no column 'reward_model.ground_truth'"),
    ],
)
def test_bad_row_of_other_layouts(row: dict[str, Any], field: str) -> None:
    assert refusal(jsonl(row)).startswith(f"data.jsonl, line 1, field {field}")


def test_null_in_parquet() -> None:
    message = refusal(parquet([GOOD, {**GOOD, "answer": None}, {**GOOD, "answer": None}]))
    assert (
        message
        == "data.parquet, row 2, field answer: it is empty (null) (and in 1 more row); fill it in, or "
        "leave the row out"
    )


def test_duplicate_id() -> None:
    message = refusal(jsonl({**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}))
    assert (
        message
        == "data.jsonl, line 3, field id: another row has the same id; 'a' is also the id of data.jsonl, "
        "line 1: change one of them"
    )


# Built-in tasks


def test_task() -> None:
    loaded = load("task:house-rules?level=easy&n=5&seed=3&style=foreign&house=2")
    assert (loaded.layout, len(loaded.problems)) == ("task", 5)
    assert loaded.problems[0].id.startswith("easy-train-3-")
    assert len(load_problems("task:house-rules")) == 1000
    assert load_problems("task:house-rules?n=5", {"prompt": "question"}) == load_problems(
        "task:house-rules?n=5"
    )


def test_task_splits_are_disjoint() -> None:
    train, test = (
        load_problems(f"task:house-rules?n=2000&house=1&split={split}") for split in ("train", "test")
    )
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in test}


def test_a_task_has_the_number_of_problems_that_was_requested() -> None:
    assert len(load_problems("task:house-rules?house=1&split=test&n=10000")) == 10_000


@pytest.mark.parametrize(
    "source, what",
    [
        ("task:houses", "there is no task 'houses'; the tasks are house-rules"),
        (
            "task:house-rules?lvel=easy",
            "no option 'lvel'; its options are level, n, seed, style, split, house",
        ),
        ("task:house-rules?level=medium", "level is 'medium'; it must be one of easy, hard"),
        ("task:house-rules?n=many", "n is 'many'; it must be a whole number"),
        ("task:house-rules?n=0", "n is 0; here it must be from 1 to 100000"),
        ("task:house-rules?house=1&n=10001", "n is 10001; here it must be from 1 to 10000"),
        ("task:house-rules?house=9", "house is 9; here it must be from 1 to 6"),
        ("task:house-rules?house=0", "house is 0; here it must be from 1 to 6"),
        ("task:house-rules?n", "'n' is not an option; write key=value"),
        ("task:house-rules?n=1&n=2", "the option 'n' is given twice"),
    ],
)
def test_task_refused(source: str, what: str) -> None:
    message = refusal(source)
    assert message.startswith(f"{source}: ") and what in message


# Reasoning-gym


def test_reasoning_gym() -> None:
    loaded = load("reasoning-gym:gsm_symbolic?n=3&seed=7&difficulty=1.0")
    assert (loaded.layout, len(loaded.problems)) == ("reasoning-gym", 3)
    for index, problem in enumerate(loaded.problems):
        assert problem.id == f"gsm_symbolic-7-{index}"
        assert problem.references == (problem.metadata["answer_cot"],)
        assert problem.references[0].endswith(problem.answer)
        assert problem.metadata["source_dataset"] == "gsm_symbolic"
    assert loaded.problems == load_problems("reasoning-gym:gsm_symbolic?size=3&seed=7&difficulty=1.0")


def test_reasoning_gym_defaults_and_options() -> None:
    problems = load_problems("reasoning-gym:chain_sum?min_terms=2&max_terms=2&allow_negation=False")
    assert len(problems) == 1000
    assert problems == load_problems(
        "reasoning-gym:chain_sum?min_terms=2&max_terms=2&allow_negation=False&seed=0"
    )
    assert {problem.metadata["num_terms"] for problem in problems} == {2}
    assert problems[0].references == ()


def test_n_is_passed_to_n_queens_as_its_own_option() -> None:
    assert len(load_problems("reasoning-gym:n_queens?n=5&min_remove=1&max_remove=2&size=2")) == 2


@pytest.mark.parametrize(
    "source, what",
    [
        ("reasoning-gym:chainsum", "no family 'chainsum'; did you mean one of chain_sum"),
        ("reasoning-gym:chain_sum?terms=3", "takes no option 'terms' here; its options are n, min_terms"),
        ("reasoning-gym:basic_arithmetic?operators=3", "takes no option 'operators' here"),
        ("reasoning-gym:chain_sum?n=2&size=3", "n and size are the same option"),
        ("reasoning-gym:chain_sum?n=0", "the number of problems is 0; it must be at least 1"),
        ("reasoning-gym:chain_sum?n=1.5", "n is '1.5'; it must be a whole number"),
        ("reasoning-gym:chain_sum?min_terms=few", "min_terms is 'few'; it must be a value like 2"),
        ("reasoning-gym:chain_sum?min_terms=9", "reasoning-gym refuses these options (AssertionError: "),
        ("reasoning-gym:rush_hour?n=2", "no single answer to compare with"),
    ],
)
def test_reasoning_gym_refused(source: str, what: str) -> None:
    message = refusal(source)
    assert message.startswith(f"{source}: ") and what in message


# Summary


def test_describe() -> None:
    rows = [
        {**GOOD, "reference": ["a", "b"], "plan": "add"},
        {"prompt": [USER], "answer": "2"},
        {**GOOD, "reference": "a"},
        {"prompt": [USER], "answer": "3"},
        {**GOOD, "answer": "4"},
    ]
    summary = describe(load_problems(jsonl(*rows)), "data.jsonl")
    assert (summary.problems, summary.with_references, summary.references, summary.with_plan) == (5, 2, 3, 1)
    assert (summary.duplicates, summary.duplicate_ids) == (3, ("data.jsonl:1", "data.jsonl:3"))
    assert (summary.contradictions, summary.contradiction_ids) == (2, ("data.jsonl:2", "data.jsonl:4"))


def test_describe_without_duplicates() -> None:
    summary = describe(load_problems(jsonl(GOOD)), "data.jsonl")
    assert (summary.duplicates, summary.duplicate_ids, summary.contradictions, summary.contradiction_ids) == (
        0,
        None,
        0,
        None,
    )
