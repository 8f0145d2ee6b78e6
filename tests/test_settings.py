"""Every setting is described where users look for it."""

from __future__ import annotations

from handrail.config import Config
from handrail.methods import METHODS


def test_every_setting_has_a_description_of_whole_sentences() -> None:
    sections = Config.model_json_schema()["$defs"]
    assert all(schema["description"].endswith(".") for schema in sections.values())
    sections |= {f"method {name}": cls.Settings.model_json_schema() for name, cls in METHODS.items()}
    for section, schema in sections.items():
        for name, setting in schema["properties"].items():
            text = setting.get("description", "")
            assert text.endswith(".") and len(text.split()) > 2, f"{section}.{name} is described by {text!r}"
