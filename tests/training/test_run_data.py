"""The data of a whole run: several sources, splits, held-out sets and the model's context, from the command
line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from handrail._util.errors import UserError
from handrail.models.hf import TransformersPolicy
from handrail.training import lengths
from handrail.training.lengths import find_too_long, reference_lengths
from handrail.training.run_data import with_distinct_ids
from handrail.types.problem import Problem
from tests.cli.test_commands import ROWS, assert_refused, configured, jsonl
from tests.conftest import Handrail, policy_of
from tests.tiny_models import save_chat_model

MY_METHOD = Path(__file__).parents[2] / "examples/my_method.py"
LONG_PROMPT = {"prompt": "1 " * 125, "answer": "2"}
LONG_REFERENCE = {"prompt": "1 + 1 =", "answer": "2", "reference": "1 + " * 70 + "1 = 2"}


def metrics(output: str = "out") -> dict[str, Any]:
    """Return the metrics of step 0."""
    return dict(json.loads(Path(output, "metrics.jsonl").read_text().splitlines()[0]))


def samples() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]


# Ids


@pytest.mark.parametrize("given", [{}, {"id": 7}])
def test_each_of_two_sources_keeps_its_own_references(
    given: dict[str, Any], handrail: Handrail, tmp_path: Path
) -> None:
    rows = {
        name: {"prompt": f"{n} + {n} =", "answer": str(2 * n), "reference": f"= {2 * n}", **given}
        for name, n in (("easy", 1), ("hard", 4))
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "train.jsonl", [row])
    method = {"name": f"{MY_METHOD}:RepairWhenStuck"}
    file = configured(tmp_path, data={"train": ["easy/train.jsonl", "hard/train.jsonl"]}, method=method)
    done = handrail("train", str(file), "--output", "out")
    assert done.code == 0, done.err
    shown = {(each["prompt"], each["text"]) for each in samples() if each["role"] == "imitated"}
    assert shown == {(row["prompt"], row["reference"]) for row in rows.values()}
    own = str(given.get("id", "train.jsonl:1"))
    assert {each["problem"] for each in samples()} == {f"easy/train.jsonl:{own}", f"hard/train.jsonl:{own}"}


def test_ids_are_unchanged_if_no_two_problems_share_one() -> None:
    one, two, same = (
        Problem("a", "1?", "1", where="x"),
        Problem("b", "2?", "2"),
        Problem("a", "1?", "1", where="y"),
    )
    sources = [[one], [two, same]]
    assert with_distinct_ids(sources, ["x", "y"]) is sources
    other = Problem("a", "3?", "3")
    assert [
        [each.id for each in source] for source in with_distinct_ids([[one], [two, other]], ["x", "y"])
    ] == [["x:a"], ["y:b", "y:a"]]


# Splits and held-out problems


def split_directory(directory: Path) -> None:
    directory.mkdir()
    for split, rows in (("test", ROWS[:2]), ("train", ROWS[2:])):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), directory / f"{split}-00000-of-00001.parquet"
        )


def test_training_uses_the_split_train_and_says_so(handrail: Handrail, tmp_path: Path) -> None:
    split_directory(tmp_path / "main")
    done = handrail(
        "train",
        str(configured(tmp_path, data={"train": "main"}, eval={"sets": {"held": "main#test"}})),
        "--output",
        "out",
    )
    assert done.code == 0, done.err
    note = "main: using the split 'train', of train, test; for another write main#SPLIT"
    assert note in done.out and note in metrics()["warning"].splitlines()
    assert {each["prompt"] for each in samples()} == {row["prompt"] for row in ROWS[2:]}


def test_held_out_problems_among_the_training_problems_cause_a_warning(
    handrail: Handrail, tmp_path: Path
) -> None:
    held = jsonl(
        tmp_path / "held.jsonl",
        [{**ROWS[0], "prompt": "5 + 5 ="}, {**ROWS[1], "prompt": ROWS[1]["prompt"].lower() + " "}],
    )
    file = configured(tmp_path, eval={"sets": {"held": str(held), "clean": "task:house-rules?n=2"}})
    warning = (
        "1 of the 2 problems of eval.sets.held are among the training problems, up to case, spacing and "
        "punctuation, "
        f"first {held}, line 2, which equals {tmp_path}/data.jsonl, line 2"
    )
    done = handrail("train", str(file), "--output", "out")
    assert done.code == 0 and warning in done.out and warning in metrics()["warning"].splitlines(), done
    done = handrail("compare", str(file), "--methods", "grpo,luffy", "--output", "both", "--jobs", "1")
    assert done.code == 0 and done.out.count(warning) == 1, done
    assert all(
        warning in metrics(f"both/{name}/seed-0")["warning"].splitlines() for name in ("grpo", "luffy")
    )


# Lengths


def test_rows_that_are_too_long_are_counted_and_refused(handrail: Handrail, tmp_path: Path) -> None:
    file = configured(tmp_path, [*ROWS, LONG_PROMPT, LONG_REFERENCE])
    done = handrail("train", str(file), "--output", "out")
    assert_refused(
        done,
        "context of 128 tokens: 2 of 6 problems, first",
        "data.jsonl, line 5, field prompt: its 125 tokens",
        'data.too_long = "skip"',
    )
    assert_refused(handrail("check", str(tmp_path / "data.jsonl"), "--config", str(file)), "2 of 6 problems")


def test_rows_that_are_too_long_can_be_skipped(handrail: Handrail, tmp_path: Path) -> None:
    held = jsonl(tmp_path / "held.jsonl", [{"prompt": "2 + 5 =", "answer": "7"}, LONG_PROMPT])
    rows = [*ROWS[:2], LONG_PROMPT, LONG_REFERENCE]
    file = configured(tmp_path, rows, data={"too_long": "skip"}, eval={"sets": {"held": str(held)}})
    done = handrail("train", str(file), "--output", "out")
    assert done.code == 0, done.err
    for sentence in (
        f"2 problems of data.train are too long and left out, first {tmp_path}/data.jsonl, line 3, field "
        "prompt: its 125 tokens",
        f"1 problems of eval.sets.held are too long and left out, first {held}, line 2",
    ):
        assert sentence in done.out and sentence in metrics()["warning"]
    assert (metrics()["data/too_long"], metrics()["data/too_long/held"], metrics()["eval/held/n"]) == (
        2,
        1,
        1,
    )
    assert {each["prompt"] for each in samples()} == {row["prompt"] for row in ROWS[:2]}
    done = handrail("check", str(tmp_path / "data.jsonl"), "--config", str(file))
    # The verifier compares whole completions, so it refuses the reference: exit code 1.
    assert (
        done.code == 1
        and "2 problems are too long and will be left out" in done.out
        and "every other prompt" in done.out
    )
    done = handrail("eval", "builtin:house-tiny", str(held), "--config", str(file), "--output", "eval")
    assert (
        "1 problems are too long and are left out" in done.out
        and '"problems": 1' in Path("eval/summary.json").read_text()
    ), done


def test_a_source_without_any_fitting_problem_is_refused_even_with_skip(
    handrail: Handrail, tmp_path: Path
) -> None:
    long = jsonl(tmp_path / "long.jsonl", [LONG_PROMPT])
    file = configured(tmp_path, data={"train": ["data.jsonl", str(long)], "too_long": "skip"})
    jsonl(tmp_path / "data.jsonl", ROWS)
    assert_refused(
        handrail("train", str(file), "--output", "out"),
        "data.train: no problem of source 2 fits the model's context",
    )


@pytest.fixture(scope="module")
def chat_policy(tmp_path_factory: pytest.TempPathFactory) -> TransformersPolicy:
    return policy_of(save_chat_model(tmp_path_factory.mktemp("model"), context=64))


TEXTS = ["2 + 3 = 5", "π ≈ 3", "a b " * 40, "ﷺ" * 3, "5<|end|>"]
REFERENCES = [(Problem("p", "1 + 1?", "2"), text) for text in TEXTS]


def test_lengths_are_those_of_the_references(chat_policy: TransformersPolicy) -> None:
    expected = [len(chat_policy.renderer.reference(problem, text)) for problem, text in REFERENCES]
    chat_policy.tokenizer("so", truncation=True, max_length=1)  # the tokenizer would go on to truncate
    assert reference_lengths(chat_policy.renderer, REFERENCES) == expected


def test_references_that_cannot_be_used_are_refused(chat_policy: TransformersPolicy) -> None:
    with pytest.raises(UserError, match="field reference: it contains the end token"):
        reference_lengths(chat_policy.renderer, [*REFERENCES, (REFERENCES[0][0], "5<|end|> so 5")])


def test_the_longest_reference_that_fits_is_kept(chat_policy: TransformersPolicy) -> None:
    problem = Problem("p", "1 + 1?", "2")
    room = 64 - len(chat_policy.renderer.prompt(problem))
    fits, exceeds = ("a " * n for n in (1, 100))
    while len(chat_policy.renderer.reference(problem, fits + "a ")) <= room:
        fits += "a "
    problems = [
        Problem("short", "1 + 1?", "2", ("2",)),
        Problem("fits", "1 + 1?", "2", ("2", fits)),
        Problem("not", "1 + 1?", "2", ("2", fits + "a a ")),
    ]
    assert [
        each.problem.id
        for each in find_too_long(chat_policy, [*problems, Problem("nor", "1 + 1?", "2", (exceeds,))])
    ] == ["not", "nor"]
    assert not find_too_long(chat_policy, problems, references=False)


def test_a_large_text_is_tokenized_once_with_progress(
    chat_policy: TransformersPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lengths, "LONG", 10)
    monkeypatch.setattr(lengths, "cached_assets_path", lambda library, namespace: tmp_path)
    renderer = chat_policy.renderer
    expected = reference_lengths(renderer, REFERENCES)
    assert "counting the tokens of 5 references" in capsys.readouterr().out
    told = [
        renderer.tokenizer.backend_tokenizer.to_str(),
        renderer.embeddings,
        sorted(renderer.ends),
        *(renderer.clean(*each) for each in REFERENCES),
    ]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == [f"{key}.json"]
    assert reference_lengths(renderer, REFERENCES) == expected and not capsys.readouterr().out
    assert reference_lengths(renderer, REFERENCES[::-1]) == expected[::-1] and capsys.readouterr().out
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    for file in files:
        file.write_text("[1, ")  # left by a full disk
    assert reference_lengths(renderer, REFERENCES) == expected
