"""Pool of verifier processes: every verdict meets its time limit, even if a verifier hangs or crashes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from handrail._util.errors import UserError
from handrail._util.interrupts import results
from handrail.types.problem import Problem
from handrail.verifiers.builtin import BUILTIN
from handrail.verifiers.config import VerifierConfig

if TYPE_CHECKING:
    from handrail.types.trajectory import Trajectory  # imports torch

START_LIMIT = 60.0
FIRST_CALL_LIMIT = 60.0
"""Seconds for the first call of a user's verifier in a process, because that call may load a model."""
EXIT_LIMIT = 1.0
MOST_UNVERIFIED = 0.9
"""A verifier is broken, and the run stops, if it reaches no verdict on more than this share of the latest
completions."""
FEWEST_PROBLEMS = 8
"""The latest completions are those of at least this many problems, so that a single problem with an
unreadable answer cannot stop a run."""
NEEDED = {
    "PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
}  # fmt: skip
"""Environment variables that the worker of a built-in verifier inherits, besides LC_*, LD_* and PYTHON*."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a completion.

    If the completion is unverified, ``status`` (timeout, crash or error) and ``detail`` say why, ``reward``
    is 0 and ``correct`` is None. Otherwise ``correct`` is True if the score is at least
    ``verifier.correct_from``. ``answer`` is the completion's answer, if it was requested and found.
    """

    reward: float
    status: Literal["ok", "cut off", "timeout", "crash", "error"]
    detail: str = ""
    answer: str | None = None
    correct: bool | None = None


CUT_OFF = Verdict(0.0, "cut off", correct=False)
"""The verdict on a completion that was cut off at ``rollout.max_tokens``, if ``rollout.require_end`` is on;
the verifier does not see it."""


@dataclass(frozen=True)
class _Batch:
    """The counts of one call of ``grade``, and why the ``first`` unverified completion has no verdict."""

    problems: int
    completions: int
    unverified: int
    first: str


class VerifierPool:
    """Context manager that grades completions in worker processes, for one caller at a time.

    Creating it raises UserError if the verifier cannot be used.
    """

    def __init__(self, config: VerifierConfig | str = "math") -> None:
        """``config``: the settings, or the verifier's name alone."""
        self._config = config = VerifierConfig(name=config) if isinstance(config, str) else config
        self._workers: list[_Worker | None] = [None] * config.workers
        self._latest: deque[_Batch] = deque()
        self._first_hung = False
        self._slowest_first = 0.0
        try:
            self._worker(0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and their child processes."""
        for slot in range(len(self._workers)):
            self._discard(slot)

    def grade(self, items: Sequence[tuple[Problem, str]], answers: bool = False) -> list[Verdict]:
        """Return the verdicts on ``items`` in their order, with the completions' answers if ``answers``.

        Raises UserError if a worker cannot start.
        """
        todo = deque(enumerate(items))
        verdicts: dict[int, Verdict] = {}

        def serve(slot: int) -> None:
            with contextlib.suppress(IndexError):  # todo is empty
                while True:
                    index, item = todo.popleft()
                    verdicts[index] = self._grade_one(slot, *item, answers)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            try:
                results([threads.submit(serve, slot) for slot in range(min(len(self._workers), len(items)))])
            except BaseException:  # even Paused and KeyboardInterrupt, because leaving waits for the threads
                todo.clear()
                self.close()
                raise
        graded = [verdicts[index] for index in range(len(items))]
        self._remember([problem for problem, _ in items], graded)
        return graded

    @property
    def failing(self) -> str | None:
        """A sentence with the first reason if the verifier reaches hardly any verdicts, else None."""
        completions, unverified = (
            sum(getattr(batch, name) for batch in self._latest) for name in ("completions", "unverified")
        )
        if (
            sum(batch.problems for batch in self._latest) < FEWEST_PROBLEMS
            or unverified <= MOST_UNVERIFIED * completions
        ):
            return None
        first = next(batch.first for batch in self._latest if batch.first)
        return (
            f"the verifier {self._config.name!r} reached no verdict "
            f"on {unverified} of {completions} completions, first on {first}"
        )

    def _remember(self, problems: Sequence[Problem], verdicts: Sequence[Verdict]) -> None:
        failed = [
            unreached(*pair) for pair in zip(problems, verdicts, strict=True) if pair[1].correct is None
        ]
        if verdicts:
            distinct = len({problem.id for problem in problems})
            self._latest.append(_Batch(distinct, len(verdicts), len(failed), failed[0] if failed else ""))
        while sum(batch.problems for batch in list(self._latest)[1:]) >= FEWEST_PROBLEMS:
            self._latest.popleft()

    def _grade_one(self, slot: int, problem: Problem, completion: str, answer: bool) -> Verdict:
        try:
            # vars(), because asdict() would copy the metadata deeply.
            request = json.dumps(
                {"problem": vars(problem), "completion": completion, "answer": answer}, default=str
            )
        except (TypeError, ValueError, RecursionError) as error:
            return Verdict(0.0, "error", f"problem {problem.id!r} cannot be written as JSON: {error}")
        worker = self._worker(slot)
        first, worker.called = not worker.called and self._config.name not in BUILTIN, True
        limit = self._first_limit if first else self._config.timeout
        started = time.monotonic()
        try:
            said = worker.ask(request, limit)
        except TimeoutError:
            self._discard(slot)
            self._first_hung |= first
            advice = (
                "; let the verifier load what it needs on import, or raise verifier.timeout"
                if first
                else " (verifier.timeout)"
            )
            return Verdict(0.0, "timeout", f"no verdict within {round(limit, 1):g} s{advice}")
        except (OSError, ValueError):
            end = worker.end()
            self._discard(slot)
            return Verdict(0.0, "crash", f"the verifier's process {end}")
        if first:
            self._slowest_first = max(self._slowest_first, time.monotonic() - started)
        if said["spent"]:
            self._discard(slot)
        if "error" in said:
            return Verdict(0.0, "error", said["error"], said.get("answer"))
        return Verdict(
            said["reward"],
            "ok",
            answer=said.get("answer"),
            correct=said["reward"] >= self._config.correct_from,
        )

    @property
    def _first_limit(self) -> float:
        """The time limit of a first call.

        It is FIRST_CALL_LIMIT until a first call exceeds that. From then on it is ``verifier.timeout`` plus
        the time of the slowest first call that ended, so that a verifier that hangs costs little and one that
        loads a model still can.
        """
        if self._first_hung:
            return self._config.timeout + self._slowest_first
        return max(self._config.timeout, FIRST_CALL_LIMIT)

    def _worker(self, slot: int) -> _Worker:
        """Return the worker of ``slot``, starting one if there is none."""
        worker = self._workers[slot]
        if worker is not None:
            return worker
        # Stored before the handshake, so that close() finds it.
        worker = self._workers[slot] = _Worker(self._config.name)
        try:
            answer = worker.ask(self._config.model_dump_json(), START_LIMIT)
        except TimeoutError as error:
            raise UserError(
                f"The verifier {self._config.name!r} did not start within {START_LIMIT:g} s."
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"The verifier {self._config.name!r} did not start: its process {worker.end()}."
            ) from error
        if "fatal" in answer:
            raise UserError(answer["fatal"])
        return worker

    def _discard(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.kill()


def grade_rollouts(
    pool: VerifierPool, pairs: Sequence[tuple[Problem, Trajectory]], require_end: bool, answers: bool = False
) -> list[Verdict]:
    """Return the verdicts on trajectories; ``answers`` as for ``grade``.

    With ``require_end``, one that was cut off is wrong, earns nothing and has no answer, and the verifier
    does not see it.
    """
    complete = [member.finished or not require_end for _, member in pairs]
    asked = [pair for pair, ok in zip(pairs, complete, strict=True) if ok]
    reached = iter(pool.grade([(problem, member.text) for problem, member in asked], answers))
    return [next(reached) if ok else CUT_OFF for ok in complete]


def unreached(problem: Problem, verdict: Verdict) -> str:
    """Say in one line for which problem there is no verdict, and why."""
    return " ".join(f"{problem.where or problem.id} ({verdict.status}): {verdict.detail}".split())


def environment(verifier: str) -> dict[str, str]:
    """Return the environment of a worker; that of a built-in verifier holds none of the user's secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if verifier not in BUILTIN or name in NEEDED or name.startswith(("LC_", "LD_", "PYTHON"))
    }
    # Our sys.path, so that the worker imports the same handrail and the same user modules.
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _start(theirs: socket.socket, verifier: str) -> subprocess.Popen[bytes]:
    """Start a worker that talks over ``theirs``."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "handrail.verifiers.worker"],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        stderr=subprocess.DEVNULL,
        env=environment(verifier),
        start_new_session=True,
    )


class _Worker:
    """A process of ``handrail.verifiers.worker``, connected by a socket, because a pipe has no timeout."""

    def __init__(self, verifier: str) -> None:
        self.called = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _start(theirs, verifier)

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """Send ``line`` and return the reply.

        Raises TimeoutError, and OSError or ValueError if the process is gone.
        """
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            if not (chunk := self._socket.recv(65536)):
                raise ConnectionError
            answer += chunk
        message: dict[str, Any] = json.loads(answer)
        return message

    def end(self) -> str:
        """Say how a process that no longer replies has ended."""
        try:
            code = self._process.wait(EXIT_LIMIT)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
