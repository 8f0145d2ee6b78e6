"""Bad input of every kind: one sentence that says what is wrong, where, and what to do; exit code 2; and
nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from handrail.models.builtin import locate
from tests.cli.test_commands import ROWS, configured, jsonl
from tests.conftest import Handrail

RUN = ("train", "run.toml", "--output", "out")
COMPARE = ("compare", "run.toml", "--output", "out")
MODEL = "builtin:house-tiny"
EVAL = ("eval", MODEL, "data.jsonl", "--set", "rollout.max_tokens=8")
HARVEST = ("harvest", MODEL, "data.jsonl", "--set", "rollout.max_tokens=8", "--output")
ENDPOINT = "endpoint={base_url='http://localhost:1/v1', model='m'"

# ``lay_out`` writes the files that are named here.
CASES: list[tuple[tuple[str, ...], str]] = [
    # The command line
    (("train", "missing.toml"), "there is no configuration file missing.toml"),
    (("train", "folder"), "folder cannot be read"),
    (("train", "latin.toml"), "latin.toml cannot be read"),
    (("train", "broken.toml"), "broken.toml is not TOML"),
    ((*RUN, "--set", "train.steps"), "--set takes section.key=value, not 'train.steps'"),
    (
        (*RUN, "--set", r'verifier.extract="#### (\d+)"'),
        '--set verifier.extract: the value begins with " and is not TOML',
    ),
    (
        (*RUN, "--set", "verifier.extract='#### (.+)"),
        "--set verifier.extract: the value begins with ' and is not TOML",
    ),
    (
        (*RUN, "--set", r"data.prompt_template={prompt}\n"),
        "--set data.prompt_template: the value begins with { and is not TOML",
    ),
    (
        (*RUN, "--set", "data.train=[a.jsonl, b.jsonl]"),
        "--set data.train: the value begins with [ and is not TOML",
    ),
    (
        (*COMPARE, "--set", "compare.runs={A={method={name=sort}}}"),
        "--set compare.runs: the value begins with { and is not TOML",
    ),
    (
        (*RUN, "--set", "data.train=task:house-rules?level='hard'"),
        "the option 'level' has the value 'hard'; write it without quotes",
    ),
    (("check", "data.jsonl", "--column", "prompt='prompt'"), "the column map names the column ''prompt''"),
    ((*RUN, "--set", "train.stepz=1"), "there is no setting train.stepz; did you mean 'steps'?"),
    ((*RUN[:-1], "a file"), "a file is a file; choose another --output"),
    ((*RUN[:-1], "another run", "--resume"), "another run holds a run of another configuration"),
    ((*RUN[:-1], "another run"), "another run already holds a run; continue it with --resume"),
    ((*RUN[:-1], "folder"), "folder has no metrics.jsonl and holds something else; choose another --output"),
    (
        (*RUN[:-1], "a comparison"),
        "a comparison holds a comparison, into which no run can be written; choose another --output",
    ),
    (
        (*RUN[:-1], "a measurement"),
        "a measurement holds a measurement, into which no run can be written; choose another --output",
    ),
    (
        (*COMPARE[:-1], "another run", "--methods", "grpo"),
        "another run holds a run, into which no comparison can be written; choose",
    ),
    (
        (*COMPARE[:-1], "a measurement", "--methods", "grpo"),
        "a measurement holds a measurement, into which no comparison can be written",
    ),
    (
        (*COMPARE[:-1], "a comparison", "--methods", "grpo"),
        "grpo/seed-0 holds a run of another configuration",
    ),
    (
        (*COMPARE[:-1], "a comparison", "--methods", "grpo,grop"),
        "there is no method 'grop'; did you mean 'grpo'?",
    ),
    (("train", "deep.toml"), "deep.toml is nested too deeply to be read"),
    (("train", "run.toml", "--output", "/proc/nowhere"), "/proc/nowhere cannot be created"),
    (("compare", "run.toml", "--methods", "grpo", "--output", "/proc/nowhere"), "/proc/nowhere"),
    (("plan", "data.jsonl", "--output", "/proc/nowhere.jsonl"), "/proc/nowhere.jsonl"),
    (("check", "x" * 5000), "cannot be read or written (File name too long)"),
    (("check", ""), "the data source '' names nothing; give a file, a directory or a dataset"),
    ((*RUN, "--set", 'data.train=""'), "data.train[1].path: string should have at least 1 character, not"),
    ((*RUN, "--set", "eval.sets={a=''}"), "eval.sets.a: string should have at least 1 character, not ''"),
    ((*COMPARE, "--methods", "grpo,lufy"), "there is no method 'lufy'; did you mean 'luffy'?"),
    ((*COMPARE, "--methods", "grpo", "--runs", "A"), "give one of them"),
    ((*COMPARE, "--runs", "A"), "[compare.runs] has no 'A'"),
    (COMPARE, "has no [compare.runs]"),
    (
        (*COMPARE, "--set", "compare.runs={A={train={stepz=1}}}"),
        "compare.runs.A: there is no setting train.stepz",
    ),
    ((*COMPARE, "--methods", "grpo", "--set", "compare.seeds=[1, 1]"), "two runs would be written into"),
    ((*COMPARE, "--methods", "grpo,,sort"), "--methods grpo,,sort: a name is empty"),
    ((*COMPARE, "--methods", "grpo,grpo"), "--methods: grpo is named twice"),
    (("methods", "DAPO"), "method.name: DAPO is grpo with clip_high = 0.28"),
    (
        (*RUN, "--set", "method={name='grpo', terms=['ace']}"),
        "method.terms[1]: input should be a table, { name = \"ace\" }, not 'ace'",
    ),
    ((*RUN, "--set", "train.steps=" + "9" * 5000), "--set train.steps: it holds a whole number of more than"),
    (("judge", "data.jsonl", "--threshold", "7"), "--threshold is 7; it must be above 0 and at most 1"),
    (("judge", "data.jsonl", "--judge", "mine.py:Nobody"), "mine.py has no 'Nobody'"),
    (("plan", "data.jsonl", "--output", "text.parquet"), "text.parquet, line 1: this is not a problem with"),
    (("plan", "data.jsonl", "--output", "binary"), "binary is not a text file (UTF-8); choose another"),
    ((*HARVEST, "binary"), "binary is not a text file (UTF-8); choose another --output"),
    ((*HARVEST, "data.jsonl"), "data.jsonl holds something else than a harvest; choose another --output"),
    ((*RUN, "--set", "method={name='npo', cache='binary'}"), "binary is not a text file (UTF-8); name a"),
    ((*RUN, "--set", "data.train=list.jsonl"), "list.jsonl: it holds one JSON list"),
    ((*RUN, "--set", "data.train=repeated.jsonl"), "repeated.jsonl, line 1: a key is repeated in an object"),
    (("methods", "sorrt"), "there is no method 'sorrt'; did you mean 'sort'?"),
    (("model", "fetch", "smollm3", "--output", "out"), "there is no model 'smollm3'"),
    (("report", "folder"), "folder"),
    (("report", "nowhere"), "nowhere"),
    (("plan", "data.jsonl", "--output", "folder"), "folder"),
    (("check", "data.jsonl", "--column", "prompt"), "--column takes our_field=their_column, not 'prompt'"),
    (("check", "data.jsonl", "--column", "promt=prompt"), "the column map has the unknown field 'promt'"),
    (("check", "data.jsonl", "--verifier", "exakt"), "there is no verifier 'exakt'; did you mean 'exact'?"),
    (("check", "data.jsonl", "--against", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
    ((*EVAL, "--output", "a file"), "a file is a file"),
    ((*EVAL, "--output", "folder"), "folder holds something else; choose another --output"),
    ((*EVAL, "--output", "another run"), "another run holds a run; choose another --output"),
    (("eval", "another rum"), "there is no directory another rum; did you mean another run?"),
    (
        ("eval", "runs/nope"),
        "there is no directory runs/nope; there is no directory runs either, so check the path",
    ),
    (("eval", "nowhere/model", "data.jsonl", "--output", "out"), "model.path: nowhere/model"),
    (("probe", MODEL, "nowhere.jsonl", "--output", "out"), "nowhere.jsonl: there is no such file"),
    (("judge", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
    # Settings
    ((*RUN, "--set", "train.steps=0"), "train.steps: input should be greater than or equal to 1, not 0"),
    ((*RUN, "--set", "train.learning_rate=inf"), "train.learning_rate: input should be a finite number"),
    (
        (*RUN, "--set", "train.learning_rate=1e38"),
        "train.learning_rate: input should be less than or equal to 10",
    ),
    (
        (*RUN, "--set", "verifier.timeout=1e300"),
        "verifier.timeout: input should be less than or equal to 86400",
    ),
    (
        (*RUN, "--set", "verifier.memory_gib=0.0001"),
        "verifier.memory_gib: input should be greater than or equal to 0.05",
    ),
    ((*RUN, "--set", "train.betas=" + "[" * 5000), "train.betas: "),
    (
        (*RUN, "--set", "method.name=leaves.py:Mine"),
        "method.name: leaves.py cannot be imported: SystemExit: 3",
    ),
    ((*RUN, "--set", "train.betas=[0.9]"), "train.betas: list should have at least 2 items"),
    ((*RUN, "--set", "rollout.group_size=0"), "rollout.group_size: "),
    (
        (*RUN, "--set", "rollout.group_size=1"),
        "rollout.group_size is 1, and grpo compares the members of a group with each other",
    ),
    (
        (*COMPARE, "--methods", "sft,sort", "--set", "rollout.group_size=1"),
        "compare.runs.sort: rollout.group_size is 1, and sort compares",
    ),
    (
        (*RUN, "--set", "model.dtype=float16"),
        "model.dtype: input should be 'float32' or 'bfloat16', not 'float16'",
    ),
    ((*RUN, "--set", "model.attention=fancy"), "fancy"),
    ((*RUN, "--set", "lora={rank=0}"), "lora.rank: "),
    ((*RUN, "--set", "lora={targets=['nothing']}"), "lora.targets"),
    (
        (*RUN, "--set", "sampler.name=tgi"),
        "sampler.name: input should be 'transformers' or 'vllm', not 'tgi'",
    ),
    ((*RUN, "--set", "method.name=sort", "--set", "method.alpha=2.0"), "method.alpha"),
    ((*RUN, "--set", "method.name=nowhere.py:Mine"), "method.name: there is no file nowhere.py"),
    ((*RUN, "--set", "method.name=mine.py:Mine"), "method.name: mine.py has no 'Mine'"),
    (
        (*RUN, "--set", "method.name=raises.py:Mine"),
        "method.name: raises.py cannot be imported: ZeroDivisionError",
    ),
    ((*RUN, "--set", "verifier.name=mine.py:VALUE"), "verifier.name: mine.py:VALUE is not a function"),
    ((*RUN, "--set", "verifier.extract=("), "is not a regular expression"),
    ((*RUN, "--set", "verifier.timeout=0"), "verifier.timeout: "),
    ((*RUN, "--set", "method={name='scope', judge='llm'}"), "needs a section [endpoint]"),
    ((*RUN, "--set", "method={name='scope', judge='prm'}"), "experts.prm"),
    ((*RUN, "--set", f"{ENDPOINT}, max_cost=1.0}}"), "max_cost needs input_price and output_price"),
    (
        (*RUN, "--set", "endpoint={base_url='https://me:hunter2@host/v1', model='m'}"),
        "base_url holds a name, a password or parameters",
    ),
    (
        (*RUN, "--set", f"{ENDPOINT}, api_key='sk-hunter2'}}"),
        "there is no setting endpoint.api_key; did you mean 'api_key_env'?",
    ),
    (
        (*RUN, "--set", f"{ENDPOINT}, api_key_env='sk-hunter2'}}"),
        "api_key_env is not the name of an environment variable",
    ),
    # Models
    ((*RUN, "--set", "model.path=empty model"), "it has no config.json"),
    ((*RUN, "--set", "model.path=half a model"), "model.path: half a model"),
    ((*RUN, "--set", "model.path=pickled model"), "model.path: pickled model"),
    ((*RUN, "--set", "model.path=text.gguf"), "model.path: text.gguf"),
    ((*RUN, "--set", "model.path=a file"), "model.path: a file"),
    # Data
    ((*RUN, "--set", "data.train=nothing.jsonl"), "nothing.jsonl: it is empty"),
    ((*RUN, "--set", "data.train=broken.jsonl"), "broken.jsonl, line 2: it is not JSON"),
    ((*RUN, "--set", "data.train=mixed.jsonl"), "mixed.jsonl, line 3, field answer: its text holds no"),
    (
        (*RUN, "--set", "data.train=quiz.jsonl"),
        "quiz.jsonl, line 1, field answer: no choice has this number, counting from 0",
    ),
    (
        ("check", "proofs.jsonl"),
        "proofs.jsonl, line 1, field answer: it says that there is no answer to compare with",
    ),
    ((*RUN, "--set", "data.train=latin.jsonl"), "latin.jsonl, line 1: it is not UTF-8"),
    ((*RUN, "--set", "data.train=number.jsonl"), "number.jsonl, line 1, field prompt: "),
    ((*RUN, "--set", "data.train=twice.jsonl"), "twice.jsonl, line 2, field id: another row has the same id"),
    ((*RUN, "--set", "data.train=unknown.jsonl"), "unknown.jsonl"),
    ((*RUN, "--set", "data.train=text.parquet"), "text.parquet: it cannot be read as parquet"),
    ((*RUN, "--set", "data.train=data.csv"), "data.csv, line 2, field answer: "),
    ((*RUN, "--set", "data.train=data.tsv"), "'.tsv' files are not supported"),
    (
        (*RUN, "--set", "data.train=folder"),
        "folder: this directory holds no .jsonl, .json, .parquet, .csv file",
    ),
    ((*RUN, "--set", "data.train=long.jsonl"), "long.jsonl, line 1, field prompt: "),
    ((*RUN, "--set", "data.train=chat.jsonl"), "chat.jsonl, line 1, field prompt: it is chat messages"),
    ((*RUN, "--set", "data.train=task:house-rulez"), "there is no task 'house-rulez'"),
    (
        (*RUN, "--set", "data.train=task:house-rules?level=medium"),
        "level is 'medium'; it must be one of easy, hard",
    ),
    (
        (*RUN, "--set", "data.train=reasoning-gym:countdwn"),
        "reasoning-gym has no family 'countdwn'; did you mean one of countdown",
    ),
    ((*RUN, "--set", "data.train=[]"), "data.train: "),
    *(
        (
            (*RUN, "--set", "data.train=bare.jsonl", "--set", f"method={method}"),
            "learns from references, and no training problem has one",
        )
        for method in ("{name='luffy'}", "{name='sort'}", "{name='grpo+sft'}", "{name='scope'}")
    ),
    ((*RUN, "--set", "eval.sets={held='broken.jsonl'}"), "broken.jsonl, line 2"),
    ((*RUN, "--set", "data.train=[{path='data.jsonl', probe='nowhere.jsonl'}]"), "nowhere.jsonl"),
]


def lay_out(here: Path) -> None:
    configured(here)
    for name in ("folder", "empty model", "half a model", "pickled model", "another run"):
        (here / name).mkdir()
    texts = {
        "a file": "text",
        "folder/notes.txt": "text",
        "broken.toml": "[model\n",
        "mine.py": "VALUE = 3\n",
        "raises.py": "1 / 0\n",
        "leaves.py": "import sys\nsys.exit(3)\n",
        "deep.toml": "x = " + "[" * 5000,
        "data.tsv": "prompt\tanswer\n",
        "data.csv": "prompt,answer\nhi,\n",
        "text.gguf": "GGUF?",
        "text.parquet": "PAR?",
        "nothing.jsonl": "\n",
        "list.jsonl": json.dumps(ROWS),
        "repeated.jsonl": '{"prompt": "1", "answer": "1", "prompt": "2"}',
        "broken.jsonl": json.dumps(ROWS[0]) + "\n{'prompt': 1}\n",
        "half a model/config.json": '{"model_type":',
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    (here / "binary").write_bytes(b"PAR1\xff")
    for name in ("latin.toml", "latin.jsonl"):
        (here / name).write_bytes("# é\n".encode("latin-1"))
    jsonl(here / "bare.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    jsonl(here / "number.jsonl", [{"prompt": 3, "answer": "1"}])
    jsonl(
        here / "twice.jsonl",
        [{"id": "a", "prompt": "1", "answer": "1"}, {"id": "a", "prompt": "2", "answer": "2"}],
    )
    jsonl(
        here / "mixed.jsonl",
        [{"question": "?", "answer": answer} for answer in ("so\n#### 1", "so\n#### 2", "3")],
    )
    jsonl(here / "quiz.jsonl", [{"question": "?", "choices": ["yes", "no"], "answer": 2}])
    jsonl(here / "proofs.jsonl", [{"problem": "?", "solution": "!", "answer": "proof"}])
    jsonl(here / "unknown.jsonl", [{"frage": "?", "antwort": "!"}])
    jsonl(here / "long.jsonl", [{"prompt": "1 + " * 200 + "1 =", "answer": "201"}])
    jsonl(here / "chat.jsonl", [{"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2"}])
    shutil.copytree(
        locate(MODEL),
        here / "pickled model",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    (here / "pickled model/pytorch_model.bin").write_bytes(b"\x80\x04.")
    (here / "a comparison/grpo/seed-0").mkdir(parents=True)
    (here / "a comparison/grpo/seed-0/metrics.jsonl").write_text('{"step": 0}\n')
    (here / "a comparison/grpo/seed-0/config.toml").write_text(
        (here / "run.toml").read_text() + "\n[method]\nname = 'sort'\n"
    )
    (here / "a measurement").mkdir()
    (here / "a measurement/settings.json").write_text("{}\n")
    (here / "another run/metrics.jsonl").write_text('{"step": 0}\n')
    (here / "another run/config.toml").write_text(
        (here / "run.toml").read_text() + "\n[method]\nname = 'sort'\n"
    )


def there(here: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(here)): path.read_bytes() if path.is_file() else b"" for path in here.rglob("*")
    }


def test_there_are_enough_distinct_cases() -> None:
    assert len(CASES) == len(set(CASES)) >= 60


@pytest.mark.parametrize(
    ("arguments", "words"), CASES, ids=[" ".join(arguments)[-60:] for arguments, _ in CASES]
)
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(
    arguments: tuple[str, ...],
    words: str,
    handrail: Handrail,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # of the user's modules: Python's own writing is none of ours
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    lay_out(tmp_path)
    before = there(tmp_path)
    done = handrail(*arguments)
    assert done.code == 2, done
    assert words in done.err, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert "hunter2" not in done.err + done.out
    assert there(tmp_path) == before
