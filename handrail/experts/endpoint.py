"""Client for the OpenAI chat-completions protocol, with a cache and a budget; a failure costs one answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from handrail._util.errors import Paused, UserError
from handrail._util.interrupts import results
from handrail.experts.cache import AnswerCache
from handrail.experts.config import EndpointConfig
from handrail.types.problem import Message

ADVICE = {
    401: "set {key} to a valid key",
    403: "use a key that may use this model",
    404: "check endpoint.base_url and endpoint.model",
}
SHORTEST_SECRET = 8
LONGEST_REASON = 300


@dataclass
class Spent:
    """Used part of an endpoint's budget; ``cost`` is in the currency of the prices."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0


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
        self._cache = AnswerCache(Path(config.cache), self._cache_broke)
        self._refused: set[str] = set()
        self._failed_in_row = self._pauses = 0
        self._reason = ""

    def close(self) -> None:
        self._client.close()
        self._cache.close()

    def take_counts(self) -> Counter[str]:
        """Return the counts since the last call."""
        with self._lock:
            taken, self.counts = self.counts, Counter()
        return taken

    def ask(
        self,
        conversations: Sequence[list[Message]],
        max_tokens: int,
        temperature: float = 0.0,
        attempt: int = 0,
    ) -> list[str | None]:
        """Return the answer to each conversation, in order.

        An answer is None if the call failed, the answer was cut off at ``max_tokens``, or the budget is
        spent. A different ``attempt`` at the same question gives a new answer instead of the cached one.

        Raises Paused after ``pause_after`` consecutive failures, and UserError if the server refuses the key
        or the model.
        """
        settings = (
            self.config.base_url.rstrip("/"),
            self.config.model,
            max_tokens,
            float(temperature),
            attempt,
        )
        questions = [
            [{key: _clean(text) for key, text in message.items()} for message in messages]
            for messages in conversations
        ]
        keys = [
            hashlib.sha256(json.dumps([*settings, messages], sort_keys=True).encode()).digest()
            for messages in questions
        ]
        pauses = self._pauses
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            asked = {
                key: pool.submit(self._answer, key, messages, max_tokens, temperature, pauses)
                for key, messages in dict(zip(keys, questions, strict=True)).items()
            }
            answers = dict(zip(asked, results(list(asked.values())), strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self._pauses != pauses:
            raise Paused(
                f"the endpoint {self._name} failed {self.config.pause_after} questions in a row, "
                f"the last with: {self._reason}; the run can be resumed when it answers again"
            )
        return [answers[key] for key in keys]

    def _answer(
        self, key: bytes, messages: list[Message], max_tokens: int, temperature: float, pauses: int
    ) -> str | None:
        known = self._cache.get(key)
        with self._lock:
            if known:
                self.counts["endpoint/cached"] += 1
                return known[0]
            if self._pauses != pauses:
                return None
            if self._over_budget():
                self.counts["endpoint/over_budget"] += 1
                return None
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
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            # The question is at fault, for instance too long or filtered, so this is not a failure of the
            # server.
            with self._lock:
                self.counts["endpoint/refused"] += 1
            return None
        except Exception as error:  # a faulty server can cause any exception in the client
            self._count_failure(self._describe(error), pauses)
            return None
        self._cache.put(key, text)
        with self._lock:
            self._failed_in_row = 0
            if text is None:
                self.counts["endpoint/cut_off"] += 1
        return text

    def _text(self, completion: Any) -> str | None:
        """Return the answer's text, None if it was cut off.

        Raises an exception of any type if there is no text.
        """
        choice = completion.choices[0]
        if choice.finish_reason == "length":
            return None
        text = _clean(choice.message.content)
        if not text.strip():
            raise ValueError("it is empty")
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

    def _count_failure(self, reason: str, pauses: int) -> None:
        with self._lock:
            self.counts["endpoint/failed"] += 1
            if self._pauses == pauses:
                self._reason = reason
                self._failed_in_row += 1
                if self._failed_in_row >= self.config.pause_after:
                    self._pauses, self._failed_in_row = self._pauses + 1, 0

    def _describe(self, error: Exception) -> str:
        """Describe an error in one line, without the key."""
        line = " ".join(str(part) for part in (error, error.__cause__) if part)
        if not isinstance(error, openai.OpenAIError):
            line = f"no usable answer, {type(error).__name__}: {line}"
        printable = (letter if letter.isprintable() else " " for letter in self._mask(line))
        return "".join(printable)[:LONGEST_REASON]

    def _mask(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _cache_broke(self) -> None:
        with self._lock:
            self.counts["endpoint/cache_broken"] += 1


def _clean(text: str) -> str:
    """Replace lone surrogates, which neither a request nor the cache can encode."""
    return text.encode("utf-8", "replace").decode()
