"""Processes that start at once: forks of one that has already imported torch, transformers and Handrail, with
all that verifiers need.

In everything else, a fork is a process of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "handrail.training.loop", "handrail.methods", "handrail.cli.commands", "handrail.eval.compare",
    "handrail.verifiers.worker", "pytest", "tests.warm",
])  # fmt: skip


class Fork:
    """A process that calls ``function``, used like ``subprocess.Popen``.

    Standard output and standard error go to one file. Without other values in ``environment``, torch uses one
    thread.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        daemon: bool = False,
    ) -> None:
        self.output = tempfile.NamedTemporaryFile(prefix="fork-", mode="r")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        with contextlib.chdir(Path(__file__).parents[1]):  # where the server finds tests.warm
            forkserver.ensure_running()
        self.process = CONTEXT.Process(
            target=in_fork,
            args=(self.output.name, environment, Path.cwd(), function, arguments),
            daemon=daemon,
        )
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid
        while self.poll() is None and os.getsid(self.pid) != self.pid:  # then its session can be killed
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises TimeoutExpired."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return all output, once the process has ended."""
        self.wait(timeout)
        self.output.seek(0)
        return self.output.read(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def in_fork(
    output: str,
    environment: dict[str, str],
    directory: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What a new process does first, in place of the one that starts it."""
    import torch

    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    function(*arguments)


def start(*arguments: object, environment: Mapping[str, str] | None = None) -> Fork:
    """Start ``handrail ARGUMENTS``."""
    return Fork(command, [str(each) for each in arguments], environment=environment)


def command(arguments: list[str]) -> None:
    from handrail.cli import main

    sys.argv = ["handrail", *arguments]
    main()


def verifier(theirs: socket.socket, _: str) -> Fork:
    """Start a worker of a VerifierPool, in place of ``pool._start``."""
    return Fork(grade, theirs, sys.path, daemon=True)


def grade(theirs: socket.socket, path: list[str]) -> None:
    from handrail.verifiers.worker import main

    sys.path[:] = path
    for stream in (0, 1):
        os.dup2(theirs.fileno(), stream)
    theirs.close()
    main()


def launch(
    launcher: str,
    *arguments: object,
    without: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run ``python -m LAUNCHER ARGUMENTS``, whose processes are no forks; return (exit code, all output).

    The launcher sees no variable whose name starts with a word of ``without``.
    """
    fork = Fork(module, launcher, [str(each) for each in arguments], without, environment=environment)
    try:
        return fork.wait(300), fork.communicate()[0]
    finally:
        if fork.poll() is None:
            os.killpg(fork.pid, signal.SIGKILL)


def module(name: str, arguments: list[str], without: tuple[str, ...]) -> None:
    for variable in [variable for variable in os.environ if variable.startswith(without)]:
        del os.environ[variable]
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def together(
    processes: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> None:
    """Call ``function`` in several processes, connected as torchrun connects them, and wait for their end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [
        Fork(function, *arguments, environment={**(rank if processes > 1 else {}), **(environment or {})})
        for rank in ranks
    ]
    deadline = time.monotonic() + seconds
    try:
        while any(each.poll() is None for each in started):
            assert time.monotonic() < deadline, "the processes do not end"
            failed = [each for each in started if each.poll()]
            assert not failed, failed[0].communicate()[0][-3000:]
            time.sleep(0.02)
        failed = [each for each in started if each.poll()]
        assert not failed, failed[0].communicate()[0][-3000:]
    finally:
        for each in started:
            if each.poll() is None:
                each.kill()
