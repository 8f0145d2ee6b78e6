"""The command line: an error is one sentence and exit code 2, and results are shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from handrail.eval.check import WITHOUT_REFERENCES
from handrail.methods import METHODS, build
from handrail.models.builtin import locate
from handrail.models.config import RolloutConfig
from handrail.training.config import load_config
from tests.conftest import Done, Handrail

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{number} + A {number} =",
        "answer": str(2 * number),
        "reference": f"{number} + {number} = {2 * number}",
    }
    for number in range(1, 5)
]


def jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configured(directory: Path, rows: list[Any] = ROWS, **changes: Any) -> Path:
    """Write a configuration of one short step on ``rows``; ``changes`` override keys of its sections."""
    tree: dict[str, Any] = {
        "model": {"path": "builtin:house-tiny", "device": "cpu"},
        "data": {"train": str(jsonl(directory / "data.jsonl", rows))},
        "verifier": {"name": "exact", "workers": 1},
        "rollout": {"group_size": 2, "max_tokens": 8},
        "train": {"steps": 1, "problems_per_step": 2},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    file = directory / "run.toml"
    file.write_text(tomli_w.dumps(tree))
    return file


def assert_refused(done: Done, *parts: str, output: Path = Path("out")) -> None:
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and "Traceback" not in done.err, (
        done.err
    )
    for part in parts:
        assert part in done.err
    assert not output.exists()


# Configurations


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"verifier.extract='#### (\d+)'", r"#### (\d+)"),
        (r'verifier.extract="#### (\\d+)"', r"#### (\d+)"),
        (r"verifier.extract=#### (\d+)", r"#### (\d+)"),
        (r"verifier.extract=(\d+)\n", r"(\d+)\n"),
        ('verifier.extract=say "(.+)"', 'say "(.+)"'),
        (r'verifier.extract="(.+)\n"', "(.+)\n"),
    ],
)
def test_a_value_is_toml_or_plain_text(written: str, read: str, tmp_path: Path) -> None:
    assert load_config(configured(tmp_path), [written]).verifier.extract == read


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[model\npath = 'm'", ["run.toml is not TOML", "line 1"]),
        ("[data]\ntrain = 'x.jsonl'", ["run.toml: the setting model is missing"]),
        ("[model]\npath = 'm'\n[data]\n", ["run.toml: the setting data.train is missing"]),
        (
            "[model]\npath = 'm'\ndevise = 'cpu'\n[data]\ntrain = 'x'",
            ["no setting model.devise; did you mean 'device'"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[trian]\nsteps = 1",
            ["no setting trian; did you mean 'train'"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[train]\nsteps = 'ten'",
            ["train.steps: ", "integer", "not 'ten'"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[train]\nsteps = -1",
            ["train.steps: ", "greater than or equal to 1, not -1"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[train]\nlearning_rate = nan",
            ["train.learning_rate: ", "finite number"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = [{path = 'x', share = inf}]",
            ["data.train[1].share: ", "finite number"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[train]\nproblems_per_step = 4\nupdates_per_step = 3",
            ["train: problems_per_step must be a multiple of updates_per_step"],
        ),
        (
            "lora = {}\nsampler = {dtype = 'bfloat16'}\n[model]\npath = 'm'\n[data]\ntrain = 'x'",
            ["error: run.toml: with [lora] the trained model itself samples"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = 'x'\n[train]\nsteps = " + "9" * 5000,
            ["run.toml cannot be read: it holds a whole number of more than 4300 digits"],
        ),
        (
            "[model]\npath = 'm'\n[data]\ntrain = [{path = 'x', shar = 1}]",
            ["there is no setting data.train[1].shar; did you mean 'share'?"],
        ),
        (
            "verifier = 'exact'\n[model]\npath = 'm'\n[data]\ntrain = 'x'",
            ["verifier: input should be a table, { name = \"exact\" }, not 'exact'"],
        ),
        (
            "lora = 8\n[model]\npath = 'm'\n[data]\ntrain = 'x'",
            ["lora: input should be a table, { rank = … }, not 8"],
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_sentence(
    text: str, parts: list[str], handrail: Handrail
) -> None:
    Path("run.toml").write_text(text)
    assert_refused(handrail("train", "run.toml", "--output", "out"), *parts)


def test_a_missing_configuration_is_named(handrail: Handrail) -> None:
    for command in ("train", "compare"):
        assert_refused(
            handrail(command, "no.toml", "--output", "out"), "there is no configuration file no.toml"
        )


@pytest.mark.parametrize("assignment", ["train.steps", "=3", ""])
def test_set_needs_an_assignment(assignment: str, handrail: Handrail, tmp_path: Path) -> None:
    done = handrail("train", str(configured(tmp_path)), "--output", "out", "--set", assignment)
    assert_refused(done, f"--set takes section.key=value, not {assignment!r}")


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("train.stepz=3", ["there is no setting train.stepz; did you mean 'steps'"]),
        ("train.steps=three", ["train.steps: ", "not 'three'"]),
        ("model.path.more=3", ["path is not a section"]),
        ("method.name=lufy", ["method.name: there is no method 'lufy'; did you mean 'luffy'"]),
        ("method={name='luffy', gama=0.2}", ["there is no setting method.gama; did you mean 'gamma'"]),
        ("method={name='luffy', gamma='x'}", ["method.gamma: ", "not 'x'"]),
        ("method.name=no_such.py:Mine", ["method.name: there is no file no_such.py; check the path"]),
        ("verifier.name=exakt", ["verifier.name: there is no verifier 'exakt'; did you mean 'exact'"]),
        ("verifier.name=no_such.py:grade", ["verifier.name: there is no file no_such.py; check the path"]),
        ("verifier.name=datta.py:grade", ["verifier.name: there is no file datta.py; did you mean data.py?"]),
        ("verifier.extract='('", ["verifier.extract: '(' is not a regular expression"]),
        ("verifier.extract=", ["verifier.extract: it is empty, which would grade every completion as wrong"]),
        ("verifier.extract=''", ["verifier.extract: it is empty"]),
        (
            "verifier.extract='#### .+'",
            ["verifier.extract: '#### .+' has no group; put the part that is the answer in parentheses"],
        ),
        ("data.train=no_such.jsonl", ["no_such.jsonl: there is no such file"]),
        ("data.train=dta.jsonl", ["dta.jsonl: there is no such file; did you mean data.jsonl"]),
        ("eval.sets={held='no_such.jsonl'}", ["no_such.jsonl: there is no such file"]),
        (
            "data.train=[{path='data.jsonl', share=50}, {path='data.jsonl'}]",
            ["data.train: source 2 gets none of the 2 problems of a step"],
        ),
        (
            "data.columns={answer='solution'}",
            ["data.jsonl, field answer: ", "'solution'", "prompt, answer, reference"],
        ),
        ("data.chat=true", ["data.chat is on, but the tokenizer of builtin:house-tiny has no chat template"]),
        ("eval.sets={'../../x'='data.jsonl'}", ["eval.sets"]),
        (
            "train={token_budget=100, seconds_budget=5.0}",
            ["train: token_budget and seconds_budget are both set; choose one"],
        ),
        (
            "train={schedule='cosine', seconds_budget=5.0}",
            ["train: the schedule cosine goes by steps or tokens, not by seconds"],
        ),
        ("rollout.temperature=0", ["rollout.temperature is 0"]),
        ("model.path=builtin:house-prm", ["model.path: builtin:house-prm is a reward model"]),
        (
            "model.path=builtin:huge",
            ["model.path: there is no built-in model 'huge'; there are: house-prm, house-tiny"],
        ),
        ("model.path=./nowhere", ["model.path: ./nowhere"]),
        ("model.path=.", ["model.path: . is not a Hugging Face model directory (it has no config.json)"]),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    assignment: str, parts: list[str], handrail: Handrail, tmp_path: Path
) -> None:
    if "datta.py" in assignment:
        (tmp_path / "data.py").write_text("def grade(problem, completion):\n    return 0\n")
    assert_refused(
        handrail("train", str(configured(tmp_path)), "--output", "out", "--set", assignment), *parts
    )


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[]",
        "{}",
        '{"model_type": "nonsense"}',
        '{"model_type": "llama"}',
        '{"model_type": "llama", "hidden_size": "x"}',
    ],
)
def test_a_model_directory_with_a_useless_config_is_named(
    text: str, handrail: Handrail, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(text)
    done = handrail("train", str(configured(tmp_path)), "--output", "out", "--set", "model.path=model")
    assert_refused(done, "model.path: model cannot be loaded as a causal language model")


def test_a_model_with_damaged_weights_is_named(handrail: Handrail, tmp_path: Path) -> None:
    other_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"cut off")
    done = handrail("train", str(configured(tmp_path)), "--output", "out", "--set", "model.path=model")
    assert_refused(done, "model.path: model cannot be loaded as a causal language model")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("tokenizer*", "it has no tokenizer (tokenizer.json); copy the files of the tokenizer that"),
        ("*.safetensors", "it has no weights (model.safetensors); complete the download or the copy"),
    ],
)
def test_a_model_without_tokenizer_or_weights_says_so(
    lost: str, sentence: str, handrail: Handrail, tmp_path: Path
) -> None:
    other_model(tmp_path / "model")
    for file in (tmp_path / "model").glob(lost):
        file.unlink()
    done = handrail("train", str(configured(tmp_path)), "--output", "out", "--set", "model.path=model")
    assert_refused(done, f"model.path: model cannot be loaded as a causal language model: {sentence}")


def test_a_hub_name_without_a_network_is_one_sentence_in_a_real_process(tmp_path: Path) -> None:
    file = str(configured(tmp_path, model={"path": "someone/something"}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "handrail", "train", file, "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert_refused(
        Done(done.returncode, done.stdout, done.stderr),
        "model.path: someone/something cannot be loaded",
        output=tmp_path / "out",
    )


# Data


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"prompt": "1 + 1 ="},
            ["line 5, field answer: this row has no answer; fill in its 'answer', or leave the row out"],
        ),
        ({"prompt": 7, "answer": "2"}, ["line 5, field prompt: it is a number; make it text"]),
        ({"prompt": "1 =", "answer": None}, ["line 5, field answer: it is empty (null)"]),
        ({"prompt": "1 =", "answer": ["2", "3"]}, ["line 5, field answer: it is a list"]),
        ("just text", ["line 5: the row is not an object"]),
        (
            {"prompt": "1 " * 125, "answer": "2"},
            ["line 5, field prompt: its 125 tokens and rollout.max_tokens = 8", "context of 128"],
        ),
        (
            {"prompt": "1", "answer": "2", "reference": "1 " * 127},
            ["line 5, field reference: its 128 tokens and the prompt's 1 make 129"],
        ),
        (
            {"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2"},
            ["line 5, field prompt: it is chat messages, but builtin:house-tiny has no chat template"],
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_line_and_field(
    row: Any, parts: list[str], handrail: Handrail, tmp_path: Path
) -> None:  # fmt: skip
    done = handrail("train", str(configured(tmp_path, [*ROWS, row])), "--output", "out")
    assert_refused(done, f"{tmp_path / 'data.jsonl'}, ", *parts)


def test_rows_of_held_out_sets_are_checked_before_training_too(handrail: Handrail, tmp_path: Path) -> None:
    held = jsonl(tmp_path / "held.jsonl", [*ROWS, {"prompt": "1 " * 125, "answer": "2"}])
    done = handrail("train", str(configured(tmp_path, eval={"sets": {"held": str(held)}})), "--output", "out")
    assert_refused(done, "held.jsonl, line 5, field prompt")


def test_an_empty_data_file_is_named(handrail: Handrail, tmp_path: Path) -> None:
    assert_refused(
        handrail("train", str(configured(tmp_path, [])), "--output", "out"), "data.jsonl: it is empty"
    )


def test_a_line_that_is_not_json_is_named(handrail: Handrail, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n{'prompt': 1}\n")
    assert_refused(handrail("check", "bad.jsonl"), "bad.jsonl, line 2: it is not JSON")


# Runs


def test_a_run_writes_a_model_and_is_neither_overwritten_nor_resumed_with_other_settings(
    handrail: Handrail, tmp_path: Path
) -> None:
    file = str(
        configured(
            tmp_path,
            eval={"sets": {"mine": str(tmp_path / "data.jsonl")}},
            train={"steps": 1, "checkpoint_every": 1},
        )
    )
    done = handrail(
        "train", file, "--output", "out", "--set", "method.name=luffy", "--set", "train.problems_per_step=3"
    )
    assert done.code == 0, done
    assert (
        "luffy from builtin:house-tiny into out" in done.out
        and "held-out mine: " in done.out
        and "model: out/model" in done.out
    )
    step = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[1])
    assert step["groups/all"] == 3  # --set overrides the file
    assert json.loads((tmp_path / "out/summary.json").read_text())["method"] == "luffy"
    assert (tmp_path / "out/model/model.safetensors").exists()

    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    again = handrail("train", file, "--output", "out")
    assert_refused(
        again,
        "out already holds a run; continue it with --resume, or choose another --output",
        output=Path("nothing"),
    )
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before

    other = handrail("train", file, "--output", "out", "--resume", "--set", "train.steps=2")
    assert_refused(other, "out holds a run of another configuration", output=Path("nothing"))
    same = ("--set", "method.name=luffy", "--set", "train.problems_per_step=3")
    longer = handrail("train", file, "--output", "out", "--resume", *same, "--set", "train.steps=2")
    assert longer.code == 0 and len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 3


def other_model(directory: Path) -> None:
    """A smaller Llama with the built-in tokenizer."""
    words = AutoTokenizer.from_pretrained(locate("builtin:house-tiny"))
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=128, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(directory)  # fmt: skip
    words.save_pretrained(directory)


def test_a_run_is_not_resumed_with_a_model_of_another_size(handrail: Handrail, tmp_path: Path) -> None:
    shutil.copytree(locate("builtin:house-tiny"), tmp_path / "model")
    file = str(configured(tmp_path, model={"path": "model"}, train={"steps": 1, "checkpoint_every": 1}))
    assert handrail("train", file, "--output", "out").code == 0
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    other_model(tmp_path / "model")
    (tmp_path / "out/contents.json").unlink()  # as if the run had been made before these digests existed
    done = handrail("train", file, "--output", "out", "--resume", "--set", "train.steps=2")
    assert_refused(done, "holds another model than model.path names", output=Path("nothing"))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before


def test_an_output_that_is_a_file_is_refused(handrail: Handrail, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    done = handrail("train", str(configured(tmp_path)), "--output", "taken")
    assert_refused(done, "taken is a file; choose another --output")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_users_verifier_may_have_the_name_of_a_python_module(handrail: Handrail, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/json.py").write_text("def grade(problem, completion):\n    return 1.0\n")
    done = handrail(
        "train", str(configured(tmp_path)), "--output", "out", "--set", "verifier.name=mine/json.py:grade"
    )
    assert done.code == 0, done
    assert (
        json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[1]).get("verifier/error", 0) == 0
    )


# Looking around


@pytest.mark.parametrize("group", [(), ("model",)])
def test_a_command_without_arguments_shows_its_help_and_succeeds(
    group: tuple[str, ...], handrail: Handrail
) -> None:
    done = handrail(*group)
    assert done.code == 0 and "Usage: " in done.out and done.err == ""
    assert done.out == handrail(*group, "--help").out == handrail(*group, "-h").out


def test_an_unknown_command_is_refused_with_a_suggestion(handrail: Handrail) -> None:
    done = handrail("trian")
    assert done.code == 2 and "No such command 'trian'" in done.err and "train" in done.err


def test_the_version_is_the_packages(handrail: Handrail) -> None:
    assert handrail("--version").out == f"handrail {metadata.version('handrail')}\n"


def test_a_shell_completes_commands() -> None:
    typed = {"_HANDRAIL_COMPLETE": "complete_bash", "COMP_WORDS": "handrail co", "COMP_CWORD": "1"}
    script = "import sys; sys.argv[0] = 'handrail'; from handrail.cli import main; main()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, **typed}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["compare", "config"]


def test_methods_are_listed_with_source_and_status(handrail: Handrail) -> None:
    done = handrail("methods")
    assert done.code == 0
    for part in ("grpo", "luffy", "sort", "2504.14945", "published", "reconstruction"):
        assert part in done.out


def test_a_methods_card_has_its_settings_and_defaults(handrail: Handrail) -> None:
    done = handrail("methods", "luffy")
    assert done.code == 0 and "arXiv 2504.14945 · status: published" in done.out
    (line,) = [line for line in done.out.splitlines() if "gamma" in line and "number > 0" in line]
    assert "Constant of f" in line


def test_an_unknown_method_has_a_suggestion(handrail: Handrail) -> None:
    assert_refused(
        handrail("methods", "no-such"), "method.name: there is no method 'no-such'; there are: grpo"
    )
    assert_refused(handrail("methods", "lufy"), "did you mean 'luffy'?")


def test_methods_and_terms_may_be_named_in_capitals(handrail: Handrail) -> None:
    for name, shown in (("NPO", "npo · method"), ("SORT", "sort · method"), ("ACE", "ace · term")):
        done = handrail("methods", name)
        assert done.code == 0 and done.out.startswith(shown), done


@pytest.mark.parametrize("name", ["DAPO", "dapo", "Dr.GRPO", "dr_grpo", "GSPO"])
def test_a_variant_of_grpo_is_told_its_settings(name: str, handrail: Handrail) -> None:
    done = handrail("methods", name)
    assert_refused(done, f"method.name: {name} is grpo with ")
    sentence = done.err.partition(" is grpo with ")[2].partition("; set these")[0]
    assert build(tomllib.loads(re.sub(", | and ", "\n", sentence)), RolloutConfig()).name == "grpo"


def test_methods_that_need_no_reference_are_known_to_check() -> None:
    def needs(cls: Any) -> bool:
        method = cls.__new__(cls)
        given = {key: "x" for key, field in cls.Settings.model_fields.items() if field.is_required()}
        method.settings = cls.Settings(**given)
        return bool(method.needs_references)

    assert {name for name, cls in METHODS.items() if not needs(cls)} == set(WITHOUT_REFERENCES)


def test_built_in_models_are_listed_with_their_size(handrail: Handrail) -> None:
    done = handrail("model", "list")
    assert done.code == 0 and re.search(
        r"^builtin:house-tiny  \d+\.\d MB, comes with Handrail$", done.out, re.MULTILINE
    )


def test_check_says_how_the_data_were_read(handrail: Handrail, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "mine.jsonl", [*ROWS, {"prompt": ROWS[0]["prompt"], "answer": "[9]", "level": "easy"}]
    )
    done = handrail("check", str(file))
    assert done.code == 0
    for part in ("5 problems, layout: native", "references: 4 problems have one (4 in all)", "plans: 0",
        "metadata: level",
                 "1 problems repeat", "1 prompts have contradicting answers", "1 + A 1 ="):  # fmt: skip
        assert part in done.out


def test_check_without_a_model_loads_no_model_library(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "mine.jsonl", ROWS)
    code = (
        "import sys; from handrail.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "check", str(file)], check=True, capture_output=True)


def test_check_finds_contradicting_references_and_test_problems(handrail: Handrail, tmp_path: Path) -> None:
    rows = [
        {"id": "right", "prompt": "What is 3 + 4?", "answer": "7", "references": ["3 + 4 = 7\n#### 7"]},
        {
            "id": "wrong",
            "prompt": "What is 5 + 4?",
            "answer": "9",
            "references": ["5 + 4 = 8\n#### 8", "5 + 4 = 9\n#### 9"],
        },
        {
            "id": "unread",
            "prompt": "What is the capital of France?",
            "answer": "Paris",
            "references": ["It is Paris."],
        },
    ]
    held_out = [
        {"prompt": "  what is 3+4", "answer": "7"},
        {"prompt": "What is 3 - 4?", "answer": "-1"},
        {"prompt": "WHAT IS\nTHE ＣＡＰＩＴＡＬ of “France” ?", "answer": "Paris"},
    ]
    mine, test = jsonl(tmp_path / "mine.jsonl", rows), jsonl(tmp_path / "test.jsonl", held_out)
    done = handrail("check", str(mine), "--against", str(test), "--against", "task:house-rules?n=4")
    assert done.code == 1, done.err
    assert "verifier 'math': it accepts 2 of 4 references" in done.out
    refused = f"first {mine}, line 2 (answer '9'; it reads '8' there)"
    assert f"error: the verifier refuses 2 references, {refused}" in done.out
    assert "  if they are right, tell the verifier where to find the answer: verifier.extract" in done.out
    found = (
        f"error: 2 of the 3 problems of {test} are among the training problems, up to case, spacing and "
        "punctuation"
    )
    assert f"{found}, first {test}, line 1, which equals {mine}, line 1" in done.out
    assert "task:house-rules?n=4: none of its 4 problems is in this source" in done.out
    done = handrail("check", str(mine), "--verifier", "normalized")
    assert "verifier 'normalized': it accepts 2 of 4 references" in done.out and "unverified" not in done.out
    assert_refused(
        handrail("check", str(mine), "--verifier", "mathh"),
        "there is no verifier 'mathh'; did you mean 'math'?",
    )
    config = configured(
        tmp_path, data={"train": str(mine)}, eval={"sets": {"held out": str(test)}}, verifier={"name": "math"}
    )
    assert found in handrail("check", str(mine), "--config", str(config)).out


@pytest.mark.parametrize(
    ("answer", "form", "verifier", "hint"),
    [
        (
            "30 25",
            "5 * 6 = 30 ; 30 - 5 = 25 # {}",
            "math",
            "verifier.name = 'exact', verifier.extract = '# (.+)$' would accept them",
        ),
        (
            "30 25",
            "30\nANSWER (both): {}",
            "math",
            r"verifier.name = 'exact', verifier.extract = '\(both\): (.+)$' would accept them",
        ),
        ("7", "So it is 7.\n#### {}", "exact", "verifier.name = 'math' would accept them"),
        ("7", "{}", "no_number.py:never", "verifier.name = 'math' would accept them"),
    ],
)
def test_check_says_which_verifier_accepts_the_references(
    answer: str, form: str, verifier: str, hint: str, handrail: Handrail, tmp_path: Path
) -> None:
    (tmp_path / "no_number.py").write_text("def never(problem, completion):\n    return 0\n")
    rows = [
        {"prompt": f"{place}?", "answer": f"{place} {answer}", "reference": form.format(f"{place} {answer}")}
        for place in range(24)
    ]
    if " " not in answer:
        rows = [{**row, "answer": answer, "reference": form.format(answer)} for row in rows]
    done = handrail("check", str(jsonl(tmp_path / "mine.jsonl", rows)), "--verifier", verifier)
    assert done.code == 1 and "error: the verifier refuses 24 references, first" in done.out, done
    assert f"\n  {hint}\n" in done.out


def test_check_grades_every_answer_against_itself(handrail: Handrail, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": answer} for answer in ("7", "7 #### 8", "x #### y", r"\frac12")]
    file = str(jsonl(tmp_path / "mine.jsonl", [*rows, *[{"prompt": "p", "answer": "a # b"}] * 10]))
    done = handrail("check", file, "--verifier", "task")
    assert "verifier 'task': it accepts 2 of 14 answers as the answer to their own problem" in done.out
    assert (
        "error: no completion can be correct for 12 problems, because the verifier refuses their own answer:"
        in done.out
    )
    assert done.code == 1
    assert f"  {file}, line 2 (answer '7 #### 8')" in done.out and "line 3 (answer 'x #### y')" in done.out
    assert "line 12 (answer" in done.out and "line 13 (answer" not in done.out and "  and 2 more" in done.out
    most = str(jsonl(tmp_path / "most.jsonl", [*rows[:2], *[{"prompt": "p", "answer": "a"}] * 20]))
    done = handrail("check", most, "--verifier", "task")
    assert "warning: no completion can be correct for 1 problems" in done.out and done.code == 0
    (tmp_path / "mine.py").write_text("def grade(problem, completion):\n    return 1 / 0\n")
    raised = str(jsonl(tmp_path / "raised.jsonl", [{"prompt": "p", "answer": "7", "reference": "7"}]))
    done = handrail("check", raised, "--verifier", f"{tmp_path / 'mine.py'}:grade")
    assert (
        f"error: 1 references are unverified, first {raised}, line 1: ZeroDivisionError" in done.out
        and done.code == 1
    )
    done = handrail("check", file, "--verifier", f"{tmp_path / 'mine.py'}:grade")
    assert (
        "the answers are not graded, because only the verifier knows how a completion states its answer"
        in done.out
    )
    long = str(jsonl(tmp_path / "long.jsonl", [{"prompt": "p", "answer": "so " * 100 + "it is 7"}]))
    assert (
        f"warning: 1 answers are longer than 200 characters, first {long}, line 1"
        in handrail("check", long).out
    )


@pytest.mark.parametrize(
    "source",
    [
        "task:house-rules?n=20",
        "task:leg-counting?n=20",
        "task:gsm-symbolic?n=20",
        "reasoning-gym:basic_arithmetic?n=20",
    ],
)
def test_check_finds_no_fault_in_built_in_tasks(source: str, handrail: Handrail) -> None:
    done = handrail("check", source)
    assert "it accepts 20 of 20 answers as the answer to their own problem" in done.out and done.code == 0


def test_check_takes_a_column_map(handrail: Handrail, tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "mine.jsonl", [{"task": "[bold]1 + 1 =", "result": {"value": 2}}]))
    assert_refused(handrail("check", file), "mine.jsonl, line 1, field prompt: there is no column 'prompt'")
    done = handrail("check", file, "--column", "prompt=task", "--column", "answer=result.value")
    assert (
        done.code == 0
        and "layout: column map" in done.out
        and "[bold]1 + 1 =" in done.out
        and "no references" in done.out
    )
    assert_refused(
        handrail("check", file, "--column", "prompt"), "--column takes our_field=their_column, not 'prompt'"
    )


def test_check_says_which_layout_was_recognized_and_which_columns_were_used(
    handrail: Handrail, tmp_path: Path
) -> None:
    rows = [{"question": "Which is prime?", "choices": ["6", "7", "8"], "answer": 1, "subject": "numbers"}]
    done = handrail("check", str(jsonl(tmp_path / "mine.jsonl", rows)))
    assert done.code == 0, done.err
    for part in ("1 problems, layout: question and answer",
                 "fields: prompt from question, answer as a letter, choices written into the prompt",
                 "metadata: subject", "Which is prime?\n\nA. 6\nB. 7\nC. 8"):  # fmt: skip
        assert part in done.out
    file = str(
        jsonl(
            tmp_path / "mapped.jsonl",
            [{"q": "1 + 1?", "a": "2", "reference": "https://example.org", "id": 1}],
        )
    )
    done = handrail("check", file, "--column", "prompt=q", "--column", "answer=a")
    assert (
        "metadata: id, reference" in done.out
        and "note: kept as metadata, because the column map does not name them: id, reference" in done.out
    )


def test_check_shows_the_first_problem_as_a_model_sees_it(handrail: Handrail, tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "mine.jsonl", ROWS))
    done = handrail("check", file, "--model", "builtin:house-tiny")
    assert done.code == 0, done.err
    assert "as builtin:house-tiny sees it, 5 tokens:\n1 + A 1 =" in done.out
    assert "its reference, 6 tokens:\n1 + 1 = 2<eos>" in done.out.replace(" <eos>", "<eos>")
    assert "fits the context of 128 tokens; rollout.max_tokens may be up to 123" in done.out


def test_check_takes_the_templates_and_lengths_of_a_configuration(handrail: Handrail, tmp_path: Path) -> None:
    file = configured(
        tmp_path, data={"train": "unused", "prompt_template": "so {prompt}"}, rollout={"max_tokens": 8}
    )
    done = handrail("check", str(tmp_path / "data.jsonl"), "--config", str(file))
    assert done.code == 1 and "so 1 + A 1 =" in done.out
    # They lack the mark that this verifier looks for.
    assert "error: the verifier refuses 4 references" in done.out
    tight = configured(tmp_path, rollout={"max_tokens": 124})
    done = handrail("check", str(tmp_path / "data.jsonl"), "--config", str(tight))
    assert_refused(
        done,
        "context of 128 tokens: 4 of 4 problems, first",
        "its 5 tokens and rollout.max_tokens = 124 make 129",
    )


def test_the_command_line_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "handrail", "methods", "sort"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "alpha" in done.stdout and "status: reconstruction" in done.stdout


def test_a_command_for_one_process_refuses_to_run_under_torchrun(
    handrail: Handrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = handrail("eval", "builtin:house-tiny", "task:house-rules?n=4")
    assert done.code == 2 and "handrail eval runs in one process; start it without torchrun" in done.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workers", "2"], "--workers is for --ray; without it, start the processes with torchrun"),
        (["--samplers", "2"], "--samplers is for --ray; without it, the processes that train also sample"),
        (["--ray", "--workers", "8-2"], "--workers is 8-2; give a number, or a range such as 2-8"),
        (["--ray", "--workers", "two"], "--workers is two; give a number, or a range such as 2-8"),
        (
            ["--ray", "--workers", "2-8", "--samplers", "1"],
            "--workers is 2-8, a range, but Ray does not count",
        ),
    ],
)
def test_numbers_of_processes_that_make_no_sense_are_refused(
    options: list[str], sentence: str, handrail: Handrail, tmp_path: Path
) -> None:
    done = handrail("train", str(configured(tmp_path)), "--output", "out", *options)
    assert done.code == 2 and sentence in done.err and not (tmp_path / "out").exists()
