"""Verifiers: functions from a problem and a completion to a reward between 0 and 1.

Built in are ``math``, ``exact``, ``normalized``, ``reasoning-gym`` and ``task``; ``module:function`` and
``path/to/file.py:function`` name a function of the user's own, called as ``function(problem, completion)``.
Nothing here enforces a time limit: ``handrail.verifiers.pool`` runs verifiers, which may hang or crash, in
processes. Heavy imports stay inside functions, so that a worker starts quickly.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, SupportsFloat

from handrail._util.errors import UserError
from handrail._util.imports import load_attribute
from handrail._util.thinking import after_thinking, answer_start
from handrail.data.tasks.gym import BY_NAME
from handrail.types.problem import Problem
from handrail.verifiers import as_written, gym_answers, math_answers, math_reading
from handrail.verifiers.answer_text import (
    boxes,
    final_answer,
    marked,
    plain,
    strip_formatting,
)

if TYPE_CHECKING:  # pydantic would take half of a worker's start
    from handrail.verifiers.config import VerifierConfig

Verifier = Callable[[Problem, str], float]

# Punctuation to ignore around an answer. Signs, brackets and relations are not in it, because they matter.
LEADING, TRAILING = ' "*`:=#', ' ."*`,;:!?%'
ENCLOSING = {"()", "[]", "{}", "''", "__"}
# Fraction("1e999999999") would compute the whole power.
LARGE_EXPONENT = re.compile(r"e[+-]?[\d_]{4}")
# reasoning-gym compares these families' grids as tuples, which JSON turns into lists.
GRID_FAMILIES = ("arc_agi", "rearc")


def resolve(config: VerifierConfig) -> Verifier:
    """Return the verifier that ``config`` names.

    If ``config.extract`` is set, the verifier sees only what that finds in a completion. The returned
    function raises ValueError or TypeError if a verifier's value is not a number in [0, 1], and passes on any
    exception of the verifier. Raises UserError if there is no such verifier, module or function.
    """
    grade = BUILTIN[config.name] if config.name in BUILTIN else _user_function(config.name)
    cut = _extractor(config)
    partial = (
        config.name not in ("reasoning-gym", "task")
        if config.partial_credit is None
        else config.partial_credit
    )

    def verify(problem: Problem, completion: str) -> float:
        found = cut(completion)
        score = 0.0 if found is None else _reward(grade(problem, found))
        return score if partial else float(score >= config.correct_from)

    return verify


def reader(config: VerifierConfig) -> Callable[[str], str | None]:
    """Return a function from a completion to its answer, or to None if it gives none.

    Equal answers are spelled alike, so that completions can vote. With a user's own verifier, an answer is
    known only if ``extract``, or a box, a tag or ``####``, marks it.
    """
    cut = _extractor(config)
    spell = SPELLINGS.get(config.name, _marked_answer if config.extract is None else str.strip)

    def answer(completion: str) -> str | None:
        found = cut(completion)
        return (found is not None and spell(found)) or None

    return answer


def _extractor(config: VerifierConfig) -> Callable[[str], str | None]:
    if config.extract is None:
        return lambda completion: completion
    pattern = re.compile(config.extract)
    return lambda completion: _last_match(pattern, completion)


def exact(problem: Problem, completion: str) -> float:
    """Return 1 if the completion equals the answer, ignoring white space around them."""
    return float(completion.strip() == problem.answer.strip())


def normalized(problem: Problem, completion: str) -> float:
    """Return 1 if the completion's final answer equals the answer after normalization.

    Case, spacing, surrounding punctuation and the way of writing a number make no difference.
    """
    return float(_normal(final_answer(completion)) == _normal(problem.answer))


def math(problem: Problem, completion: str) -> float:
    """Return 1 if the completion's answer equals the problem's and is worked out.

    They are equal letter by letter or by math-verify. Raises ValueError if the problem's answer is empty.
    """
    right = _right_answer(problem.answer)
    if not right.plain:
        raise ValueError(f"the problem's answer {problem.answer!r} is empty")
    passage = math_reading.find_passage(completion)
    if (letter := as_written.choice(right)) and (
        named := as_written.choices(passage, after_thinking(completion))
    ):
        return float(named == {letter})
    mine = math_reading.read_passage(passage)
    if as_written.is_joined(right):
        return float(as_written.same_joined(passage, mine, right))
    if mine is None:
        return float(plain(passage.text) == right.plain)
    return float(math_answers.same(mine, right))


@lru_cache(maxsize=64)
def _right_answer(text: str) -> math_reading.Answer:
    """Read a problem's answer; cached, because many completions are compared with it."""
    return math_reading.read_gold(text)


def reasoning_gym(problem: Problem, completion: str) -> float:
    """Return the score of the reasoning-gym family that the problem's metadata names.

    Raises ValueError if the metadata names no family.
    """
    metadata = problem.metadata
    if "source_dataset" not in metadata:
        raise ValueError("the problem's metadata names no reasoning-gym family (source_dataset)")
    if metadata["source_dataset"] in GRID_FAMILIES:
        metadata = metadata | {"output": tuple(tuple(row) for row in metadata["output"])}
    question = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    entry = {"question": question, "answer": problem.answer, "metadata": metadata}
    return _score(metadata["source_dataset"], final_answer(completion), entry)


def task(problem: Problem, completion: str) -> float:
    """Score the text after the last ``#`` for a built-in task, with the scorer of its reasoning-gym family.

    A task without a family (house rules) needs the exact answer.
    """
    _, marked, answer = after_thinking(completion).rpartition("#")
    family = BY_NAME.get(problem.metadata.get("source_dataset", ""))
    if not marked or family is None:
        return exact(problem, answer) if marked else 0.0
    entry = {
        "question": problem.prompt,
        "answer": problem.metadata["gym_answer"],
        "metadata": problem.metadata,
    }
    return _score(family.family, family.scorer_text(answer.split()), entry)


def _score(family: str, answer: str, entry: dict[str, Any]) -> float:
    seen = gym_answers.scorer_input(family, answer, entry)
    return 0.0 if seen is None else _family_score(family)(seen, entry)


@lru_cache
def _family_score(family: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    score: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(family)
    return score


BUILTIN: dict[str, Callable[[Problem, str], object]] = {
    "math": math,
    "exact": exact,
    "normalized": normalized,
    "reasoning-gym": reasoning_gym,
    "task": task,
}


def _math_spelling(text: str) -> str | None:
    passage = math_reading.find_passage(text)
    named = as_written.choices(passage, after_thinking(text))
    if len(named) == 1:
        return named.pop()
    found = math_reading.read_passage(passage)
    return None if found is None else math_answers.spelling(found)


def _marked_answer(text: str) -> str | None:
    return None if marked(text) is None and not boxes(after_thinking(text)) else final_answer(text)


def _task_spelling(text: str) -> str | None:
    _, marked, answer = after_thinking(text).rpartition("#")
    return " ".join(answer.split()) if marked else None


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "math": _math_spelling,
    "exact": str.strip,
    "normalized": lambda text: str(_normal(final_answer(text))),
    "reasoning-gym": lambda text: final_answer(text).casefold(),
    "task": _task_spelling,
}


def warm_up(name: str) -> None:
    """Do the one-time work of a built-in verifier, so that it does not count toward the first time limit."""
    if name == "math":
        math(Problem("warm-up", "", r"\frac{1}{2}"), r"\boxed{x + 1}")
    elif name in ("reasoning-gym", "task"):
        importlib.import_module("reasoning_gym")


def _normal(text: str) -> Fraction | str:
    bare = _strip_enclosing(strip_formatting(text).casefold())
    number = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", bare)
    try:
        value = bare if LARGE_EXPONENT.search(number) or "_" in number else Fraction(number)
    except (ValueError, ZeroDivisionError):
        return bare
    # 84/2 is a question and 42 its answer, so the two are not equal.
    undone = "/" in number and isinstance(value, Fraction) and value.denominator == 1
    return bare if undone else value


def _strip_enclosing(text: str) -> str:
    for _ in range(3):
        text = text.lstrip(LEADING).rstrip(TRAILING) or text
        if len(text) < 3 or text[0] + text[-1] not in ENCLOSING or "," in text:  # (0, 1] is not [0, 1)
            break
        text = text[1:-1]
    return text


def _last_match(pattern: re.Pattern[str], completion: str) -> str | None:
    """Return the first group of the last match, without those whose group begins in the model's thinking."""
    start = answer_start(completion)
    answers = (match for match in pattern.finditer(completion) if not 0 <= match.start(1) < start)
    last = deque(answers, maxlen=1)
    return last[0].group(1) if last else None


def _reward(value: object) -> float:
    try:
        reward = float(value) if isinstance(value, SupportsFloat) else None
    except Exception:  # arrays of several numbers have __float__ too, but it raises
        reward = None
    if reward is None:
        raise TypeError(f"the verifier returned {value!r:.100}, which is not a number")
    if not 0 <= reward <= 1:
        raise ValueError(f"the verifier returned {reward}, which is not between 0 and 1")
    return reward


def _user_function(name: str) -> Callable[[Problem, str], object]:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"choose {', '.join(BUILTIN)} or your own module:function or file.py:function"
        )
        raise UserError(f"verifier.name: there is no verifier {name!r}; {hint}")
    function = load_attribute(name, "verifier.name")
    if not callable(function):
        raise UserError(f"verifier.name: {name} is not a function")
    return function  # type: ignore[no-any-return]
