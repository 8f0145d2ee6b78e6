"""Read rows from files, directories and Hugging Face datasets."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

from handrail._util.errors import BadRow, UserError
from handrail._util.hub import look_up
from handrail._util.names import near
from handrail._util.numerals import TOO_MANY_DIGITS, FloatLiteral


@dataclass(frozen=True)
class Row:
    """A row and its origin."""

    place: str
    """The file or source, and the line or row counted from 1; for messages."""
    id: str
    value: object
    """The row as it was read, or a BadRow if it could not be."""


def read(source: str) -> tuple[list[Row], str]:
    """Return the rows of a source, and a note if a split was chosen for the user. Raises UserError."""
    name, split, path = source, "", Path(source).expanduser()
    if not path.exists():
        name, _, split = source.partition("#")
        path = Path(name).expanduser()
    if not name:  # Path("") is the working directory
        raise UserError(f"the data source {source!r} names nothing; give a file, a directory or a dataset")
    if path.is_dir():
        return _directory(path, split, source)
    if path.exists():
        if split:
            raise UserError(f"{source}: a single file has no splits; leave out '#{split}'")
        return _file(path, source, path.name), ""
    # A suffix of letters means a file: a mistyped file name should not be looked up on the hub. (.5 may be a
    # version.)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", name) and not path.suffix[1:].isalpha():
        return _hub(name, split, source)
    raise UserError(f"{source}: there is no such file{near(path)}")


# Files


def _file(path: Path, place: str, name: str) -> list[Row]:
    """Read a file. ``place`` precedes the line number in messages, ``name`` in ids."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f"{place}: '{path.suffix}' files are not supported; convert it to one of {', '.join(READERS)}"
        )
    try:
        return READERS[suffix](path, place, name)
    except OSError as error:
        raise UserError(
            f"{place}: it cannot be read ({brief(error)}); check that it is complete and that you may read it"
        ) from error


def _decode(path: Path, source: str) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: it is not UTF-8; save the file as UTF-8") from error


def _jsonl(path: Path, source: str, name: str) -> list[Row]:
    # Not splitlines(), which also splits at U+2028 and others, which JSON text may contain.
    text = _decode(path, source)
    if text.lstrip().startswith("[") and _is_list(text):
        raise UserError(f"{source}: it holds one JSON list, not an object on each line; name the file .json")
    lines = enumerate(text.split("\n"), 1)
    return [
        Row(f"{source}, line {number}", f"{name}:{number}", _line(line))
        for number, line in lines
        if line.strip()
    ]


def _line(line: str) -> object:
    try:
        return _parse(line)
    except json.JSONDecodeError as error:
        return BadRow(
            None, "it is not JSON", f"{error.msg} at column {error.colno}: write one JSON object on each line"
        )
    except (ValueError, RecursionError) as error:
        return BadRow(None, *_unreadable(error))


def _json(path: Path, source: str, name: str) -> list[Row]:
    text = _decode(path, source)
    if not text.strip():
        return []
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}, line {error.lineno}, column {error.colno}: it is not JSON ({error.msg}); "
            "correct it, or name the file .jsonl if it holds one object on each line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: {'; '.join(_unreadable(error))}") from error
    if not isinstance(values, list):
        raise UserError(f"{source}: it does not hold a list; put the rows in one, [{{...}}, {{...}}]")
    return _rows(source, name, values)


def _parse(text: str) -> Any:
    """Parse JSON; a BadRow stands for an object in which a key is repeated."""
    return json.loads(text, parse_float=FloatLiteral, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
    """Return the object, or a BadRow if a key is repeated in it or in an object inside."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        return BadRow(None, "a key is repeated in an object", f"leave out one of the keys {twice!r}")
    return _bad_row([*values.values()]) or values


def _bad_row(value: object) -> BadRow | None:
    """Return the first BadRow in a list of lists."""
    if isinstance(value, list):
        return next(filter(None, map(_bad_row, value)), None)
    return value if isinstance(value, BadRow) else None


def _unreadable(error: Exception) -> tuple[str, str]:
    """Say why Python cannot read this JSON, and what to do."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be read", "put fewer brackets inside each other"
    return TOO_MANY_DIGITS, "write the number as text"


def _is_list(text: str) -> bool:
    """True if the whole text is one JSON list of objects."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _parquet(path: Path, source: str, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table(), which adds a column for every parent directory named key=value.
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{source}: it cannot be read as parquet ({brief(error)}); write it again") from error
    return _rows(source, name, _values(table, source))


def _csv(path: Path, source: str, name: str) -> list[Row]:
    """Read cells as text; an empty one counts as missing, and so does a column without a name."""
    csv.field_size_limit(sys.maxsize)  # a worked solution may be longer than the default
    reader = csv.reader(io.StringIO(_decode(path, source), newline=""), strict=True)
    header: list[str] = []
    rows: list[Row] = []
    start = 1
    try:
        header = next(filter(None, reader), [])
        start = reader.line_num + 1
        for cells in reader:
            if cells:  # not an empty line
                rows.append(Row(f"{source}, line {start}", f"{name}:{start}", _cells(header, cells)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{source}, line {start}: it is not CSV ({error}); correct its quotation marks"
        ) from error
    if twice := [column for column in dict.fromkeys(header) if column and header.count(column) > 1]:
        raise UserError(f"{source}: two columns are called '{twice[0]}'; rename or leave out one of them")
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise UserError(f"{source}: its header is the one column {header[0]!r}; separate cells with commas")
    return rows


def _cells(header: list[str], cells: list[str]) -> dict[str, str] | BadRow:
    if len(cells) != len(header):
        advice = "put a cell with a comma or a line break in double quotes"
        return BadRow(None, f"its number of cells is {len(cells)} and the header's {len(header)}", advice)
    return {column: cell for column, cell in zip(header, cells, strict=True) if column and cell}


READERS: dict[str, Callable[[Path, str, str], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _values(table: Any, source: str) -> list[dict[str, Any]]:
    """Return the rows of a pyarrow.Table. Raises UserError if two columns have the same name.

    A float32 becomes the double of its shortest decimal: 0.1, not 0.10000000149011612. A BadRow stands for a
    value that Python cannot hold, such as a date after the year 9999; it matters only if the column is used.
    """
    import pyarrow

    names = table.column_names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{source}: two columns are called '{twice[0]}'; rename or leave out one of them")
    for place, column in enumerate(table.schema):
        if pyarrow.types.is_float32(column.type):
            table = table.set_column(place, column.name, table[place].cast("string").cast("double"))
    columns = [_column(name, table[name]) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _column(name: str, column: Any) -> list[Any]:
    """Return the values of a pyarrow.ChunkedArray."""
    import pyarrow

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (OverflowError, ValueError, pyarrow.ArrowException) as error:
            advice = f"correct it, or leave the row out ({brief(error)})"
            return BadRow(None, f"the value of its column '{name}' cannot be read", advice)

    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError, pyarrow.ArrowException):
        return list(map(value, column))


def _rows(place: str, name: str, values: Iterable[object]) -> list[Row]:
    return [
        Row(f"{place}, row {number}", f"{name}:{number}", value) for number, value in enumerate(values, 1)
    ]


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# Data sets with splits


def _directory(path: Path, split: str, source: str) -> tuple[list[Row], str]:
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return _read_saved(path, split, source)
    files = _split_files(path, source)
    if not files:
        raise UserError(
            f"{source}: this directory holds no {', '.join(READERS)} file and no dataset of save_to_disk; "
            "name a file in it"
        )
    wanted, note = _choose_split(list(files), split, str(path), source)
    places = sorted({str(file.parent) for file in files[wanted]})
    if len(places) > 1:
        raise UserError(
            f"{source}: its files are in several directories, {' and '.join(places[:2])}; "
            "name one of them, or a file"
        )
    return [
        row for file in files[wanted] for row in _file(file, str(file), str(file.relative_to(path)))
    ], note


def _split_files(path: Path, source: str) -> dict[str, list[Path]]:
    """Group the data files of a directory by split, following the Hugging Face hub's rules for file names.

    If no name tells a split, all files are ``train``. Raises UserError if only some names tell one.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(glob.escape(str(path)))
    except EmptyDatasetError:
        return {}
    found = {str(split): _matching_files(path, names) for split, names in patterns.items()}
    files = {split: matching for split, matching in found.items() if matching}
    told = {file for matching in files.values() for file in matching}
    kinds = {file.suffix.lower() for file in told}
    others = [file for file in _matching_files(path, ["**"]) if file not in told]
    if rest := [file for file in others if file.suffix.lower() in kinds]:
        splits = ", ".join(f"{matching[0].name} for the split {split}" for split, matching in files.items())
        raise UserError(
            f"{source}: by their names, handrail takes {splits}, and {rest[0].name} for none; "
            "name a single file, or rename one"
        )
    return files


def _matching_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    from datasets.data_files import resolve_pattern

    found: set[Path] = set()
    for pattern in patterns:
        with suppress(FileNotFoundError):
            found.update(
                path / relpath(file, path) for file in resolve_pattern(pattern, glob.escape(str(path)))
            )
    return sorted(file for file in found if file.suffix.lower() in READERS)


def _choose_split(splits: Sequence[str], split: str, name: str, source: str) -> tuple[str, str]:
    """Return the requested split, else the only one, else ``train`` with a note for the user.

    Raises UserError if the requested split does not exist, or if none is requested and none is ``train``.
    """
    if split and split not in splits:
        raise UserError(
            f"{source}: there is no split '{split}'; name one as {name}#SPLIT: {', '.join(splits)}"
        )
    if split or len(splits) == 1:
        return split or splits[0], ""
    if "train" not in splits:
        raise UserError(
            f"{source}: it has several splits, none of them 'train'; "
            f"name one as {name}#SPLIT: {', '.join(splits)}"
        )
    note = f"{source}: using the split 'train', of {', '.join(splits)}; for another write {name}#SPLIT"
    return "train", note


def _read_saved(path: Path, split: str, source: str) -> tuple[list[Row], str]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged directory may raise any exception in the library
        raise UserError(
            f"{source}: the saved dataset cannot be read ({brief(error)}); save it again"
        ) from error
    note = ""
    if isinstance(data, datasets.DatasetDict):
        wanted, note = _choose_split(list(data), split, str(path), source)
        data = data[wanted]
    elif split:
        raise UserError(f"{source}: this dataset has no splits; leave out '#{split}'")
    return _rows(source, Path(source).name, _values(data.with_format("arrow")[:], source)), note


def _hub(name: str, split: str, source: str) -> tuple[list[Row], str]:
    import datasets

    dataset, _, config = name.partition(":")
    look_up(dataset, "dataset", source)
    try:
        data = datasets.load_dataset(dataset, config or None, split=split or None)
    except Exception as error:  # the exceptions of datasets, the hub client and the network share no base
        raise UserError(
            f"{source}: there is no such file, and the Hugging Face hub did not provide a dataset "
            f"of that name ({brief(error)}){near(Path(dataset))}"
        ) from error
    note = ""
    if isinstance(data, datasets.DatasetDict):
        wanted, note = _choose_split(list(data), "", name, source)
        data = data[wanted]
    return _rows(source, source, _values(data.with_format("arrow")[:], source)), note
