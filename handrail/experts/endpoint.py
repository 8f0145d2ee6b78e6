"""Client for the OpenAI chat-completions protocol, with a cache and a budget; a failure costs one answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import openai

from handrail._util.errors import Paused, UserError
from handrail._util.interrupts import in_daemons, results
from handrail.experts.cache import AnswerCache
from handrail.experts.config import EndpointConfig
from handrail.types.problem import Message

ADVICE = {
    401: "set {key} to a valid key",
    403: "use a key that may use this model",
    404: "check endpoint.base_url and endpoint.model",
}
SHORTEST_SECRET = 8
LONGEST_REASON = 200

Failure = Literal["failed", "refused", "empty", "unreadable"]
REMEDIES: dict[Failure, str] = {
    "failed": "the run can be resumed when it answers again",
    "refused": "correct the section [endpoint] (endpoint.model and endpoint.answer_tokens must suit the "
    "server) and resume the run, or raise endpoint.pause_after to do without these answers",
    "empty": "raise endpoint.answer_tokens if the model reasons at length, or choose another endpoint.model, "
    "and resume the run",
    "unreadable": "choose an endpoint.model that follows instructions, and resume the run; answers are kept, "
    "so to ask the same model again also name another endpoint.cache",
}
"""What to do after too many failures in a row, by the last one's kind."""
Found = TypeVar("Found")
log = logging.getLogger("handrail")


@dataclass
class Spent:
    """Used part of an endpoint's budget; ``cost`` is in the currency of the prices."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0


class EmptyAnswer(Exception):
    """A completion without text."""


class Endpoint:
    """Client that asks a chat-completions server many questions concurrently.

    A call is one question with all its retries. ``counts`` are for the step's metrics; ``spent`` is compared
    with the budget. Raises UserError if the configuration or the key cannot work.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.spent = Spent()
        self._name = f"{config.model} at {config.base_url}"
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not re.match(r"https?://[^/]", config.base_url):
            raise UserError(
                f"endpoint.base_url should look like http://localhost:8000/v1, not {config.base_url!r}"
            )
        if not re.fullmatch(r"[!-~]*", self._key):
            raise UserError(f"the environment variable {config.api_key_env} holds characters that no key has")
        try:
            self._client = openai.OpenAI(
                base_url=config.base_url,
                api_key=self._key or "none",
                timeout=config.timeout,
                max_retries=config.retries,
            )
        except Exception as error:  # InvalidURL, from whichever httpx the client uses
            raise UserError(f"endpoint.base_url cannot be used: {error}") from None
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._in_row: Counter[Failure] = Counter()
        self._warned: set[str] = set()
        self._pauses = 0
        self._reason = ""
        self._cache = AnswerCache(Path(config.cache), self._cache_broke)

    def close(self) -> None:
        self._client.close()
        self._cache.close()

    def take_counts(self) -> Counter[str]:
        """Return the counts since the last call."""
        with self._lock:
            taken, self.counts = self.counts, Counter()
        return taken

    def ask_and_read(
        self,
        conversations: Sequence[list[Message]],
        readers: Sequence[Callable[[str], Found | None]],
        max_tokens: int,
        temperature: float = 0.0,
        attempt: int = 0,
    ) -> list[Found | None]:
        """What its reader makes of the answer to each conversation, in order.

        None if there is no answer, because the call failed, the answer was cut off at ``max_tokens`` or the
        budget is spent, or if the reader returns None. Another ``attempt`` at the same question is another
        answer. The same question is asked once, and read by one of its readers.

        The first failure of each kind is logged. Raises Paused after ``pause_after`` failures in a row, and
        UserError if the server refuses the key or the model.
        """
        questions = [
            [{key: _clean(text) for key, text in message.items()} for message in messages]
            for messages in conversations
        ]
        keys = [self._cache_key(messages, max_tokens, temperature, attempt) for messages in questions]
        pauses = self._pauses

        def answer(
            question: tuple[bytes, tuple[list[Message], Callable[[str], Found | None]]],
        ) -> Found | None:
            key, (messages, reader) = question
            text, cached = self._answer(key, messages, max_tokens, temperature, pauses)
            return None if text is None else self._read(text, reader, cached, pauses)

        different = dict(zip(keys, zip(questions, readers, strict=True), strict=True))
        asked = in_daemons(answer, list(different.items()), self.config.concurrency)
        try:
            answers = dict(zip(different, results(asked), strict=True))
        finally:
            for each in asked:
                each.cancel()
        if self._pauses != pauses:
            raise Paused(
                f"the endpoint {self._name} failed {self.config.pause_after} questions in a row, "
                f"the last with: {self._reason}"
            )
        return [answers[key] for key in keys]

    def _cache_key(
        self, messages: list[dict[str, str]], max_tokens: int, temperature: float, attempt: int
    ) -> bytes:
        server = (self.config.base_url.rstrip("/"), self.config.model)
        asked = [*server, max_tokens, float(temperature), attempt, messages]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()

    def _answer(
        self, key: bytes, messages: list[Message], max_tokens: int, temperature: float, pauses: int
    ) -> tuple[str | None, bool]:
        """The text of an answer, if there is one, and True if it was known before."""
        known = self._cache.get(key)
        with self._lock:
            if known:
                self.counts["endpoint/cached"] += 1
                return known[0], True
            if self._pauses != pauses:
                return None, False
            if self._over_budget():
                self.counts["endpoint/over_budget"] += 1
                self._warn_once("over_budget", "has used up its budget, so further questions go unanswered")
                return None, False
            self.counts["endpoint/calls"] += 1
            self.spent.calls += 1
        try:
            completion = self._create(messages, max_tokens, temperature)
            self._spend(completion, messages)
            text = self._text(completion)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            advice = ADVICE[error.status_code].format(
                key=f"the environment variable {self.config.api_key_env}"
            )
            raise UserError(
                f"the endpoint {self._name} refuses to answer ({self._describe(error)}); {advice}"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            # The question is too long, or filtered, or not to be asked so at all.
            self._failed("refused", self._describe(error), pauses)
            return None, False
        except EmptyAnswer:
            self._failed("empty", "the answer is empty", pauses)
            return None, False
        except Exception as error:  # a server can make the client stumble in any way
            self._failed("failed", self._describe(error), pauses)
            return None, False
        self._cache.put(key, text)
        if text is None:
            with self._lock:
                del self._in_row["failed"]  # the server works
                self.counts["endpoint/cut_off"] += 1
                self._warn_once(
                    "cut_off",
                    f"cut an answer off at {max_tokens} tokens, so it counts as none; "
                    "raise endpoint.answer_tokens",
                )
        return text, False

    def _read(
        self, text: str, reader: Callable[[str], Found | None], cached: bool, pauses: int
    ) -> Found | None:
        """What ``reader`` makes of ``text``.

        An answer that can be read ends a row of failures; a cached one does not show that the server works.
        """
        found = reader(text)
        if found is None:
            self._failed(
                "unreadable", f"the answer cannot be read: {self._line(' '.join(text.split()))!r}", pauses
            )
        else:
            with self._lock:
                self._in_row = Counter({"failed": self._in_row["failed"]} if cached else {})
        return found

    def _text(self, completion: Any) -> str | None:
        """The answer, None if it was cut off. Raises EmptyAnswer, or anything else, if there is none."""
        choice = completion.choices[0]
        if choice.finish_reason == "length":
            return None
        text = _clean(choice.message.content or "")
        if not text.strip():
            raise EmptyAnswer
        return self._mask(text) if len(self._key) >= SHORTEST_SECRET else text

    def _create(self, messages: list[Message], max_tokens: int, temperature: float) -> Any:
        """Request one completion.

        Some models accept only the newer name of ``max_tokens``, or only their default temperature; refused
        parameters are remembered and not sent again.
        """
        create: Any = self._client.chat.completions.create
        while True:
            settings = {
                name: n
                for name, n in (("max_tokens", max_tokens), ("temperature", temperature))
                if name not in self._refused
            }
            if "max_tokens" not in settings:
                settings["max_completion_tokens"] = max_tokens
            try:
                return create(model=self.config.model, messages=messages, **settings)
            except openai.BadRequestError as error:
                if (
                    not str(error.code).startswith("unsupported_")
                    or error.param not in {"max_tokens", "temperature"} & settings.keys()
                ):
                    raise
                self._refused = self._refused | {error.param}

    def _over_budget(self) -> bool:
        spent, config = self.spent, self.config
        limits = [
            (spent.calls, config.max_calls),
            (spent.tokens, config.max_tokens),
            (spent.cost, config.max_cost),
        ]
        return any(limit is not None and used >= limit for used, limit in limits)

    def _spend(self, completion: Any, messages: list[Message]) -> None:
        """Add the usage that the server reports to what is spent; without a report, assume one token per
        three bytes."""
        usage = getattr(completion, "usage", None)
        prompt, answer = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        if type(prompt) is not int or type(answer) is not int or min(prompt, answer) < 0:
            prompt, answer = (len(text.encode()) // 3 for text in (str(messages), str(completion)))
        with self._lock:
            self.spent.tokens += prompt + answer
            self.spent.cost += (
                prompt * (self.config.input_price or 0.0) + answer * (self.config.output_price or 0.0)
            ) / 1e6
            self.counts["endpoint/tokens"] += prompt + answer

    def _failed(self, kind: Failure, reason: str, pauses: int) -> None:
        with self._lock:
            self.counts[f"endpoint/{kind}"] += 1
            self._warn_once(
                kind, f"gave no usable answer ({reason}); further ones are only counted, as endpoint/{kind}"
            )
            if self._pauses == pauses:
                self._reason = f"{reason}; {REMEDIES[kind]}"
                self._in_row[kind] += 1
                if self._in_row.total() >= self.config.pause_after:
                    self._pauses += 1
                    self._in_row.clear()

    def _warn_once(self, kind: str, what: str) -> None:
        """Log the first failure of a kind, so that no expert is silent for a whole run."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("the endpoint %s %s", self._name, what)

    def _describe(self, error: Exception) -> str:
        """One line on what went wrong, without the key."""
        if isinstance(error, openai.APIStatusError) and isinstance(error.body, dict):
            message = error.body.get("message")
            if isinstance(message, str):
                return self._line(f"{error.status_code}: {message}")
        line = " ".join(str(part) for part in (error, error.__cause__) if part)
        if not isinstance(error, openai.OpenAIError):
            line = f"no usable answer, {type(error).__name__}: {line}"
        return self._line(line)

    def _line(self, text: str) -> str:
        """A server's text as one line for the user, without the key and not too long."""
        line = "".join(letter if letter.isprintable() else " " for letter in self._mask(text))
        return line[:LONGEST_REASON]

    def _mask(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _cache_broke(self) -> None:
        with self._lock:
            self.counts["endpoint/cache_broken"] += 1
            self._warn_once(
                "cache_broken",
                f"goes on without endpoint.cache {self.config.cache!r}, which is damaged or locked",
            )


def _clean(text: str) -> str:
    """Replace lone surrogates, which neither a request nor the cache can encode."""
    return text.encode("utf-8", "replace").decode()
