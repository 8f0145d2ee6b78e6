"""One worker of ``handrail.verifiers.pool``: a process that grades what it is sent.

``python -m handrail.verifiers.worker`` reads JSON lines: first the VerifierConfig, answered ``{"ready": true}`` or
``{"fatal": sentence}``, then ``{"problem": {...}, "completion": "...", "answer": false}``, each answered ``{"reward": 0.5}`` or
``{"error": "ValueError: ..."}``, with the completion's ``answer`` where it was asked for, and ``spent`` where the worker has once been
near its memory ceiling and wants to be replaced. It is a process of its own, talking JSON, so that it can be killed in the middle of C
code, needs nothing of the parent's ``__main__`` and inherits none of its threads. A built-in verifier's may write no file, start no
process and open no connection, should a completion ever make a library run it as code. It is not a sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from handrail._util.errors import UserError
from handrail._util.memory import peak_resident
from handrail.types import Problem
from handrail.verifiers.builtin import BUILTIN, Verifier, reader, resolve, warm_up
from handrail.verifiers.config import VerifierConfig

DETAIL_LIMIT = 500
ORPHAN_GRACE = 60.0


def main() -> None:
    requests, answers = _take_standard_streams()
    config = VerifierConfig.model_validate_json(requests.readline())
    ceiling = _limit_memory(int(config.memory_gib * 2**30))
    try:
        verifier, read = resolve(config), reader(config)
        warm_up(config.name)
    except UserError as error:
        _answer(answers, {"fatal": str(error)})
        return
    except ModuleNotFoundError as error:
        _answer(answers, {"fatal": f"The verifier {config.name!r} lacks a package: {error}."})
        return
    except (MemoryError, ImportError) as error:
        advice = f"if it lacks memory, raise verifier.memory_gib, which is {config.memory_gib:g}"
        _answer(
            answers,
            {
                "fatal": f"The verifier {config.name!r} does not start ({type(error).__name__}: {error}); {advice}."
            },
        )
        return
    if config.name in BUILTIN:
        sys.addaudithook(_refuse)
    enough = (peak_resident() + ceiling) / 2
    own = os.getpid()
    _answer(answers, {"ready": True})
    for line in requests:
        # The parent keeps the deadline. Should it die meanwhile, the kernel's default for SIGALRM ends this process too.
        signal.setitimer(signal.ITIMER_REAL, config.timeout + ORPHAN_GRACE)
        request = json.loads(line)
        answer = _grade(verifier, request) | (
            {"answer": _read(read, request["completion"])} if request["answer"] else {}
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != own:  # a copy that the verifier made of this process: it answers nobody
            break
        _answer(answers, answer | {"spent": peak_resident() > enough})
    os._exit(0)  # threads that a verifier left running must not keep this process


def _grade(verifier: Verifier, request: dict[str, Any]) -> dict[str, Any]:
    fields = request["problem"]
    problem = Problem(**fields | {"references": tuple(fields["references"])})
    try:
        return {"reward": verifier(problem, request["completion"])}
    except BaseException as error:  # sys.exit() in a verifier is one failed verdict, no reason to die
        return {"error": f"{type(error).__name__}: {error}"[:DETAIL_LIMIT]}


def _read(read: Callable[[str], str | None], completion: str) -> str | None:
    try:
        return read(completion)
    except Exception:  # whatever a parser makes of hostile text: it is no answer
        return None


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _take_standard_streams() -> tuple[TextIO, TextIO]:
    """Moves the protocol to descriptors that user code does not know: its input() and print() must not disturb it."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, answers


def _limit_memory(ceiling: int) -> float:
    """Has the kernel refuse more than ``ceiling`` bytes of address space; returns what the limit is now."""
    try:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):  # not every platform grants this limit
        return float("inf")
    return soft


REFUSED = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "signal.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
)
LISTING = ("os.listdir", "os.scandir", "os.walk")  # the import system does


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook. Raises PermissionError for what no built-in verifier does of itself."""
    writing = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writing or (event.startswith(REFUSED) and event not in LISTING):
        raise PermissionError(f"a verifier may not do this: {event}")


if __name__ == "__main__":
    main()
