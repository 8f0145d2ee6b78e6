"""Rows as they stand in files, directories and Hugging Face datasets."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

from handrail._util.errors import BadRow, UserError
from handrail._util.hub import look_up
from handrail._util.names import near
from handrail._util.numerals import Written


@dataclass(frozen=True)
class Row:
    place: str
    """For messages: the file or source and the line or row, both counted from 1."""
    id: str
    value: object
    """The row as it was read, or the BadRow that says why it could not be."""


def read(source: str) -> tuple[list[Row], str]:
    """The rows of a source, and a note if a split was chosen for the user. Raises UserError."""
    name, split, path = source, "", Path(source).expanduser()
    if not path.exists():
        name, _, split = source.partition("#")
        path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path, split, source)
    if path.exists():
        if split:
            raise UserError(f"{source}: a single file has no splits; leave out '#{split}'")
        return _file(path, source, path.name), ""
    # An ending of letters is a file's: a mistyped one should not wait for the hub. (1.5 is a version.)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", name) and not path.suffix[1:].isalpha():
        return _hub(name, split, source)
    raise UserError(f"{source}: there is no such file{near(path)}")


# Files


def _file(path: Path, place: str, name: str) -> list[Row]:
    """``place`` stands before the line in messages, ``name`` in ids."""
    if path.suffix not in READERS:
        raise UserError(f"{place}: files ending in '{path.suffix}' are not read; convert it to one of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path, place, name)
    except OSError as error:
        raise UserError(f"{place}: it cannot be read ({brief(error)}); check that it is whole and that you may read it") from error


def _decoded(path: Path, source: str) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: it is not UTF-8; save the file as UTF-8") from error


def _jsonl(path: Path, source: str, name: str) -> list[Row]:
    # Not splitlines(): JSON text may hold U+2028 and its like, which are no line ends to an editor or to a JSON reader.
    lines = enumerate(_decoded(path, source).split("\n"), 1)
    return [Row(f"{source}, line {number}", f"{name}:{number}", _line(line)) for number, line in lines if line.strip()]


def _line(line: str) -> object:
    try:
        return json.loads(line, parse_float=Written)
    except json.JSONDecodeError as error:
        return BadRow(None, "it is not JSON", f"{error.msg} at column {error.colno}: write one JSON object on each line")
    except (ValueError, RecursionError) as error:
        return BadRow(None, "it is JSON that cannot be read", f"{brief(error)}: give a very long number as text")


def _json(path: Path, source: str, name: str) -> list[Row]:
    text = _decoded(path, source)
    if not text.strip():
        return []
    try:
        values = json.loads(text, parse_float=Written)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}, line {error.lineno}, column {error.colno}: it is not JSON ({error.msg}); "
            "correct it, or name the file .jsonl if it holds one object on each line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: it cannot be read ({brief(error)}); give a very long number as text") from error
    if not isinstance(values, list):
        raise UserError(f"{source}: it does not hold a list; put the rows in one, [{{...}}, {{...}}]")
    return _rows(source, name, values)


def _parquet(path: Path, source: str, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table(), which would add columns for directories named key=value.
        return _rows(source, name, _values(pyarrow.parquet.ParquetFile(path).read()))
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: it cannot be read as parquet ({brief(error)}); write it again") from error


READERS: dict[str, Callable[[Path, str, str], list[Row]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _values(table: Any) -> list[dict[str, Any]]:
    """The rows of a pyarrow.Table; of a float32, the double that people write for it: 0.1, not 0.10000000149011612."""
    import pyarrow

    for place, column in enumerate(table.schema):
        if pyarrow.types.is_float32(column.type):
            table = table.set_column(place, column.name, table[place].cast("string").cast("double"))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _rows(place: str, name: str, values: Iterable[object]) -> list[Row]:
    return [Row(f"{place}, row {number}", f"{name}:{number}", value) for number, value in enumerate(values, 1)]


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# Data sets with splits


def _directory(path: Path, split: str, source: str) -> tuple[list[Row], str]:
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return _saved(path, split, source)
    files = _split_files(path, source)
    if not files:
        raise UserError(f"{source}: this directory holds no {', '.join(READERS)} file and no dataset of save_to_disk; name a file in it")
    wanted, note = _chosen(list(files), split, str(path), source)
    places = sorted({str(file.parent) for file in files[wanted]})
    if len(places) > 1:
        raise UserError(f"{source}: its files are in several directories, {' and '.join(places[:2])}; name one of them, or a file")
    return [row for file in files[wanted] for row in _file(file, str(file), str(file.relative_to(path)))], note


def _split_files(path: Path, source: str) -> dict[str, list[Path]]:
    """The data files of a directory by split, told by their names as the Hugging Face hub tells them; ``train`` if no name tells.

    Raises UserError if some names tell a split and others none.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(glob.escape(str(path)))
    except EmptyDatasetError:
        return {}
    found = {str(split): _matching(path, names) for split, names in patterns.items()}
    files = {split: matching for split, matching in found.items() if matching}
    told = {file for matching in files.values() for file in matching}
    kinds = {file.suffix for file in told}
    if rest := [file for file in _matching(path, ["**"]) if file.suffix in kinds and file not in told]:
        raise UserError(
            f"{source}: it has the splits {', '.join(files)}, and {rest[0].name} is in none of them; name a file, or rename that one"
        )
    return files


def _matching(path: Path, patterns: Sequence[str]) -> list[Path]:
    from datasets.data_files import resolve_pattern

    found: set[Path] = set()
    for pattern in patterns:
        with suppress(FileNotFoundError):
            found.update(path / relpath(file, path) for file in resolve_pattern(pattern, glob.escape(str(path))))
    return sorted(file for file in found if file.suffix in READERS)


def _chosen(splits: Sequence[str], split: str, name: str, source: str) -> tuple[str, str]:
    """The split that is asked for, or ``train``, or the only one; and a note if there was a choice. Raises UserError if neither."""
    if split and split not in splits:
        raise UserError(f"{source}: there is no split '{split}'; name one as {name}#SPLIT: {', '.join(splits)}")
    if split or len(splits) == 1:
        return split or splits[0], ""
    if "train" not in splits:
        raise UserError(f"{source}: it has several splits and none is 'train'; name one as {name}#SPLIT: {', '.join(splits)}")
    return "train", f"{source}: the split 'train' is taken, of {', '.join(splits)}; for another write {name}#SPLIT"


def _saved(path: Path, split: str, source: str) -> tuple[list[Row], str]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library makes of a damaged directory
        raise UserError(f"{source}: the saved dataset cannot be read ({brief(error)}); save it again") from error
    note = ""
    if isinstance(data, datasets.DatasetDict):
        wanted, note = _chosen(list(data), split, str(path), source)
        data = data[wanted]
    elif split:
        raise UserError(f"{source}: this dataset has no splits; leave out '#{split}'")
    return _rows(source, Path(source).name, _values(data.with_format("arrow")[:])), note


def _hub(name: str, split: str, source: str) -> tuple[list[Row], str]:
    import datasets

    dataset, _, config = name.partition(":")
    look_up(dataset, "dataset", source)
    try:
        data = datasets.load_dataset(dataset, config or None, split=split or None)
    except Exception as error:  # the library's own, the hub client's and the network's have no common base
        raise UserError(
            f"{source}: there is no such file, and the Hugging Face hub did not give a dataset of that name ({brief(error)})"
            f"{near(Path(dataset))}"
        ) from error
    note = ""
    if isinstance(data, datasets.DatasetDict):
        wanted, note = _chosen(list(data), "", name, source)
        data = data[wanted]
    return _rows(source, source, _values(data.with_format("arrow")[:])), note
