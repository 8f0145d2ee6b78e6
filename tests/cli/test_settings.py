"""Every setting is described in the terminal, in the documentation and in editors."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main
from jsonschema import Draft202012Validator
from rich.text import Text

from handrail._util.errors import UserError
from handrail._util.progress import reflowed
from handrail.cli.commands import app
from handrail.cli.schema import editor_schema, page
from handrail.methods import METHODS, build
from handrail.models.config import RolloutConfig
from handrail.training.config import Config
from tests.conftest import Handrail, config

ROOT = Path(__file__).parents[2]


def test_every_setting_has_a_description_of_whole_sentences() -> None:
    sections = Config.model_json_schema()["$defs"]
    assert all(schema["description"].endswith(".") for schema in sections.values())
    sections |= {f"method {name}": cls.Settings.model_json_schema() for name, cls in METHODS.items()}
    for section, schema in sections.items():
        for name, setting in schema["properties"].items():
            text = setting.get("description", "")
            assert text.endswith(".") and len(text.split()) > 2, f"{section}.{name} is described by {text!r}"


def test_the_documentation_lists_exactly_the_existing_settings() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    command = "python -m handrail.cli config --markdown > docs/configuration.md"
    assert written == page(), f"a setting has changed since the page was written; run: {command}"


def test_all_settings_are_listed_with_values_default_and_meaning(handrail: Handrail) -> None:
    lines = handrail("config").out.splitlines()
    for section in ("[model]", "[[data.train]]", "[method]", "[lora]", "[endpoint]", "[train]"):
        assert any(line.startswith(f"{section}  ") for line in lines), section
    at = next(number for number, line in enumerate(lines) if "│ learning_rate" in line)
    assert (
        "number > 0, ≤ 10" in lines[at]
        and "Peak learning rate" in lines[at]
        and "default 1e-06" in lines[at + 1]
    )
    assert any('"constant", "linear", "cosine"' in line for line in lines)


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("rollout", ["[rollout]", "group_size", "max_tokens", "default 256"], ["learning_rate"]),
        ("rollout.max_tokens", ["[rollout]", "max_tokens", "integer ≥ 1", "default 256"], ["group_size"]),
        (
            "data.train",
            ["text or list of (text or table)", "required", "[[data.train]]", "share", "number > 0"],
            ["columns"],
        ),
        ("method", ["handrail methods NAME", '"luffy"', 'default "grpo"'], ["gamma"]),
    ],
)
def test_a_section_or_a_setting_can_be_looked_up(
    name: str, there: list[str], not_there: list[str], handrail: Handrail
) -> None:
    done = handrail("config", name)
    assert done.code == 0
    for part in there:
        assert part in done.out
    for part in not_there:
        assert part not in done.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["max_tokens"],
            "no setting or section 'max_tokens'; did you mean rollout.max_tokens or endpoint.max_tokens?",
        ),
        (["train.stepz"], "did you mean train.steps"),
        (["method.gamma"], "see handrail methods NAME"),
        (["train", "--schema"], "exclude each other"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_existing_ones(
    arguments: list[str], part: str, handrail: Handrail
) -> None:
    done = handrail("config", *arguments)
    assert done.code == 2 and part in done.err and done.err.count("\n") == 1


def test_a_method_shows_its_settings_under_their_table_with_legal_values(handrail: Handrail) -> None:
    lines = handrail("methods", "scope").out.splitlines()
    assert "settings, under [method]" in lines
    for setting, values, default in (
        ("threshold", "number > 0, ≤ 1", "0.5"),
        ("judge", "text", '"arithmetic"'),
        ("mode", '"step", "suffix", "reference"', '"step"'),
        ("normalize_std", "true or false", "false"),
    ):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"│ {setting} "))
        assert values in lines[at] and f"default {default} " in lines[at + 1]


# The schema for editors


def faults(tree: dict[str, Any], handrail: Handrail) -> list[str]:
    schema = json.loads(handrail("config", "--schema").out)
    return [error.message for error in Draft202012Validator(schema).iter_errors(tree)]


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda file: file.name)
def test_every_example_fits_the_schema(file: Path, handrail: Handrail) -> None:
    assert faults(tomllib.loads(file.read_text()), handrail) == []


NEEDED: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "x"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"path": "m", "devise": "cpu"}},
        {"trian": {}},
        {"train": {"steps": 0}},
        {"train": {"schedule": "quick"}},
        {"data": {"train": [{"path": "x", "share": 0}]}},
        {"method": {"name": "lufy"}},
        {"method": {"name": "luffy", "gama": 0.1}},
        {"method": {"name": "grpo", "gamma": 0.1}},
        {"lora": {"rank": "high"}},
    ],
)
def test_the_schema_refuses_what_training_refuses(changes: dict[str, Any], handrail: Handrail) -> None:
    assert faults(NEEDED | changes, handrail)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"clip": False}},
        {"method": {"name": "luffy", "gamma": 0.2}},
        {"method": {"name": "mine.py:Mine", "anything": 1}},
        {"data": {"train": ["x", {"path": "y", "share": 3}]}},
        {"lora": {}},
    ],
)
def test_the_schema_accepts_what_training_accepts(changes: dict[str, Any], handrail: Handrail) -> None:
    assert faults(NEEDED | changes, handrail) == []


def test_the_schema_describes_methods_and_their_settings_for_completion() -> None:
    methods = {
        kind["properties"]["name"].get("const"): kind
        for kind in editor_schema()["properties"]["method"]["anyOf"]
    }
    assert {*METHODS, None} == set(methods)
    assert methods["luffy"]["properties"]["name"]["description"].startswith("LUFFY: ")
    assert methods["luffy"]["properties"]["gamma"]["exclusiveMinimum"] == 0
    assert "``" not in json.dumps(editor_schema())


# Help texts


def helps(command: Any, path: str = "handrail") -> Iterator[tuple[str, str]]:
    """Yield every command and option of the command line with its help text."""
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", None) or ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, f"{path} {name}")


def test_every_command_and_option_has_a_help_text_with_all_its_brackets() -> None:
    for path, text in helps(typer.main.get_command(app)):
        assert text.endswith("."), f"{path}: {text!r}"
        assert not Text.from_markup(text).spans, (
            f"{path}: write \\[ for [, or it is taken for a style: {text!r}"
        )


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("train", "most_skipped", "max_skipped_updates"),
        ("sampler", "correction", "importance_weight_cap"),
        ("sampler", "most_gap", "max_mismatch"),
        ("scope", "least_right", "min_correct_prefix"),
        ("scope", "tries", "max_attempts"),
        ("scope", "normaliser", "loss_normalizer"),
        ("sort", "strength", "imitation_coef"),
    ],
)
def test_a_key_of_an_earlier_configuration_is_answered_with_its_new_name(
    section: str, old: str, new: str
) -> None:
    with pytest.raises(UserError, match=f"there is no setting .*{old}; did you mean '{new}'"):
        if section in METHODS:
            build({"name": section, old: 1}, RolloutConfig())
        else:
            config(**{section: {old: 1}})


def test_help_paragraphs_do_not_keep_the_line_breaks_of_the_source(
    handrail: Handrail,
) -> None:
    text = handrail("methods", "luffy").out
    assert (
        "(G if it has no reference). guide: the reference joins the group, "
        "graded by the same verifier. If it is graded wrong," in text
    )
    assert "\n\nrollout: G − 1" in text
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        assert "\n" not in (command.help or "").replace("\n\n", ""), command.name
    assert (
        reflowed("One\nparagraph.\n\nAnother:\n- a\n- b\n  and c")
        == "One paragraph.\n\nAnother:\n- a\n- b and c"
    )
