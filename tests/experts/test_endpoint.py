"""The endpoint against a real server on loopback: order, faults, retries, budget, cache, pauses, and that the
key stays secret."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handrail._util.errors import Paused, UserError
from handrail.experts import cache
from handrail.experts.config import EndpointConfig
from handrail.experts.endpoint import Endpoint
from tests.openai_server import (
    BROKEN,
    CUT,
    EMPTY,
    MALFORMED,
    NULL,
    RATE_LIMITED,
    SLOW,
    Messages,
    OpenAiServer,
    Reply,
    completion,
    failure,
)

KEY = "sk-secret'\\0123456789"


def echo(messages: Messages) -> str:
    return f"re: {messages[-1]['content']}"


def question(text: object) -> Messages:
    return [{"role": "user", "content": str(text)}]


def ask(
    endpoint: Endpoint, questions: list[Messages], max_tokens: int = 7, **settings: Any
) -> list[str | None]:
    """The answers as they are."""
    return endpoint.ask_and_read(questions, [str] * len(questions), max_tokens, **settings)


Make = Callable[..., Endpoint]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make endpoints that share a cache."""
    monkeypatch.setenv("TEST_KEY", KEY)
    made: list[Endpoint] = []

    def endpoint(server: OpenAiServer | str, **settings: Any) -> Endpoint:
        url = server if isinstance(server, str) else server.url
        defaults: dict[str, Any] = {"api_key_env": "TEST_KEY", "cache": str(tmp_path / "cache.sqlite")}
        made.append(Endpoint(EndpointConfig(base_url=url, model="judge", **(defaults | settings))))
        return made[-1]

    yield endpoint
    for each in made:
        each.close()


def test_answers_keep_the_order_of_questions_and_concurrency_is_bounded(make: Make) -> None:
    def late(messages: Messages) -> str:
        time.sleep(0.02 + 0.02 * (int(messages[-1]["content"]) % 3))
        return echo(messages)

    with OpenAiServer(late) as server:
        endpoint = make(server, concurrency=4)
        assert ask(endpoint, [question(n) for n in range(20)]) == [f"re: {n}" for n in range(20)]
        assert server.most_at_once == 4
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        assert (
            server.requests[0].body.items() >= {"model": "judge", "max_tokens": 7, "temperature": 0.0}.items()
        )
        assert endpoint.take_counts() == {"endpoint/calls": 20, "endpoint/tokens": 300}
        assert endpoint.take_counts() == {}
        assert ask(endpoint, []) == []


@pytest.mark.parametrize("fault", [RATE_LIMITED, BROKEN, failure(408), failure(409), failure(503), CUT, SLOW])
def test_a_temporary_fault_is_retried(make: Make, fault: Reply) -> None:
    with OpenAiServer(echo, [fault]) as server:
        endpoint = make(server, timeout=0.7)
        assert ask(endpoint, [question("a")]) == ["re: a"]
        assert len(server.requests) == 2
        assert endpoint.take_counts()["endpoint/calls"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        MALFORMED,
        EMPTY,
        NULL,
        Reply(body=completion("")),
        Reply(body=completion("", choices=None)),
        Reply(body=completion("", choices=[{"message": {"content": [1]}}])),
        Reply(body="[]"),
        Reply(body="null"),
        Reply(body="<html>", headers={"Content-Type": "text/html"}),
        Reply(body="[" * 50_000),
        Reply(302, headers={"Location": "nowhere:"}),
    ],
)
def test_a_permanent_fault_costs_only_that_answer(make: Make, fault: Reply) -> None:
    with OpenAiServer(echo, [fault]) as server:
        endpoint = make(server, concurrency=1, retries=0)
        assert ask(endpoint, [question("a"), question("b")]) == [None, "re: b"]
        counts = endpoint.take_counts()
        assert (counts["endpoint/calls"], counts["endpoint/failed"] + counts["endpoint/empty"]) == (2, 1)
        assert ask(endpoint, [question("a")]) == ["re: a"]


@pytest.mark.parametrize("fault", [failure(400), failure(422), Reply(body=completion(""))])
def test_single_refused_or_unanswered_questions_do_not_stop_the_run(make: Make, fault: Reply) -> None:
    with OpenAiServer(
        lambda messages: fault if "long" in messages[-1]["content"] else echo(messages)
    ) as server:
        endpoint = make(server, concurrency=1, retries=0, pause_after=2)
        texts = ["a", "long 1", "b", "long 2", "c", "long 3", "d"]
        expected = [None if "long" in text else f"re: {text}" for text in texts]
        assert ask(endpoint, [question(text) for text in texts]) == expected
        again = make(server, concurrency=1, retries=0, pause_after=2)  # the good answers come from the cache
        assert ask(again, [question(text) for text in texts]) == expected
        counts = again.take_counts()
        assert (
            counts["endpoint/cached"],
            counts["endpoint/refused"] + counts["endpoint/empty"],
            counts["endpoint/failed"],
        ) == (4, 3, 0)


@pytest.mark.parametrize(
    ("reply", "kind", "said", "advice"),
    [
        (
            failure(400, f"The context is 512 tokens, {KEY}"),
            "refused",
            "400: The context is 512 tokens, ***",
            "endpoint.answer_tokens",
        ),
        (
            failure(500, "out of\nmemory " + 999 * "x"),
            "failed",
            "500: out of memory xxx",
            "when it answers again",
        ),
        (Reply(body=completion("")), "empty", "the answer is empty", "endpoint.answer_tokens"),
        (NULL, "empty", "the answer is empty", "endpoint.answer_tokens"),
        (
            Reply(body=completion("banana\n" + 999 * "y")),
            "unreadable",
            "cannot be read: 'banana yyy",
            "endpoint.model",
        ),
    ],
)
def test_an_expert_without_any_usable_answer_is_named_and_stops_the_run(
    make: Make, caplog: pytest.LogCaptureFixture, reply: Reply, kind: str, said: str, advice: str
) -> None:
    with OpenAiServer(lambda messages: reply) as server:
        endpoint = make(server, retries=0, pause_after=5)
        for text in "abcd":
            assert endpoint.ask_and_read([question(text)], [lambda answer: None], 7) == [None]
        assert endpoint.take_counts()[f"endpoint/{kind}"] == 4
        (record,) = caplog.records
        assert (
            (record.name, record.levelname) == ("handrail", "WARNING")
            and said in record.getMessage()
            and server.url in caplog.text
        )
        with pytest.raises(Paused, match=advice) as caught:
            endpoint.ask_and_read([question("e")], [lambda answer: None], 7)
        assert said in str(caught.value) and "resume" in str(caught.value)
        for text in (record.getMessage(), str(caught.value)):
            assert (
                "0123456789" not in text
                and "\n" not in text
                and len(text) < 600
                and (200 * "x") not in text
                and (200 * "y") not in text
            )


def test_readable_answers_reset_the_count_of_failures_in_a_row(make: Make) -> None:
    def read(answer: str) -> str | None:
        return answer if "good" in answer else None

    texts = ["bad 1", "good 1", "bad 2", "good 2", "bad 3"]
    with OpenAiServer(echo) as server:
        for _ in range(2):  # the second time, from the cache
            endpoint = make(server, concurrency=1, pause_after=2)
            found = endpoint.ask_and_read([question(text) for text in texts], [read] * 5, 7)
            assert found == [None, "re: good 1", None, "re: good 2", None]
            assert endpoint.take_counts()["endpoint/unreadable"] == 3


def test_a_spent_budget_and_a_cut_off_answer_are_reported_once(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with OpenAiServer(lambda messages: Reply(body=completion("half an", "length"))) as server:
        ask(make(server, max_calls=2), [question(n) for n in range(9)])
    assert sorted("answer_tokens" in text for text in caplog.messages) == [False, True]
    assert sum("budget" in text for text in caplog.messages) == 1


def test_the_number_of_retries_is_limited(make: Make) -> None:
    with OpenAiServer(lambda messages: BROKEN) as server:
        endpoint = make(server, retries=2)
        assert ask(endpoint, [question("a")]) == [None]
        assert len(server.requests) == 3


def test_a_cut_off_answer_counts_as_no_answer_but_not_as_a_failure(make: Make) -> None:
    with OpenAiServer(lambda messages: Reply(body=completion("half an", "length"))) as server:
        endpoint = make(server, pause_after=1)
        assert ask(endpoint, [question("a")]) == [None]
        assert endpoint.take_counts() == {"endpoint/calls": 1, "endpoint/tokens": 15, "endpoint/cut_off": 1}
        assert ask(endpoint, [question("a")]) == [None]
        assert endpoint.take_counts() == {"endpoint/cached": 1}


def test_parameters_that_a_model_refuses_are_omitted(make: Make) -> None:
    def picky(messages: Messages) -> str | Reply:
        body = server.requests[-1].body
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in body:
                return failure(400, f"Unsupported: {name}", param=name, code=code)
        assert body["max_completion_tokens"] == 7
        return echo(messages)

    with OpenAiServer(picky) as server:
        endpoint = make(server, concurrency=1)
        assert ask(endpoint, [question("a"), question("b")]) == ["re: a", "re: b"]
        assert len(server.requests) == 4


def test_a_model_that_refuses_everything_is_not_asked_forever(make: Make) -> None:
    def picky(messages: Messages) -> Reply:
        body = server.requests[-1].body
        name = next(name for name in ("temperature", "max_tokens", "max_completion_tokens") if name in body)
        return failure(400, param=name, code="unsupported_parameter")

    with OpenAiServer(picky) as server:
        assert ask(make(server), [question("a")]) == [None]
        assert len(server.requests) == 3


def test_a_refused_value_is_not_mistaken_for_an_unknown_parameter(make: Make) -> None:
    with OpenAiServer(lambda messages: failure(400, param="max_tokens", code="invalid_value")) as server:
        assert ask(make(server), [question("a")]) == [None]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "set the environment variable TEST_KEY"),
        (403, "a key that may use this model"),
        (404, "check endpoint.base_url and"),
    ],
)
def test_a_refused_key_or_model_is_a_user_error(make: Make, status: int, advice: str) -> None:
    with OpenAiServer(lambda messages: failure(status, f"Bad \x1b[31mkey {KEY}!")) as server:
        with pytest.raises(UserError, match=advice) as caught:
            ask(make(server, concurrency=2), [question(n) for n in range(50)])
        assert server.url in str(caught.value) and "judge" in str(caught.value) and "Bad" in str(caught.value)
        assert "0123456789" not in str(caught.value) and "\x1b" not in str(caught.value)
        assert len(server.requests) < 50


def test_no_further_question_is_asked_after_the_key_is_refused(make: Make) -> None:
    with OpenAiServer(lambda messages: replace(failure(401), delay=0.05)) as server:
        with pytest.raises(UserError):
            ask(make(server, concurrency=1), [question(n) for n in range(50)])
        time.sleep(0.5)
        assert len(server.requests) < 5


def test_a_key_is_optional(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAiServer(echo) as server:
        assert ask(make(server), [question("a")]) == ["re: a"]
        assert KEY not in str(server.requests[0].headers)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "http://", "http://host:port"])
def test_an_invalid_address_is_refused_at_once(make: Make, url: str) -> None:
    with pytest.raises(UserError, match="endpoint.base_url"):
        make(url)


def test_an_invalid_key_is_refused_without_being_shown(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(UserError, match="TEST_KEY") as caught:
        make("http://localhost/v1")
    assert "lines" not in str(caught.value)


def test_the_key_is_never_written(
    make: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    faults = [
        Reply(body=completion(f"your key is {KEY}")),
        Reply(500, f"not you, {KEY}"),
        failure(400, KEY),
        MALFORMED,
    ]
    with OpenAiServer(lambda messages: failure(429, KEY), faults) as server:
        endpoint = make(server, concurrency=1, retries=1, pause_after=4)
        assert ask(endpoint, [question("a")]) == ["your key is ***"]
        with pytest.raises(Paused) as caught:
            ask(endpoint, [question(n) for n in range(9)])
    texts = [
        repr(caught.value),
        repr(caught.value.__cause__),
        repr(caught.value.__context__),
        repr(endpoint),
        repr(endpoint.config),
    ]
    texts += [caplog.text, *capfd.readouterr(), json.dumps(endpoint.counts)]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert "your key is" in texts[-1]
    assert not any("0123456789" in text for text in texts)


def test_nothing_is_printed(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with OpenAiServer(echo, [BROKEN, MALFORMED]) as server:
        ask(make(server), [question(n) for n in range(3)])
    assert capfd.readouterr() == ("", "")


def test_a_question_is_asked_only_once(make: Make) -> None:
    with OpenAiServer(echo) as server:
        endpoint = make(server)
        assert ask(endpoint, [question("a"), question("b"), question("a")]) == ["re: a", "re: b", "re: a"]
        assert len(server.requests) == 2
        again = make(server, max_calls=1)
        assert ask(again, [question("a"), question("b")]) == ["re: a", "re: b"]
        assert again.take_counts() == {"endpoint/cached": 2}
        for other in ({"attempt": 1}, {"temperature": 0.5}, {"max_tokens": 8}):
            ask(make(server), [question("a")], **other)
        assert len(server.requests) == 5


ASK = """
import sys
from handrail.experts.config import EndpointConfig
from handrail.experts.endpoint import Endpoint
config = EndpointConfig(base_url=sys.argv[1], model="judge", cache=sys.argv[2], api_key_env="TEST_KEY")
endpoint = Endpoint(config)
questions = [[{"role": "user", "content": str(n)}] for n in range(40)]
assert endpoint.ask_and_read(questions, [str] * 40, 7) == [f"re: {n}" for n in range(40)]
assert "endpoint/cache_broken" not in endpoint.counts
"""


def test_processes_share_a_cache(make: Make, tmp_path: Path) -> None:
    begun = threading.Event()

    def answer(messages: Messages) -> str:
        begun.set()
        return echo(messages)

    with OpenAiServer(answer) as server:
        endpoint = make(server)
        process = subprocess.Popen([sys.executable, "-c", ASK, server.url, str(tmp_path / "cache.sqlite")])
        assert begun.wait(60)
        assert ask(endpoint, [question(n) for n in range(60, 20, -1)]) == [
            f"re: {n}" for n in range(60, 20, -1)
        ]
        assert process.wait(60) == 0
        sent = len(server.requests)
        assert ask(endpoint, [question(n) for n in range(60)]) == [f"re: {n}" for n in range(60)]
        assert len(server.requests) == sent
        assert "endpoint/cache_broken" not in endpoint.counts


def test_threads_share_an_endpoint(make: Make) -> None:
    with OpenAiServer(echo) as server:
        endpoint = make(server)
        wrong: list[object] = []

        def work(start: int) -> None:
            answers = ask(endpoint, [question(n) for n in range(start, start + 20)])
            wrong.extend(answers if answers != [f"re: {n}" for n in range(start, start + 20)] else [])

        threads = [threading.Thread(target=work, args=(start,)) for start in (0, 5, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = endpoint.take_counts()
        assert not wrong and counts["endpoint/calls"] == len(server.requests)
        assert counts["endpoint/calls"] + counts["endpoint/cached"] == 60


def test_a_damaged_cache_is_ignored(make: Make, tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_bytes(b"no database, " * 500)
    with OpenAiServer(echo) as server:
        endpoint = make(server)
        assert ask(endpoint, [question("a"), question("b")]) == ["re: a", "re: b"]
        assert endpoint.take_counts() == {
            "endpoint/cache_broken": 1,
            "endpoint/calls": 2,
            "endpoint/tokens": 30,
        }
        assert ask(endpoint, [question("a")]) == ["re: a"]


def test_a_locked_cache_is_ignored(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_LIMIT", 0.1)
    with OpenAiServer(echo) as server:
        endpoint = make(server)
        other = sqlite3.connect(tmp_path / "cache.sqlite")
        other.execute("BEGIN EXCLUSIVE")
        assert ask(endpoint, [question("a"), question("b")]) == ["re: a", "re: b"]
        assert endpoint.take_counts()["endpoint/cache_broken"] == 1
        other.close()


def test_an_unusable_cache_path_is_refused_at_once(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "cache.sqlite"):
        with pytest.raises(UserError, match="endpoint.cache"):
            make("http://localhost/v1", cache=str(path))


def test_text_that_is_not_valid_unicode_is_accepted(make: Make) -> None:
    with OpenAiServer(lambda messages: echo(messages) + "\ud800") as server:
        assert ask(make(server), [question("a\udfff")]) == ["re: a??"]
        assert ask(make(server), [question("a\udfff")]) == ["re: a??"]


def test_max_calls_is_never_exceeded(make: Make) -> None:
    with OpenAiServer(echo) as server:
        endpoint = make(server, max_calls=7)
        answers = ask(endpoint, [question(n) for n in range(30)])
        assert len(server.requests) == 7 == sum(answer is not None for answer in answers)
        assert endpoint.take_counts()["endpoint/over_budget"] == 23
        assert ask(endpoint, [question(n) for n in range(31)]) == [*answers, None]
        assert len(server.requests) == 7


@pytest.mark.parametrize(
    "budget",
    [
        {"max_tokens": 40},
        {"max_cost": 40e-6, "input_price": 1.0, "output_price": 1.0},
        {"max_cost": 24e-6, "input_price": 0.0, "output_price": 2.0},
    ],
)
def test_budgets_of_tokens_and_cost_end_the_calls(make: Make, budget: dict[str, Any]) -> None:
    with OpenAiServer(echo) as server:
        endpoint = make(server, concurrency=1, **budget)
        assert ask(endpoint, [question(n) for n in range(6)]) == [
            "re: 0",
            "re: 1",
            "re: 2",
            None,
            None,
            None,
        ]
        assert endpoint.spent.tokens == 45


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": -1000, "completion_tokens": 5},
        {"prompt_tokens": "no", "completion_tokens": 1},
    ],
)
def test_a_server_without_usage_figures_still_uses_the_budget(make: Make, usage: Any) -> None:
    with OpenAiServer(lambda messages: Reply(body=completion("word " * 50, usage=usage))) as server:
        endpoint = make(server, concurrency=1, max_tokens=500)
        assert None in ask(endpoint, [question(n) for n in range(9)])


def test_failures_in_a_row_pause_the_run_and_lose_nothing(make: Make) -> None:
    with OpenAiServer(echo, [None, BROKEN, None, BROKEN, BROKEN, MALFORMED]) as server:
        endpoint = make(server, concurrency=1, retries=0, pause_after=3)
        with pytest.raises(Paused) as caught:
            ask(endpoint, [question(n) for n in range(9)])
        assert re.search(
            rf"judge at {server.url} failed 3 questions in a row, .*JSONDecodeError.*can be resumed",
            str(caught.value),
        )
        assert len(server.requests) == 6
        resumed = make(server, concurrency=1)
        assert ask(resumed, [question(n) for n in range(9)]) == [f"re: {n}" for n in range(9)]
        assert resumed.take_counts()["endpoint/cached"] == 2
        assert ask(endpoint, [question("other")]) == ["re: other"]


def test_failures_accumulate_over_calls_and_a_spent_budget_is_not_a_failure(make: Make) -> None:
    with OpenAiServer(lambda messages: failure(500)) as server:
        endpoint = make(server, retries=0, pause_after=2, max_calls=3)
        assert ask(endpoint, [question("a")]) == [None]
        with pytest.raises(Paused):
            ask(endpoint, [question("b")])
        for text in "cdef":
            assert ask(endpoint, [question(text)]) == [None]
        assert endpoint.take_counts() == {
            "endpoint/calls": 3,
            "endpoint/failed": 3,
            "endpoint/over_budget": 3,
        }


def test_an_unreachable_server_pauses_the_run(make: Make) -> None:
    with OpenAiServer(echo) as server:
        pass
    with pytest.raises(Paused, match="Connection"):
        ask(make(server.url, retries=0, pause_after=3), [question(n) for n in range(5)])
