"""Graded attempts of a model at problems, written as they come, so that nothing is sampled twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from handrail._util.errors import UserError
from handrail._util.files import write_whole
from handrail._util.memory import enough_memory
from handrail._util.seeds import derive
from handrail.models.hf import TransformersPolicy
from handrail.training.config import Config
from handrail.training.contents import changed, code_digest, model_digest, read_object
from handrail.training.resuming import differences, held_by
from handrail.types import Problem, Trajectory, digest
from handrail.verifiers.pool import CUT_OFF, Verdict, VerifierPool


@dataclass(frozen=True)
class Attempt:
    """One completion; ``answer`` is what the verifier read in it, for votes, and ``status`` its verdict's or ``cut off``.

    ``correct`` is None if it is unverified; ``detail`` then says why.
    """

    text: str
    tokens: int
    finished: bool
    reward: float
    correct: bool | None
    answer: str | None
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Attempts:
    """A model's attempts at one problem."""

    id: str
    attempts: list[Attempt]

    @property
    def rewards(self) -> list[float]:
        return [attempt.reward for attempt in self.attempts]

    @property
    def verified(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.correct is not None]

    @property
    def correct(self) -> list[bool | None]:
        return [attempt.correct for attempt in self.attempts]

    @property
    def right(self) -> int:
        return sum(attempt.correct is True for attempt in self.attempts)


@dataclass(frozen=True)
class Attempting:
    """Who attempts and who grades. The same seed, set and problems give the same attempts, whatever was interrupted."""

    config: Config
    policy: TransformersPolicy
    verifier: VerifierPool
    samples: int
    seed: int

    def at(self, problems: Sequence[Problem], name: str, file: Path, progress: Callable[[float, int], None]) -> list[Attempts]:
        """``samples`` attempts at each problem of the set ``name``; ``file`` holds those there are already, and gets the others.

        ``progress`` is told the problems done, with a fraction for a batch that is being sampled, and the number of problems.
        Raises UserError for a verifier that only fails.
        """
        size = max(1, self.config.rollout.batch_size // self.samples)
        done = written(file)
        done = done[: len(done) if len(done) == len(problems) else len(done) // size * size]
        write_whole(file, "".join(map(line, done)))
        progress(len(done), len(problems))
        with file.open("a", encoding="utf-8") as stream:
            for start in range(len(done), len(problems), size):
                set_seed(derive("attempts", self.seed, name, start) % 2**32)
                batch = problems[start : start + size]
                with self._watched(len(done), len(batch), len(problems), progress):
                    new = self._graded(batch)
                if failing := self.verifier.failing:
                    _keep_verified(file, done)
                    raise UserError(f"{failing}; mend the verifier, for what it graded last is not kept")
                stream.writelines(map(line, new))
                stream.flush()
                done += new
                progress(len(done), len(problems))
        return done

    @contextmanager
    def _watched(self, done: int, batch: int, n: int, progress: Callable[[float, int], None]) -> Iterator[None]:
        """Report progress at every token that is sampled in this block: small data are a single batch."""
        before, longest = self.policy.poll, self.config.rollout.max_tokens
        tokens = 0

        def poll() -> None:
            nonlocal tokens
            before()
            progress(done + batch * min(tokens / longest, 0.99), n)
            tokens += 1

        self.policy.poll = poll
        try:
            yield
        finally:
            self.policy.poll = before

    def _graded(self, problems: Sequence[Problem]) -> list[Attempts]:
        with enough_memory("sample"):
            drawn = self.policy.sample([self.policy.encode_prompt(problem) for problem in problems], self.samples)
        items = [(problem, rollout.text) for problem, rollouts in zip(problems, drawn, strict=True) for rollout in rollouts]
        verdicts = iter(self.verifier.grade(items, answers=True))
        out = []
        for problem, rollouts in zip(problems, drawn, strict=True):
            attempts = []
            for rollout in rollouts:
                attempts.append(self._attempt(rollout, next(verdicts)))
            out.append(Attempts(problem.id, attempts))
        return out

    def _attempt(self, rollout: Trajectory, verdict: Verdict) -> Attempt:
        if not rollout.finished and self.config.rollout.require_end:
            verdict = CUT_OFF
        return Attempt(
            rollout.text, len(rollout), rollout.finished, verdict.reward, verdict.correct, verdict.answer, verdict.status, verdict.detail
        )


def line(attempts: Attempts) -> str:
    return json.dumps({"id": attempts.id, "attempts": [vars(attempt) for attempt in attempts.attempts]}) + "\n"


def _keep_verified(file: Path, done: Sequence[Attempts]) -> None:
    """Takes from the end of ``file`` the attempts that a failing verifier graded before there were enough to call it failing."""
    last = max((place for place, each in enumerate(done, 1) if each.verified), default=0)
    write_whole(file, "".join(map(line, done[:last])))


def written(file: Path) -> list[Attempts]:
    """The attempts in ``file``; a line that was being written when the process died is none. Raises UserError for a damaged one."""
    if not file.exists():
        return []
    out = []
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(text)
            out.append(Attempts(row["id"], [Attempt(**attempt) for attempt in row["attempts"]]))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}, line {number}: it is damaged; delete it and all below it, which are then sampled again") from None
    return out


def claim(directory: Path, config: Config, what: dict[str, Any], problems: Mapping[str, Sequence[Problem]]) -> None:
    """Makes ``directory`` that of one measurement of ``problems``, by source.

    Raises UserError if it holds another one, or the problems, the model or the verifier have changed since.
    """
    settings = {
        **what,
        "model": config.model.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json", exclude={"train"}),
        "rollout": config.rollout.model_dump(mode="json"),
        "verifier": config.verifier.model_dump(mode="json", exclude={"timeout", "memory_gib", "workers"}),
    }
    parts = {"the model": model_digest(config.model.path), "the verifier": code_digest(config.verifier.name)}
    made_from = parts | {f"the problems of {source}": digest(each) for source, each in problems.items()}
    file = directory / "settings.json"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --output")
    if file.exists():
        there = read_object(file)
        if other := differences({key: there.get(key) for key in settings}, settings):
            raise UserError(f"{directory} holds another measurement: {other}; choose another --output")
        if changed_since := changed(there.get("contents", {}), made_from):
            raise UserError(f"{directory} holds a measurement before {' and '.join(changed_since)} changed; choose another --output")
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} holds {held_by(directory) or 'something else'}; choose another --output")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**settings, "contents": made_from}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another --output") from error
