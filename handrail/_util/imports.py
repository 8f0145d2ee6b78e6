"""Import the user's own code that a configuration names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.names import near

_versions: dict[str, tuple[int, int]] = {}
"""The time of change and the size of each file that was imported, by the name of its module."""


def load_attribute(name: str, field: str) -> Any:
    """Import the object called ``package.module:attribute`` or ``path/to/file.py:attribute``.

    Modules in the working directory are found too. Raises UserError, naming ``field``, if the import fails or
    the attribute does not exist.
    """
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise UserError(f"{field}: there is no file {where}{near(Path(where))}")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: {where} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{field}: {where} has no {attribute!r}")
    return getattr(module, attribute)


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that files there do not shadow installed modules
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    """Import a file, or return its module if it was imported before and has not changed since."""
    # The prefix keeps a file such as math.py from shadowing a module, the digest two files of one name.
    name = f"handrail_user_{path.stem}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    version = path.stat().st_mtime_ns, path.stat().st_size
    if _versions.get(name) == version:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pydantic and pickle look up the module of a class there
    _versions.pop(name, None)  # in case the new version fails halfway
    spec.loader.exec_module(module)
    _versions[name] = version
    return module
