"""A slow file system: a directory seen through FUSE, where every operation waits, and bytes take their time.

Needs Linux, root (or ``user_allow_other``), libfuse (``apt install fuse3``) and ``pip install mfusepy``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT = 0.03
"""Seconds for each operation, such as opening a file, asking for its size, or a sync."""
SPEED = 5e6
"""Bytes per second of each read and write."""


def serve(source: str, mountpoint: str) -> None:
    """Show the directory ``source`` at ``mountpoint``, slowly, until it is unmounted."""
    from mfusepy import FUSE, Operations

    def slow(function: Any) -> Any:
        """Take a path within the file system, as FUSE gives it, for the real one."""

        def operation(self: Any, path: str, *arguments: Any) -> Any:
            time.sleep(WAIT)
            return function(source + path, *arguments)

        return operation

    class Slow(Operations):  # type: ignore[misc]
        use_ns = True
        chmod = slow(os.chmod)
        mkdir = slow(os.mkdir)
        open = slow(os.open)
        readlink = slow(os.readlink)
        rmdir = slow(os.rmdir)
        truncate = slow(lambda path, length, handle=None: os.truncate(path, length))
        unlink = slow(os.unlink)
        readdir = slow(lambda path, handle: [".", "..", *os.listdir(path)])
        fsync = slow(lambda path, data_only, handle: os.fsync(handle))
        release = slow(lambda path, handle: os.close(handle))
        create = slow(lambda path, mode: os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode))
        utimens = slow(lambda path, times=None: os.utime(path, ns=times))

        @slow
        def getattr(path: str, handle: Any = None) -> dict[str, Any]:
            found = os.lstat(path)
            times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
            return times | {name: getattr(found, name) for name in names}

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(source)
            return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

        def rename(self, old: str, new: str) -> None:
            time.sleep(WAIT)
            os.rename(source + old, source + new)

        def symlink(self, new: str, target: str) -> None:
            os.symlink(target, source + new)

        def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
            data = os.pread(handle, size, offset)
            time.sleep(WAIT + len(data) / SPEED)
            return data

        def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
            time.sleep(WAIT + len(data) / SPEED)
            return os.pwrite(handle, data, offset)

    FUSE(Slow(), mountpoint, foreground=True, allow_other=True)


@contextmanager
def slow_storage(directory: Path) -> Iterator[Path]:
    """A directory on slow storage, mounted at ``directory/slow``; files lie in ``directory/fast``."""
    fast, slow = directory / "fast", directory / "slow"
    fast.mkdir(parents=True)
    slow.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "tests.reliability.slow_storage", str(fast), str(slow)])
    try:
        while not slow.is_mount():
            assert server.poll() is None, "the slow file system could not be mounted"
            time.sleep(0.05)
        yield slow
    finally:
        subprocess.run(["umount", "--lazy", str(slow)], check=False)
        server.kill()
        server.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
