"""Digests of the files that a configuration names, to notice contents that changed under the same path."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from handrail._util.errors import UserError
from handrail._util.section import flat
from handrail.data.answers import header
from handrail.data.config import Source
from handrail.experts.config import Role
from handrail.models.builtin import locate
from handrail.training.config import Config, load_config
from handrail.training.trained import model_of, settings_file
from handrail.types.problem import Problem, digest

READ_WHOLE = 64 * 2**20
"""Maximum size in bytes of files that are hashed whole."""
BLOCKS, BLOCK = 256, 2**16
"""Number and size of the blocks that are hashed of a larger file. A sample suffices: training changes all
weights, or all weights of some layers."""
CODE = {"name", *get_args(Role)}
"""Settings of the verifier, of a method and of its terms that may name the user's own code."""
ANSWERS = "cache"
"""Setting of a method or a term that names a file of answers."""
KINDS = {".safetensors", ".json", ".jinja", ".model", ".txt"}
"""Suffixes of the files that make up a model and its tokenizer."""


def contents(
    config: Config, sources: Sequence[Sequence[Problem]], held_out: Mapping[str, Sequence[Problem]]
) -> dict[str, str]:
    """Map each setting with its value, as in ``model.path = "x"``, to the digest of the contents that it
    names.

    Settings that name no local contents are left out.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, (source, problems) in enumerate(zip(config.data.train, sources, strict=True), 1):
        found[f"data.train[{number}].path"] = source.path, digest(problems)
    for name, problems in held_out.items():
        found[f"eval.sets.{name}"] = config.eval.sets[name], digest(problems)
    models = {
        "model.path": config.model.path,
        "experts.prm": config.experts.prm,
        "experts.teacher": config.experts.teacher,
        "experts.critic": config.experts.critic,
    }
    found |= {key: (path, model_digest(path, key)) for key, path in models.items()}
    for key, name in flat({"verifier.name": config.verifier.name, "method": config.method}).items():
        kind = key.rpartition(".")[2]
        if isinstance(name, str) and kind in CODE:
            found[key] = name, code_digest(name)
        if isinstance(name, str) and kind == ANSWERS and Path(name).is_file():
            found[key] = name, file_digest(Path(name))
    return {
        f"{key} = {json.dumps(value, ensure_ascii=False)}": made
        for key, (value, made) in found.items()
        if made
    }


def may_change(key: str) -> bool:
    """True if a resumed run may go on with other contents: held-out sets and the user's own code."""
    setting = key.partition(" = ")[0]
    code = setting.startswith(("verifier.", "method.")) and setting.rpartition(".")[2] in CODE
    return code or setting.startswith("eval.")


def find_changes(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Keys that are in both and whose digests differ."""
    return [key for key, value in now.items() if before.get(key, value) != value]


def model_digest(path: str, field: str = "model.path") -> str:
    """Digest of a model's weights, settings and tokenizer, and of an adapter's base model.

    Empty if ``path`` is not a local directory or file. Raises UserError, naming ``field``, if there is no
    built-in model of that name.
    """
    place = Path(locate(path, field)) if path else Path("/nowhere")
    if place.is_file():
        return file_digest(place)
    if not place.is_dir():
        return ""
    parts = [
        f"{file.name} {file_digest(file)}"
        for file in sorted(place.iterdir())
        if file.suffix in KINDS and file.is_file()
    ]
    adapter = read_object(place / "adapter_config.json")
    base = str(adapter.get("base_model_name_or_path") or "")
    if base:
        parts.append(model_digest(str(place / base)) or model_digest(base))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= READ_WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for place in range(BLOCKS):
            stream.seek(place * (size - BLOCK) // (BLOCKS - 1))
            found.update(stream.read(BLOCK))
    return found.hexdigest()


def code_digest(name: str) -> str:
    """Digest of the user's file in ``file.py:Name`` or ``module:Name``; empty for built-in names."""
    where, colon, _ = name.rpartition(":")
    if not colon:
        return ""
    if not where.endswith(".py"):
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):  # reported when the module is loaded
            spec = None
        where = str(spec.origin) if spec else ""
    return file_digest(Path(where)) if Path(where).is_file() else ""


def probed_with_another_model(source: Source, model: str) -> str:
    """Warning if ``source`` was probed with a model other than ``model``; empty if not, or if unknown."""
    settings = read_object(Path(source.probe).with_name("settings.json")) if source.probe else {}
    try:
        path, before = str(settings["model"]["path"]), settings.get("contents", {}).get("the model")
    except (KeyError, TypeError, AttributeError):  # not the settings of a probe
        return ""
    now = model_digest(model)
    if before == now if before and now else path == model:
        return ""
    another = "which has changed since" if path == model else f"but this run starts from {model}"
    return f"{source.probe} is a probe of {path}, {another}; probe {source.path} with the run's model"


def harvested_from_another_model(cache: str, model: str) -> str:
    """Warning if the answers in ``cache`` are not from a later checkpoint of ``model``; empty if they are, or
    if that is unknown."""
    with Path(cache).open(encoding="utf-8") as stream:
        said = header([stream.readline()]) or {}
    path = said.get("model")
    if not isinstance(path, str):
        return ""
    now = model_digest(path)
    if now and now != said.get("weights"):
        return f"{cache} was harvested from {path}, which has changed since; harvest it again"
    theirs, ours = first_model(path), first_model(model)
    if theirs in (path, ours) or model_digest(theirs) == model_digest(ours) != "":
        return ""
    return (
        f"{cache} was harvested from {path}, which was trained from {theirs}, but this run starts from "
        f"{model}; harvest from a later checkpoint of the run's model"
    )


def trained_from_another_model(trained: str, start: str) -> str:
    """Warning if a run trained the model ``trained`` from another one than ``start``; empty if it did not, or
    if that is unknown."""
    theirs, ours = first_model(trained), first_model(start)
    if theirs in (trained, start, ours) or model_digest(theirs) == model_digest(ours) != "":
        return ""
    return f"{trained} was trained from {theirs}, not from {start}; blend it with that model"


def first_model(path: str) -> str:
    """Return the model from which ``path`` was trained, over any number of runs; ``path`` if no run did."""
    seen: list[str] = []
    with suppress(UserError):
        while path not in seen and (file := settings_file(model_of(path))):
            seen.append(path)
            path = load_config(file).model.path
    return path


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or incomplete because the process died while
    writing."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
