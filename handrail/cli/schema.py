"""Describe all settings, from the configuration's JSON schema: for tables, documentation and editors."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from handrail._util.errors import UserError
from handrail.methods import METHODS
from handrail.methods.base import Method, Term
from handrail.methods.terms import TERMS
from handrail.training.config import Config

Schema = dict[str, Any]

TYPES = {
    "boolean": "true or false",
    "string": "text",
    "integer": "integer",
    "number": "number",
    "object": "table",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Setting:
    """A setting: a dotted ``key`` (``train.steps``); ``default`` is TOML, ``required``, or ``–`` if none."""

    key: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SettingsTable:
    """The settings of a TOML table; ``title`` is its header, such as ``[train]``."""

    title: str
    about: str
    settings: list[Setting]

    @property
    def name(self) -> str:
        return self.title.strip("[]")


def tables() -> list[SettingsTable]:
    """Return all tables of a configuration; of ``[method]`` only the name, because the rest depends on it."""
    schema = tidy(Config.model_json_schema())
    out = []
    for name, node in schema["properties"].items():
        if name == "method":
            out.append(_method_names(node))
        else:
            out += _tables(f"[{name}]", node["$ref"], schema["$defs"])
    return out


def method_table(cls: type[Method[Any]]) -> SettingsTable:
    """Return the settings of one method, without its name."""
    settings = [
        setting for setting in _settings(tidy(cls.Settings.model_json_schema()), "") if setting.key != "name"
    ]
    return SettingsTable(f'[method] name = "{cls.name}"', first_line(cls), settings)


def term_table(name: str, cls: type[Term]) -> SettingsTable:
    """Return the settings of one term, without its name."""
    settings = [setting for setting in _settings(tidy(cls.model_json_schema()), "") if setting.key != "name"]
    return SettingsTable(f'[[method.terms]] name = "{name}"', first_line(cls), settings)


def find(name: str) -> list[SettingsTable]:
    """Return the tables, or the one setting, called ``name``. Raises UserError if there is none."""
    everything = tables()
    found = [
        replace(table, settings=[setting])
        for table in everything
        for setting in table.settings
        if setting.key == name
    ]
    found += [table for table in everything if table.name == name]
    if found:
        return found
    if name.startswith("method."):
        raise UserError(f"{name}: each method has settings of its own; see handrail methods NAME")
    keys = [setting.key for table in everything for setting in table.settings]
    near = [key for key in keys if key.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(name, [*keys, *(table.name for table in everything)])
    hint = f"did you mean {' or '.join(near)}?" if near else "handrail config lists all"
    raise UserError(f"there is no setting or section {name!r}; {hint}")


def first_line(cls: type) -> str:
    """Return the first line of the docstring of ``cls``."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


# From a schema to words


def tidy(node: Any) -> Any:
    """Remove titles and nulls (TOML has no null) from a schema, and put each description on one line."""
    if isinstance(node, list):
        return [tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: tidy(value) for key, value in node.items() if value is not None}
    if isinstance(out.get("title"), str):
        del out["title"]
    if isinstance(out.get("description"), str):
        out["description"] = " ".join(out["description"].split()).replace("``", "`")
    if "anyOf" in out:
        out["anyOf"] = [option for option in out["anyOf"] if option != {"type": "null"}]
        if len(out["anyOf"]) == 1:
            out |= out.pop("anyOf")[0]
    return out


def values(schema: Schema) -> str:
    """Describe the values of a setting in words: ``integer ≥ 1``."""
    if "anyOf" in schema:
        return " or ".join(map(values, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(json.dumps, schema.get("enum") or [schema["const"]]))
    if "$ref" in schema:
        return "table"
    if schema["type"] == "array":
        return _list(schema)
    inner = schema.get("additionalProperties") or next(
        iter(schema.get("patternProperties", {}).values()), None
    )
    words = "table of " + values(inner) if isinstance(inner, dict) else TYPES[schema["type"]]
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)
    pattern = f"matching {schema['pattern']}" if "pattern" in schema else ""
    return " ".join(filter(None, (words, bounds, pattern)))


def _list(schema: Schema) -> str:
    least, item = schema.get("minItems", 0), values(schema["items"])
    if least and least == schema.get("maxItems"):
        return f"list of {least}: {item}"
    return f"{'non-empty ' * bool(least)}list of {f'({item})' if ' or ' in item else item}"


def _settings(schema: Schema, prefix: str) -> list[Setting]:
    required = schema.get("required", ())
    return [
        Setting(
            prefix + name,
            values(node),
            "required"
            if name in required
            else json.dumps(node["default"], ensure_ascii=False)
            if "default" in node
            else "–",
            node.get("description", ""),
        )
        for name, node in schema["properties"].items()
    ]


def _tables(title: str, reference: str, definitions: Schema) -> Iterator[SettingsTable]:
    """Yield the table of ``reference``, then the tables of the sections inside it."""
    schema = definitions[reference.removeprefix("#/$defs/")]
    name = title.strip("[]")
    yield SettingsTable(title, schema["description"], _settings(schema, f"{name}."))
    for key, node in schema["properties"].items():
        for inner in sorted(set(re.findall(r"#/\$defs/\w+", json.dumps(node)))):
            yield from _tables(f"[[{name}.{key}]]", inner, definitions)


def _method_names(node: Schema) -> SettingsTable:
    names = ", ".join(map(json.dumps, METHODS))
    about = "Each method has settings of its own: `handrail methods NAME`."
    name = Setting("method.name", f"{names} or text", json.dumps(node["default"]["name"]), _name_of_method())
    return SettingsTable("[method]", about, [name])


def _name_of_method() -> str:
    return str(tidy(Method.Settings.model_json_schema())["properties"]["name"]["description"])


# For editors


def editor_schema() -> Schema:
    """Return a JSON schema of a configuration, including the settings of every built-in method."""
    schema: Schema = tidy(Config.model_json_schema())
    schema["properties"]["method"]["anyOf"] = [
        _method_schema(name, cls.Settings) for name, cls in METHODS.items()
    ]
    own = {"name": {"type": "string", "pattern": ":", "description": _name_of_method()}}
    schema["properties"]["method"]["anyOf"].append({"properties": own, "required": ["name"]})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _method_schema(name: str, settings: type[BaseModel]) -> Schema:
    schema: Schema = tidy(settings.model_json_schema())
    described = {"const": name, "description": first_line(METHODS[name])}
    default = name == Config.model_fields["method"].default["name"]
    required = [] if default else ["name"]
    return {**schema, "properties": schema["properties"] | {"name": described}, "required": required}


# For the documentation

PAGE = """# Configuration

A TOML file describes a run; `handrail init MODEL DATA` writes a first one. Only `model.path` and
`data.train` are required. `handrail config` prints the tables below, `handrail config train` one of them,
and `handrail config rollout.max_tokens` one setting. `--set section.key=value` overrides a setting on the
command line.

## Completion in an editor
`handrail config --schema > handrail.schema.json` writes a JSON schema. Editors that use Taplo (such as VS
Code with Even Better TOML) complete and check a configuration with it if the first line of the file names
it:

```toml
#:schema ./handrail.schema.json
```

`handrail train` also checks which settings need each other.

## Settings
A `–` as default means that the setting has no value unless you give one. This page is generated:
`handrail config --markdown > docs/configuration.md`.
"""


def page() -> str:
    """Return the text of docs/configuration.md."""
    everything = [*tables(), *map(method_table, METHODS.values())]
    everything += [term_table(name, cls) for name, cls in TERMS.items()]
    return PAGE + "".join(map(_markdown, everything))


def _markdown(table: SettingsTable) -> str:
    head = f"\n### `{table.title}`\n{table.about}\n\n"
    head += "| setting | values | default | meaning |\n|---|---|---|---|\n"
    return head + "".join(_row(setting, f"{table.name}.") for setting in table.settings)


def _row(setting: Setting, prefix: str) -> str:
    default = setting.default if setting.default in ("required", "–") else f"`{setting.default}`"
    cells = (f"`{setting.key.removeprefix(prefix)}`", f"`{setting.values}`", default, setting.meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
