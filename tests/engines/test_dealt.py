"""What processes that deal work out to each other do when it fails in one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai
from accelerate import PartialState

from handrail import Problem
from handrail._util.errors import Paused, UserError
from handrail.engines.dealt import DealtExperts, deal
from handrail.experts.questions import JudgeQuestion
from tests.forks import together
from tests.openai_server import BROKEN, OpenAiServer


def ask() -> None:
    """Ask a server that answers 500: the client's exception pickles, but no process can unpickle it."""
    client = openai.OpenAI(base_url=os.environ["SERVER"], api_key="none", max_retries=0)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])


def fail(error: Exception) -> None:
    raise error


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("no pickle")
        self.hook = lambda: None


class Judge:
    """A user's own judge, which the second process's share breaks."""

    def judge(self, attempts: Sequence[tuple[Problem, list[str]]]) -> list[list[float]]:
        if any(problem.id == "3" for problem, _ in attempts):
            ask()
        return [[1.0]] * len(attempts)


def raised(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def fail_in_the_second(directory: Path) -> None:
    state = PartialState(cpu=True)

    def in_the_second(failing: Callable[[], None]) -> Callable[[], Any]:
        def work(own: list[int]) -> list[int]:
            if state.process_index == 1:
                failing()
            return own

        return lambda: deal([1, 2, 3], work)

    questions = [JudgeQuestion(Problem(str(number), "", ""), ["a step"]) for number in range(4)]
    experts = DealtExperts()
    errors: list[Callable[[], None]] = [
        partial(fail, each) for each in (Unpicklable(), UserError("mend it"), Paused("later"))
    ]
    found = [raised(in_the_second(failing)) for failing in (ask, *errors)]
    found.append(raised(lambda: experts.answer(f"{__file__}:Judge", questions, [0] * 4)))
    found.append([str(each) for each in deal([1, 2, 3], lambda own: [10 * each for each in own])])
    worked: list[str] = []

    def note(own: list[int]) -> list[int]:
        worked.append(str(own))
        return own

    for items in ([1, 2, 3], [1]):
        assert deal(items, note) == deal(items, note, equal=False) == items
    found.append(worked)
    (directory / f"{state.process_index}.json").write_text(json.dumps(found))


def test_all_processes_raise_the_same_whatever_one_raises(tmp_path: Path) -> None:
    """Also an exception that does not pickle; afterwards they go on together."""
    with OpenAiServer(lambda messages: BROKEN) as server:
        together(2, fail_in_the_second, tmp_path, environment={"SERVER": server.url}, seconds=60)
    said = "Error code: 500 - no"
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [
            ["RuntimeError", f"InternalServerError: {said}"],
            ["RuntimeError", "Unpicklable: no pickle"],
            ["UserError", "mend it"],
            ["Paused", "later"],
            ["UserError", f"the judge {__file__}:Judge fails: InternalServerError: {said}"],
            ["10", "20", "30"],
            # Equal shares, then shares without repetition: a paid question is asked once.
            [["[1, 2]", "[1, 2]", "[1]", "[1]"], ["[3, 1]", "[3]", "[1]"]][rank],
        ]
