"""A run's model is measured and shown with the prompt, length and verifier of the run, wherever it is moved
to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from handrail import UserError, train
from handrail.training.config import load_config
from handrail.training.trained import model_of, settings_file
from tests.conftest import EASY, Handrail, config
from tests.tiny_models import save_chat_model

HELD_OUT = f"{EASY}&split=test&n=4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    settings: dict[str, Any] = {
        "model": {"path": str(save_chat_model(root / "base"))},
        "data": {"train": f"{EASY}&n=8", "system": "Be brief.", "prompt_template": "Q: {prompt}"},
        "rollout": {"max_tokens": 5, "group_size": 2},
        "train": {"steps": 1, "problems_per_step": 2, "checkpoint_every": 1, "samples_every": 0},
        "eval": {"sets": {"held": HELD_OUT}},
    }
    train(config(**settings), root / "run")
    return root / "run"


def test_eval_finds_a_runs_model_and_uses_its_settings(
    trained: Path, handrail: Handrail, tmp_path: Path
) -> None:
    done = handrail("eval", str(trained), "--samples", "1", "--output", "whole")
    assert done.code == 0, done.err
    assert (
        f'settings from {trained}/model/handrail.toml: model.device = "cpu", data.system = "Be brief.", '
        in done.out
    )
    settings = json.loads(Path("whole/settings.json").read_text())
    assert settings["model"]["path"] == f"{trained}/model" and settings["sets"] == {"held": HELD_OUT}
    assert (settings["data"]["system"], settings["data"]["prompt_template"]) == ("Be brief.", "Q: {prompt}")
    assert (settings["rollout"]["max_tokens"], settings["verifier"]["name"]) == (5, "exact")
    told = ["--samples", "1", "--set", "rollout.max_tokens=3", "--set", 'data.system=""', "--output", "told"]
    assert handrail("eval", f"{trained}/model", HELD_OUT, *told).code == 0
    settings = json.loads(Path("told/settings.json").read_text())
    assert (settings["rollout"]["max_tokens"], settings["data"]["system"], settings["verifier"]["name"]) == (
        3,
        "",
        "exact",
    )
    (tmp_path / "plain.toml").write_text(
        f'[model]\npath = "x"\ndevice = "cpu"\n[data]\ntrain = "{HELD_OUT}"\n[rollout]\nmax_tokens = 4\n'
    )
    done = handrail(
        "eval", str(trained), HELD_OUT, "--samples", "1", "--config", "plain.toml", "--output", "file"
    )
    assert done.code == 0 and "settings from" not in done.out
    settings = json.loads(Path("file/settings.json").read_text())
    assert (settings["model"]["path"], settings["data"]["system"]) == (f"{trained}/model", None)


def test_a_moved_model_and_a_checkpoint_keep_the_runs_settings(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "moved")
    file = settings_file(str(tmp_path / "moved"))
    assert file and load_config(file) == load_config(trained / "config.toml")
    assert settings_file(f"{trained}/checkpoints/step-000001/model") == trained / "config.toml"
    assert settings_file("builtin:house-tiny") is settings_file(str(tmp_path)) is None


def test_data_of_another_kind_are_graded_by_the_verifier_that_fits_them(
    trained: Path, handrail: Handrail
) -> None:
    Path("d.jsonl").write_text('{"prompt": "5 + 3 ?", "answer": "8"}\n')
    done = handrail("eval", f"{trained}/model", "d.jsonl", "--samples", "1", "--output", "out")
    assert (
        done.code == 0
        and "graded by the verifier 'math'" in done.out
        and 'data.system = "Be brief."' in done.out
    )


def test_check_and_probe_use_the_runs_settings(trained: Path, handrail: Handrail) -> None:
    checked = handrail("check", HELD_OUT, "--model", str(trained))
    # The run's verifier compares whole completions, so it refuses all references: exit code 1.
    assert checked.code == 1 and "Be brief." in checked.out and "Q: " in checked.out, checked.err
    probed = handrail("probe", str(trained), HELD_OUT, "--rollouts", "4", "--output", "probe")
    assert "graded by the verifier 'exact'" in probed.out, probed.err
    assert json.loads(Path("probe/settings.json").read_text())["rollout"]["max_tokens"] == 5


def test_plan_uses_the_runs_settings(trained: Path, handrail: Handrail) -> None:
    done = handrail(
        "plan",
        f"{EASY}&n=2",
        "--planner",
        "policy",
        "--set",
        f"model.path={trained}",
        "--output",
        "planned.jsonl",
    )
    assert done.code == 0 and 'data.system = "Be brief."' in done.out, done.err


def test_an_unfinished_run_is_answered_with_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(
        UserError,
        match="is a run that has not ended, so there is no .*run/model; it has no checkpoint either",
    ):
        model_of(str(tmp_path / "run"))
    shutil.copytree(trained / "model", tmp_path / "run/checkpoints/step-000001/model")
    with pytest.raises(UserError, match=r"name its newest checkpoint, .*run/checkpoints/step-000001/model"):
        model_of(str(tmp_path / "run"))


def test_training_from_a_run_directory_is_answered_with_its_model(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no config.json\); did you mean .*run/model\?"):
        train(config(model={"path": str(trained)}), tmp_path / "out")
