"""A pool of verifier processes: every verdict comes within the deadline, whatever the graded code does."""

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
from typing import Any, Literal, Self

from handrail._util.errors import UserError
from handrail._util.interrupts import results
from handrail.types import Problem
from handrail.verifiers.builtin import BUILTIN
from handrail.verifiers.config import VerifierConfig

START_LIMIT = 60.0
FIRST_CALL_LIMIT = 60.0
"""Seconds for the first call of a user's verifier in a process, which may load a model."""
EXIT_LIMIT = 1.0
MOST_UNVERIFIED = 0.9
"""A verifier that reaches no verdict on a larger share of its latest completions is broken, and a run with it stops."""
FEWEST_PROBLEMS = 8
"""The latest completions are those of at least so many problems: one whose answer nobody can read must not stop a run."""


@dataclass(frozen=True)
class Verdict:
    """``status`` is ok or cut off, or says why the completion is unverified, with the ``detail``: ``reward`` 0, ``correct`` None.

    ``correct`` is True if the score is at least ``verifier.correct_from``. ``answer`` is what the completion answers.
    """

    reward: float
    status: Literal["ok", "cut off", "timeout", "crash", "error"]
    detail: str = ""
    answer: str | None = None
    correct: bool | None = None


CUT_OFF = Verdict(0.0, "cut off", correct=False)
"""On a completion cut off at ``rollout.max_tokens`` if ``rollout.require_end``, without asking the verifier."""


@dataclass(frozen=True)
class _Batch:
    """What came of one call of ``grade``; ``first`` says why its first unverified completion is."""

    problems: int
    completions: int
    unverified: int
    first: str


class VerifierPool:
    """Grades completions in worker processes, for one caller at a time. A context manager.

    Raises UserError at once if the verifier cannot be used.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
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
        """Kills the workers and what they started."""
        for slot in range(len(self._workers)):
            self._discard(slot)

    def grade(self, items: Sequence[tuple[Problem, str]], answers: bool = False) -> list[Verdict]:
        """The verdicts on ``items``, in their order, with what they answer if ``answers``. Raises UserError if a worker cannot start."""
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
            except (
                BaseException
            ):  # Paused and KeyboardInterrupt too: leaving this block waits for the threads
                todo.clear()
                self.close()
                raise
        graded = [verdicts[index] for index in range(len(items))]
        self._remember([problem for problem, _ in items], graded)
        return graded

    @property
    def failing(self) -> str | None:
        """One sentence if the verifier reaches hardly any verdict (MOST_UNVERIFIED), with the first reason; else None."""
        completions, unverified = (
            sum(getattr(batch, name) for batch in self._latest) for name in ("completions", "unverified")
        )
        if (
            sum(batch.problems for batch in self._latest) < FEWEST_PROBLEMS
            or unverified <= MOST_UNVERIFIED * completions
        ):
            return None
        first = next(batch.first for batch in self._latest if batch.first)
        return f"the verifier {self._config.name!r} reached no verdict on {unverified} of {completions} completions, first on {first}"

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
            # vars, not asdict, which would copy the metadata deeply
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
        """FIRST_CALL_LIMIT until a call has run into it; from then on ``verifier.timeout`` and as long as the slowest first call that
        ended has taken, so that a verifier that hangs costs little and one that loads a model still can."""
        return (
            self._config.timeout + self._slowest_first
            if self._first_hung
            else max(self._config.timeout, FIRST_CALL_LIMIT)
        )

    def _worker(self, slot: int) -> _Worker:
        """The worker of ``slot``, started if there is none."""
        worker = self._workers[slot]
        if worker is not None:
            return worker
        # Entered before the handshake, so that close() finds it.
        worker = self._workers[slot] = _Worker()
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


def unreached(problem: Problem, verdict: Verdict) -> str:
    """Why there is no verdict, and for which problem, in one line."""
    return " ".join(f"{problem.where or problem.id} ({verdict.status}): {verdict.detail}".split())


class _Worker:
    """One process of ``handrail.verifiers.worker``, at the other end of a socket (a pipe cannot be given a deadline)."""

    def __init__(self) -> None:
        self.called = False
        self._socket, theirs = socket.socketpair()
        # Our sys.path, so that it imports the same handrail, and of the user's modules what this process would.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "handrail.verifiers.worker"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """Sends ``line`` and returns the answer. Raises TimeoutError, or OSError or ValueError if the process is gone."""
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
        """How a process that no longer answers ended."""
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
