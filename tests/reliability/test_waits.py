"""docs/reliability.md says how long each part waits: its limits are those of the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from handrail.experts.config import EndpointConfig
from handrail.verifiers.config import VerifierConfig

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
SETTINGS: dict[str, Any] = {"verifier": VerifierConfig, "endpoint": EndpointConfig}
UNITS = {"hours": 3600}


def test_the_table_of_waits_has_the_limits_of_the_code() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## What waits, and for how long")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| .+? \| `([\w.]+)`(?: in `([\w/]+)\.py`)? \| ([\d.]+) ?(\w*).*? \|.*\|$", section, re.M
    )
    assert len(rows) == section.count("\n| ") - 1 - section.count(" | – | ") and len(rows) > 10
    for name, module, limit, unit in rows:
        if module:
            known = getattr(import_module("handrail." + module.replace("/", ".")), name)
        else:
            part, setting = name.split(".")
            known = SETTINGS[part].model_fields[setting].default
        assert known == float(limit) * UNITS.get(unit, 1), name
