"""Resuming: only the right run, with the settings and contents that it was started with."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from handrail import UserError, train
from handrail.data.config import Source
from handrail.eval.jobs import plan_jobs, require_finished_unchanged
from handrail.training import contents
from handrail.training.contents import probed_with_another_model
from handrail.training.resuming import compare_directory, differences, require_unchanged
from handrail.training.run_directory import keep_until
from handrail.types.problem import Problem, digest
from tests.conftest import EASY, Handrail, config
from tests.tiny_models import save_chat_model

SHORT = {"steps": 1, "checkpoint_every": 1, "problems_per_step": 2, "samples_every": 0}


def short(**changes: Any) -> Any:
    steps = {**SHORT, **changes.pop("train", {})}
    return config(
        **{
            "rollout": {"max_tokens": 4, "group_size": 2},
            "data": {"train": f"{EASY}&n=8"},
            "train": steps,
            **changes,
        }
    )


def written(file: Path, **changes: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tomli_w.dumps(short(**changes).model_dump(exclude_none=True, exclude_defaults=True)))
    return str(file)


def test_resuming_a_missing_run_is_refused_and_writes_nothing(handrail: Handrail, tmp_path: Path) -> None:
    file = written(tmp_path / "first.toml")
    nothing = handrail("train", file, "--resume")
    assert (
        nothing.code == 2
        and "there is no run in runs/first to resume; to start one, leave out --resume" in nothing.err
    )
    assert not Path("runs").exists()
    assert handrail("train", file, "--output", "runs/first").code == 0
    mistyped = handrail("train", file, "--output", "runs/frist", "--resume", "--set", "train.steps=2")
    assert (
        mistyped.code == 2
        and "there is no run in runs/frist to resume; did you mean --output runs/first?" in mistyped.err
    )
    assert not Path("runs/frist").exists()


def test_a_run_killed_before_it_wrote_a_line_is_resumed_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    assert train(short(), tmp_path / "run", resume=True)["steps"] == 1


def test_a_runs_own_configuration_means_its_own_directory(handrail: Handrail, tmp_path: Path) -> None:
    assert handrail("train", written(tmp_path / "first.toml"), "--output", "runs/a").code == 0
    again = handrail("train", "runs/a/config.toml")
    assert again.code == 2 and "runs/a already holds a run; continue it with --resume" in again.err
    longer = handrail("train", "runs/a/config.toml", "--resume", "--set", "train.steps=2")
    assert longer.code == 0 and "from builtin:house-tiny into runs/a" in longer.out
    assert json.loads(Path("runs/a/summary.json").read_text())["steps"] == 2
    assert train("runs/a/config.toml", resume=False, output="runs/b")["steps"] == 2
    assert compare_directory("runs/a/config.toml") == Path("runs/compare-a") and compare_directory(
        "first.toml"
    ) == Path("runs/compare-first")
    assert {path.name for path in Path("runs").iterdir()} == {"a", "b"}


def test_a_run_stopped_before_its_first_checkpoint_says_that_it_starts_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(short(train={"steps": 2, "checkpoint_every": 0}), tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    with caplog.at_level(logging.WARNING, "handrail"):
        assert train(short(train={"steps": 2}), tmp_path / "run", resume=True)["steps"] == 2
    assert (
        "was stopped after step 2 and before its first checkpoint, so it starts again at step 0"
        in caplog.text
    )


def test_a_run_with_lost_checkpoints_is_not_resumed_under_any_settings(tmp_path: Path) -> None:
    train(short(train={"steps": 2}), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/summary.json").unlink()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no checkpoint of the run.s 2 steps"):
        train(short(train={"steps": 3, "checkpoint_every": 0}), tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_refusal_names_the_keys_and_both_values(handrail: Handrail, tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml")
    assert handrail("train", file, "--output", "run").code == 0
    other = handrail(
        "train",
        file,
        "--output",
        "run",
        "--resume",
        "--set",
        "train.seed=5",
        "--set",
        'data.system="Be brief."',
    )
    assert other.code == 2 and "run holds a run of another configuration: " in other.err
    assert (
        "train.seed is 0 there and 5 here" in other.err
        and 'data.system is not set there and "Be brief." here' in other.err
    )


def rows(file: Path, *answers: int) -> None:
    file.write_text(
        "".join(json.dumps({"prompt": f"{answer} + 0 ?", "answer": str(answer)}) + "\n" for answer in answers)
    )


def test_training_data_that_changed_under_the_same_path_are_refused(
    handrail: Handrail, tmp_path: Path
) -> None:
    rows(tmp_path / "d.jsonl", 1, 2, 3)
    train(short(data={"train": "d.jsonl"}), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    rows(tmp_path / "d.jsonl", 1, 2, 4)
    longer = short(data={"train": "d.jsonl"}, train={"steps": 2})
    with pytest.raises(
        UserError,
        match=(
            r'run was made from other contents of data.train\[1\].path = "d.jsonl", which changed since; '
            r"restore"
        ),
    ):
        train(longer, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in before} == before
    (job,) = plan_jobs(short(data={"train": "d.jsonl"}, compare={"runs": {"A": {}}}), tmp_path / "compared")
    shutil.copytree(tmp_path / "run", job.directory)
    with pytest.raises(UserError, match=r"a/seed-0 was made from other contents of data.train"):
        require_finished_unchanged([job])
    rows(tmp_path / "d.jsonl", 1, 2, 3)
    require_finished_unchanged([job])
    assert train(longer, tmp_path / "run", resume=True)["steps"] == 2


def test_metadata_count_as_data(tmp_path: Path) -> None:
    one, other = (
        [Problem("a", "p", "1", metadata={"tests": tests, "kinds": {"b", "a"}})]
        for tests in ("x == 1", "x == 2")
    )
    assert digest(one) != digest(other)
    assert digest(one) == digest([Problem("a", "p", "1", metadata={"tests": "x == 1", "kinds": {"a", "b"}})])


def test_data_have_the_checksum_of_their_json_text() -> None:
    odd: Any = {"x": 0.5, (1, 2): "no key of JSON"}
    problems = [
        Problem("a", [{"role": "user", "content": "é?"}], "1", ("r", "s"), "plan", {"kinds": {"b", "a"}}),
        Problem("b", "p", "2", metadata=odd),
    ]
    text = (
        r'[["a", [{"role": "user", "content": "\u00e9?"}], "1", ["r", "s"], "plan", {"kinds": ["a", "b"]}], '
        r'["b", "p", "2", [], null, {"x": 0.5}]]'
    )
    assert digest(problems) == hashlib.sha256(text.encode()).hexdigest()
    assert digest([]) == hashlib.sha256(b"[]").hexdigest()


def test_the_checksum_of_data_is_computed_in_the_memory_of_one_problem() -> None:
    problems = [Problem("a", "p", "1", ("x" * 100_000,))] * 50
    tracemalloc.start()
    digest(problems)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # 5 MB of text
    tracemalloc.stop()


def test_a_model_that_changed_under_the_same_path_is_refused(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model")
    settings = {"model": {"path": str(model)}}
    train(short(**settings), tmp_path / "run")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="was made from other contents of model.path = "):
        train(short(**settings, train={"steps": 2}), tmp_path / "run", resume=True)


def test_large_files_are_compared_without_reading_them_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "READ_WHOLE", 1000)
    monkeypatch.setattr(contents, "BLOCK", 10)
    (tmp_path / "a").write_bytes(bytes(5000))
    (tmp_path / "b").write_bytes(bytes(4999) + b"x")
    (tmp_path / "c").write_bytes(bytes(5001))
    assert len({contents.file_digest(tmp_path / name) for name in "abc"}) == 3


VERIFIER = "def grade(problem, completion):\n    return {}\n"


def test_changed_held_out_problems_and_code_cause_a_warning(
    handrail: Handrail, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(tmp_path / "held.jsonl", 1, 2)
    (tmp_path / "mine.py").write_text(VERIFIER.format(0.0))
    settings = {
        "eval": {"sets": {"held": "held.jsonl"}},
        "verifier": {"name": "mine.py:grade", "extract": None},
    }
    train(short(**settings), tmp_path / "run")
    rows(tmp_path / "held.jsonl", 1, 3)
    (tmp_path / "mine.py").write_text(VERIFIER.format(1.0))
    with caplog.at_level(logging.WARNING, "handrail"):
        assert train(short(**settings, train={"steps": 2}), tmp_path / "run", resume=True)["steps"] == 2
    assert (
        'run goes on with other contents of eval.sets.held = "held.jsonl", verifier.name = "mine.py:grade", '
        "which changed" in caplog.text
    )
    command = [
        "eval",
        "builtin:house-tiny",
        "held.jsonl",
        "--samples",
        "1",
        "--output",
        "measured",
        "--set",
        "rollout.max_tokens=4",
    ]
    command += ["--set", "verifier.name=mine.py:grade"]
    assert handrail(*command).code == 0
    (tmp_path / "mine.py").write_text(VERIFIER.format(0.5))
    again = handrail(*command)
    assert (
        again.code == 2
        and "measured holds a measurement from before the verifier changed; choose another --output"
        in again.err
    )


def test_all_code_and_answers_that_a_method_names_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {
        "name": "mine.py:Method",
        "judge": "mine.py:Judge",
        "corrector": "mine.py:Corrector",
        "cache": "answers.jsonl",
        "terms": [{"name": "fapo", "judge": "judge.py:Judge"}, {"name": "mine.py:Term"}],
    }
    settings = short(method=method)
    for name in ("mine.py", "judge.py", "answers.jsonl"):
        Path(name).write_text("1")

    def now() -> dict[str, str]:
        return contents.contents(settings, [[Problem("a", "p", "1")]], {})

    before = now()
    assert [key for key in before if key.startswith("method.")] == [
        'method.name = "mine.py:Method"',
        'method.judge = "mine.py:Judge"',
        'method.corrector = "mine.py:Corrector"',
        'method.cache = "answers.jsonl"',
        'method.terms[1].judge = "judge.py:Judge"',
        'method.terms[2].name = "mine.py:Term"',
    ]
    Path("contents.json").write_text(json.dumps(before))
    Path("judge.py").write_text("2")
    with caplog.at_level(logging.WARNING, "handrail"):
        require_unchanged(Path(), now())
    assert 'other contents of method.terms[1].judge = "judge.py:Judge", which changed' in caplog.text
    with pytest.raises(UserError, match=r"other contents of method.terms\[1\].judge"):
        require_unchanged(Path(), now(), every=True)
    Path("answers.jsonl").write_text("2")
    with pytest.raises(UserError, match=r'other contents of method.cache = "answers.jsonl", which changed'):
        require_unchanged(Path(), now())


@pytest.mark.parametrize("setting", ["prm", "teacher"])
def test_an_unknown_built_in_model_is_said_of_the_setting_that_names_it(setting: str) -> None:
    settings = short(experts={setting: "builtin:huge"})
    with pytest.raises(UserError, match=f"^experts.{setting}: there is no built-in model 'huge'; there are"):
        contents.contents(settings, [[Problem("a", "p", "1")]], {})


@pytest.mark.parametrize("damaged", ["", '{"data.train', "[1]"])
def test_damaged_digests_are_named(damaged: str, tmp_path: Path) -> None:
    require_unchanged(tmp_path, {"model.path": "0"})  # a run of an early version has none
    (tmp_path / "contents.json").write_text(damaged)
    with pytest.raises(UserError, match="contents.json: it is damaged; restore it from a copy, or delete it"):
        require_unchanged(tmp_path, {"model.path": "0"})


def test_a_probe_of_another_model_causes_a_warning(
    handrail: Handrail, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_chat_model(tmp_path / "model")
    rows(tmp_path / "d.jsonl", 1, 2, 3)
    probed = handrail(
        "probe", "model", "d.jsonl", "--rollouts", "4", "--set", "rollout.max_tokens=4", "--output", "probe"
    )
    assert Path("probe/problems.jsonl").exists(), probed.err
    source = Source(
        path="d.jsonl", probe="probe/problems.jsonl", keep=["all_wrong", "mixed", "all_right", "faulty"]
    )
    shutil.copytree(model, tmp_path / "moved")
    assert probed_with_another_model(source, "model") == probed_with_another_model(source, "moved") == ""
    with caplog.at_level(logging.WARNING, "handrail"):
        train(short(data={"train": [source.model_dump()]}), tmp_path / "run")
    said = (
        "probe/problems.jsonl is a probe of model, but this run starts from builtin:house-tiny; probe "
        "d.jsonl with"
    )
    assert said in caplog.text


def test_the_kept_lines_of_a_large_file_are_copied_and_not_held_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    written = [f'{{"step":{step}, "text": "{"x" * 2**20}", "reward": 1e0}}\n' for step in range(20)]
    file.write_text("".join(written) + '{"step": 20, "te')
    tracemalloc.start()
    try:
        keep_until(file, 17)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.read_text() == "".join(written[:18])
    assert peak < 8 * 2**20  # a few copies of one line of 1 MiB, not 18 lines
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_damaged_line_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    text = '{"step": 0}\n{"step": 1\n{"step": 2}\n'
    file.write_text(text)
    with pytest.raises(UserError, match=r"samples.jsonl, line 2: it is damaged; restore it from a copy"):
        keep_until(file, 2)
    assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    "settings", [{"theme": "dark"}, {"model": "m"}, {"model": {"path": "m"}, "contents": []}]
)
def test_settings_of_something_else_beside_a_probe_tell_nothing(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    source = Source(path="d.jsonl", probe=str(tmp_path / "problems.jsonl"))
    assert probed_with_another_model(source, "builtin:house-tiny") == ""


def test_differences_are_named_by_key_and_only_the_first_shown_with_values() -> None:
    before = {"data": {"train": [{"path": "a"}, {"path": "b"}]}, "x": 1, "y": {"z": True}, "w": None, "v": 1}
    now = {"data": {"train": [{"path": "a"}, {"path": "c"}]}, "x": 2, "y": {"z": False}, "w": "new", "v": 1}
    assert differences(before, before) == ""
    assert differences(before, now) == (
        'data.train[2].path is "b" there and "c" here, x is 1 there and 2 here, y.z is true there and false '
        "here, w differ too"
    )
