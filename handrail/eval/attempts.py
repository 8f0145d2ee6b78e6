"""Sample and grade a model's attempts at problems; each is saved at once, so that none is sampled twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError
from handrail._util.files import write_whole
from handrail._util.memory import enough_memory
from handrail._util.seeds import derive
from handrail.eval.estimators import difficulty, free_energy
from handrail.models.hf import TransformersPolicy
from handrail.training.config import Config
from handrail.training.contents import code_digest, find_changes, model_digest, read_object
from handrail.training.resuming import differences, held_by
from handrail.types.problem import Problem, digest
from handrail.types.trajectory import Trajectory
from handrail.verifiers.pool import Verdict, VerifierPool, grade_rollouts


@dataclass(frozen=True)
class Attempt:
    """One graded completion.

    ``answer`` is the answer that the verifier found in it, for votes. ``status`` is that of its verdict.
    ``correct`` is None if the completion is unverified; ``detail`` then says why. ``energy``: see
    ``free_energy``. ``difficulty``: see there; another estimate in files of earlier versions. Both are None
    if there is no text.
    """

    text: str
    tokens: int
    finished: bool
    reward: float
    correct: bool | None
    answer: str | None
    status: str
    detail: str = ""
    energy: float | None = None
    difficulty: float | None = None


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
        """The number of correct attempts."""
        return sum(attempt.correct is True for attempt in self.attempts)


@dataclass(frozen=True)
class AttemptSampler:
    """A policy that attempts problems and a verifier that grades them.

    The same seed, set and problems give the same attempts, even after an interruption.
    """

    config: Config
    policy: TransformersPolicy
    verifier: VerifierPool
    samples: int
    seed: int

    def sample(
        self, problems: Sequence[Problem], name: str, file: Path, progress: Callable[[float, int], None]
    ) -> list[Attempts]:
        """Return ``samples`` attempts at each problem of the set ``name``.

        ``file`` holds the attempts that exist already; new ones are appended to it. ``progress`` receives the
        number of problems done, with a fraction for the batch that is being sampled, and the number of
        problems. Raises UserError if the verifier fails on nearly all attempts.
        """
        size = max(1, self.config.rollout.batch_size // self.samples)
        done = read_attempts(file)
        done = done[: len(done) if len(done) == len(problems) else len(done) // size * size]
        write_whole(file, "".join(map(line, done)))
        progress(len(done), len(problems))
        with file.open("a", encoding="utf-8") as stream:
            for start in range(len(done), len(problems), size):
                batch = problems[start : start + size]
                with self._report_tokens(len(done), len(batch), len(problems), progress):
                    new = self._sample_and_grade(batch, name, start)
                if failing := self.verifier.failing:
                    _keep_verified(file, done)
                    raise UserError(
                        f"{failing}; fix the verifier: the attempts that it failed on are not kept"
                    )
                stream.writelines(map(line, new))
                stream.flush()
                done += new
                progress(len(done), len(problems))
        return done

    @contextmanager
    def _report_tokens(
        self, done: int, batch: int, n: int, progress: Callable[[float, int], None]
    ) -> Iterator[None]:
        """Report progress at every token sampled in this block, as a small data set is a single batch."""
        before = self.policy.poll
        calls = math.ceil(batch * self.samples / self.policy.generation_batch)
        longest, tokens = calls * self.config.rollout.max_tokens, 0

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

    def _sample_and_grade(self, problems: Sequence[Problem], name: str, start: int) -> list[Attempts]:
        """Return attempts at the problems of the set ``name`` from place ``start`` on."""
        prompts = [
            prompt for problem in problems for prompt in [self.policy.renderer.prompt(problem)] * self.samples
        ]
        seeds = [
            derive("attempts", self.seed, name, start + place, number)
            for place in range(len(problems))
            for number in range(self.samples)
        ]
        with enough_memory("sample"):
            flat = iter(self.policy.generate(prompts, seeds))
        drawn = [[next(flat) for _ in range(self.samples)] for _ in problems]
        pairs = [
            (problem, rollout)
            for problem, rollouts in zip(problems, drawn, strict=True)
            for rollout in rollouts
        ]
        found = iter(grade_rollouts(self.verifier, pairs, self.config.rollout.require_end, answers=True))
        return [
            Attempts(problem.id, [_attempt(rollout, next(found)) for rollout in rollouts])
            for problem, rollouts in zip(problems, drawn, strict=True)
        ]


def _attempt(rollout: Trajectory, verdict: Verdict) -> Attempt:
    logp, characters = rollout.column("sampling_logp").tolist(), len(rollout.text.strip())
    return Attempt(
        rollout.text,
        len(rollout),
        rollout.finished,
        verdict.reward,
        verdict.correct,
        verdict.answer,
        verdict.status,
        verdict.detail,
        free_energy(logp, characters),
        difficulty(logp, characters),
    )


def line(attempts: Attempts) -> str:
    """Return the attempts as a line of JSON."""
    return (
        json.dumps({"id": attempts.id, "attempts": [vars(attempt) for attempt in attempts.attempts]}) + "\n"
    )


def _keep_verified(file: Path, done: Sequence[Attempts]) -> None:
    """Remove from the end of ``file`` the attempts without any verdict.

    A failing verifier graded them before there were enough to recognize that it fails.
    """
    last = max((place for place, each in enumerate(done, 1) if each.verified), default=0)
    write_whole(file, "".join(map(line, done[:last])))


def read_attempts(file: Path) -> list[Attempts]:
    """Read the attempts in ``file``, without a last line that was not finished.

    Raises UserError if a line is damaged.
    """
    if not file.exists():
        return []
    out = []
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(text)
            out.append(Attempts(row["id"], [Attempt(**attempt) for attempt in row["attempts"]]))
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{file}, line {number}: this line is damaged; delete it and all lines below, "
                "and they are sampled again"
            ) from None
    return out


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings that change no attempt.

    Whether ``data.too_long`` leaves out problems is told by their digest.
    """
    out = dict(settings)
    for section, name in (("rollout", "group_size"), ("data", "too_long")):
        out[section] = {key: value for key, value in (out[section] or {}).items() if key != name}
    return out


def claim(
    directory: Path, config: Config, what: dict[str, Any], problems: Mapping[str, Sequence[Problem]]
) -> None:
    """Reserve ``directory`` for one measurement of ``problems``, given by source.

    Raises UserError if it holds another measurement, or if the problems, the model or the verifier have
    changed since.
    """
    settings: dict[str, Any] = {
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
        before = {key: there.get(key) for key in settings}
        if other := differences(_used(before), _used(settings)):
            raise UserError(f"{directory} holds another measurement: {other}; choose another --output")
        if changed_since := find_changes(there.get("contents", {}), made_from):
            raise UserError(
                f"{directory} holds a measurement from before {' and '.join(changed_since)} changed; "
                "choose another --output"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(
            f"{directory} holds {held_by(directory) or 'something else'}; choose another --output"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**settings, "contents": made_from}, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}); choose another --output"
        ) from error
