"""Files that are whole or not there, whatever dies while they are written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from handrail._util.errors import UserError

SUMS = "checksums.json"


def writable(file: Path) -> Path:
    """``file``, with the directory that it is to stand in. Raises UserError if it cannot be written."""
    if file.is_dir():
        raise UserError(f"{file} is a directory; name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(file if file.exists() else file.parent, os.W_OK) else "no permission"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise UserError(f"{file} cannot be written ({reason}); choose another --output")
    return file


def write_whole(file: Path, text: str) -> None:
    """Writes ``file`` aside and renames it, so that it holds the old text or the new one."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(file)
    sync(file.parent)


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """A directory to write into, which takes ``final``'s place when the block is left; not on an error."""
    aside, old = final.with_name(f".{final.name}"), final.with_name(f".{final.name}.old")
    for left_over in (aside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    make(aside)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():  # a rename does not replace a directory that holds something
        final.rename(old)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def make(directory: Path) -> None:
    """Makes ``directory`` and those above it, so that they are still there after a power cut."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync(path.parent)


def sync(path: Path) -> None:
    """Has the kernel put a file's or directory's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sums(directory: Path) -> None:
    """Writes the SHA-256 of every file below ``directory`` beside them, so that ``damage`` can tell."""
    (directory / SUMS).write_text(json.dumps(sums(directory), indent=1) + "\n", encoding="utf-8")


def sums(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("[!.]*") if path.is_file() and path.name != SUMS)
    return {str(file.relative_to(directory)): digest(file) for file in files}


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(directory: Path) -> str:
    """What is wrong with a directory that has checksums; nothing if it is intact. Hidden files do not count."""
    try:
        written = dict(json.loads((directory / SUMS).read_text(encoding="utf-8")))
        there = sums(directory)
    except (OSError, ValueError, TypeError) as error:
        return (
            f"{SUMS} cannot be read ({type(error).__name__})"
            if (directory / SUMS).exists()
            else f"it has no {SUMS}"
        )
    for name in sorted(written.keys() | there.keys()):
        if there.get(name) != written.get(name):
            return f"{name} differs from its checksum" if name in there else f"{name} is missing"
    return "" if written else f"{SUMS} names no file"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """``directory``, made if need be, as this process's own to write. Raises UserError if another process has it."""
    try:
        make(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be made ({error.strerror}); choose another --output") from error
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is writing {directory}; wait for it, or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def no_room(error: BaseException) -> bool:
    """Whether ``error`` says that a disk, or a user's share of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(
        os.strerror(code) in str(error) for code in full
    )  # safetensors and tokenizers raise errors of their own
