"""Atomic file writes: after a crash, a file is either complete or unchanged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from filelock import FileLock, Timeout

from handrail._util.errors import UserError

SUMS = "checksums.json"


def writable(file: Path) -> Path:
    """Return ``file`` after creating its directory. Raises UserError if it cannot be written."""
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


def text_of(file: Path, advice: str) -> str:
    """Read a text file. Raises UserError, with the ``advice``, if it is none."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file (UTF-8); {advice}") from None


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` so that ``file`` always holds the old text or the new one."""
    with whole_file(file) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to ``file`` after the block, unless the block raises."""
    aside = file.with_name(f".{file.name}")
    with aside.open("wb") as stream:
        try:
            yield stream
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    sync(aside)
    aside.replace(file)
    sync(file.parent)


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``final`` after the block, unless the block raises."""
    aside, old = final.with_name(f".{final.name}"), final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():  # the process died between the two renames below
        old.rename(final)
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
    if final.exists():  # rename() cannot replace a non-empty directory
        final.rename(old)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Delete a directory; what cannot be deleted yet is hidden, and deleted with the next one.

    On network storage, a file that is still open somewhere stays in its directory until it is closed.
    """
    for left_over in directory.parent.glob(".removed-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    aside = directory.with_name(f".removed-{uuid4().hex}")
    directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def make(directory: Path) -> None:
    """Create ``directory`` and its parents durably: they survive a power cut."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush the content of a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sums(directory: Path) -> None:
    """Write the SHA-256 of every file below ``directory`` into it, for ``damage`` to compare with."""
    (directory / SUMS).write_text(json.dumps(sums(directory), indent=1) + "\n", encoding="utf-8")


def sums(directory: Path) -> dict[str, str]:
    """Map the relative path of every file below ``directory`` to its SHA-256; hidden files are left out."""
    files = sorted(path for path in directory.rglob("[!.]*") if path.is_file() and path.name != SUMS)
    return {str(file.relative_to(directory)): digest(file) for file in files}


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(directory: Path) -> str:
    """Describe the first damage to a directory with checksums; empty if intact. Ignores hidden files."""
    try:
        written = dict(json.loads((directory / SUMS).read_text(encoding="utf-8")))
        found = sums(directory)
    except (OSError, ValueError, TypeError) as error:
        if not (directory / SUMS).exists():
            return f"it has no {SUMS}"
        return f"{SUMS} cannot be read ({type(error).__name__})"
    for name in sorted(written.keys() | found.keys()):
        if found.get(name) != written.get(name):
            return f"{name} differs from its checksum" if name in found else f"{name} is missing"
    return "" if written else f"{SUMS} lists no files"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory``, created if missing, so that no other process writes there.

    Raises UserError if another process holds the lock.
    """
    try:
        make(directory)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be created ({error.strerror}); choose another --output"
        ) from error
    with _held(directory / ".lock", directory):
        yield


@contextlib.contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Hold the lock of ``file``, which is gone afterwards. Raises UserError if another process holds it."""
    path = file.with_name(f".{file.name}.lock")
    with _held(path, file):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path, what: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is writing {what}; wait for it, or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def no_room(error: BaseException) -> bool:
    """True if ``error`` means that the disk is full or the user's quota is used up."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    # safetensors and tokenizers raise their own exception types, which only quote the system's message.
    return any(os.strerror(code) in str(error) for code in full)
