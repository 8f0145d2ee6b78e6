"""Worker process of ``handrail.verifiers.pool``: grades the completions that it is sent.

``python -m handrail.verifiers.worker`` reads JSON lines. The first is the VerifierConfig; the reply is
``{"ready": true}`` or ``{"fatal": sentence}``. Each following line is a request, ``{"problem": {...},
"completion": "...", "answer": false}``; the reply is ``{"reward": 0.5}`` or ``{"error": "ValueError: ..."}``,
with the completion's ``answer`` if requested. ``spent`` in the reply is true once the worker has come near
its memory limit and should be replaced.

A separate process that speaks JSON can be killed in the middle of C code, does not need the parent's
``__main__``, and inherits none of its threads. The worker of a built-in verifier may not write files, start
processes or open connections, in case a completion makes a library run it as code. This is not a sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO, cast

from handrail._util.errors import UserError
from handrail._util.memory import peak_resident
from handrail.types.problem import Problem
from handrail.verifiers.builtin import BUILTIN, Verifier, reader, resolve, warm_up

if TYPE_CHECKING:
    from handrail.verifiers.config import VerifierConfig

DETAIL_LIMIT = 500
ORPHAN_GRACE = 60.0


def main() -> None:
    requests, answers = _take_standard_streams()
    # The parent has validated it. Importing pydantic would double the time of the start.
    config = cast("VerifierConfig", SimpleNamespace(**json.loads(requests.readline())))
    ceiling = _limit_memory(int(config.memory_gib * 2**30))
    try:
        verifier, read = resolve(config), reader(config)
        warm_up(config.name)
    except UserError as error:
        _answer(answers, {"fatal": str(error)})
        return
    except ModuleNotFoundError as error:
        _answer(answers, {"fatal": f"The verifier {config.name!r} needs a missing package: {error}."})
        return
    except (MemoryError, ImportError) as error:
        reason = f"{type(error).__name__}: {error}"
        advice = f"if it lacks memory, raise verifier.memory_gib, which is {config.memory_gib:g}"
        _answer(answers, {"fatal": f"The verifier {config.name!r} does not start ({reason}); {advice}."})
        return
    if config.name in BUILTIN:
        sys.addaudithook(_refuse)
    enough = (peak_resident() + ceiling) / 2
    own = os.getpid()
    _answer(answers, {"ready": True})
    for line in requests:
        # The parent enforces the time limit. If the parent has died, SIGALRM ends this process by default.
        signal.setitimer(signal.ITIMER_REAL, config.timeout + ORPHAN_GRACE)
        request = json.loads(line)
        answer = _grade(verifier, request) | (
            {"answer": _read(read, request["completion"])} if request["answer"] else {}
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != own:  # this is a fork that the verifier made, and must not reply
            break
        _answer(answers, answer | {"spent": peak_resident() > enough})
    os._exit(0)  # do not wait for threads that a verifier left running


def _grade(verifier: Verifier, request: dict[str, Any]) -> dict[str, Any]:
    fields = request["problem"]
    problem = Problem(**fields | {"references": tuple(fields["references"])})
    try:
        return {"reward": verifier(problem, request["completion"])}
    except BaseException as error:  # even sys.exit() in a verifier costs only this verdict
        return {"error": f"{type(error).__name__}: {error}"[:DETAIL_LIMIT]}


def _read(read: Callable[[str], str | None], completion: str) -> str | None:
    try:
        return read(completion)
    except Exception:  # hostile text may make a parser raise anything; it then has no answer
        return None


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _take_standard_streams() -> tuple[TextIO, TextIO]:
    """Move the protocol to other descriptors, so that a user's input() and print() cannot disturb it."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, answers


def _limit_memory(ceiling: int) -> float:
    """Limit the address space to ``ceiling`` bytes, and return the limit in force."""
    try:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):  # some platforms do not support this limit
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
LISTING = ("os.listdir", "os.scandir", "os.walk")  # needed by the import system


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: raise PermissionError for actions that no built-in verifier needs."""
    writing = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writing or (event.startswith(REFUSED) and event not in LISTING):
        raise PermissionError(f"a verifier may not do this: {event}")


if __name__ == "__main__":
    main()
