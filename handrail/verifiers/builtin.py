"""Verifiers: from a problem and a completion to a reward between 0 and 1.

Built in are ``math``, ``exact``, ``normalised``, ``reasoning-gym`` and ``task``; ``module:function`` and ``path/to/file.py:function``
name a function of the user's own, called as ``function(problem, completion)``. Nothing here keeps time: what may hang or
crash is run by ``handrail.verifiers.pool``. Heavy imports stay inside functions, so that a worker starts quickly.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, SupportsFloat

from handrail._util.errors import UserError
from handrail._util.imports import load_attribute
from handrail.data.tasks.gym import BY_NAME
from handrail.types import Problem
from handrail.verifiers import gym_answers, math_answers, math_reading
from handrail.verifiers.answer_text import boxes, final_answer, looks, marked, plain
from handrail.verifiers.config import VerifierConfig

Verifier = Callable[[Problem, str], float]

# Around an answer: punctuation that changes nothing. Signs, brackets and relations do.
LEADING, TRAILING = ' "*`:=#', ' ."*`,;:!?%'
ENCLOSING = {"()", "[]", "{}", "''", "__"}
# Fraction("1e999999999") would compute the power.
LARGE_EXPONENT = re.compile(r"e[+-]?[\d_]{4}")
# reasoning-gym compares these families' grids as tuples, which JSON turns into lists.
GRID_FAMILIES = ("arc_agi", "rearc")


def resolve(config: VerifierConfig) -> Verifier:
    """Returns the verifier that ``config`` names; ``config.extract``, if set, cuts the completion down before it.

    Raises UserError if there is no such verifier, module or function. The returned function raises ValueError or TypeError where a
    verifier's value is no number in [0, 1], and whatever it raises.
    """
    grade = BUILTIN[config.name] if config.name in BUILTIN else _user_function(config.name)
    cut = _cutter(config)
    partial = config.name not in ("reasoning-gym", "task") if config.partial_credit is None else config.partial_credit

    def graded(problem: Problem, completion: str) -> float:
        found = cut(completion)
        score = 0.0 if found is None else _reward(grade(problem, found))
        return score if partial else float(score >= config.correct_from)

    return graded


def reader(config: VerifierConfig) -> Callable[[str], str | None]:
    """Returns a function from a completion to the answer it gives, spelt alike where two are equal; None where it gives none.

    For votes among completions. Of a user's own verifier we know the answer only where ``extract`` or a usual mark says what it is.
    """
    cut = _cutter(config)
    spell = SPELLINGS.get(config.name, _stated if config.extract is None else str.strip)

    def answer(completion: str) -> str | None:
        found = cut(completion)
        return (found is not None and spell(found)) or None

    return answer


def _cutter(config: VerifierConfig) -> Callable[[str], str | None]:
    if config.extract is None:
        return lambda completion: completion
    pattern = re.compile(config.extract)
    return lambda completion: _last_match(pattern, completion)


def exact(problem: Problem, completion: str) -> float:
    """1 if the completion is the answer, white space around them aside."""
    return float(completion.strip() == problem.answer.strip())


def normalised(problem: Problem, completion: str) -> float:
    """1 if the completion's final answer is the answer up to case, spacing, surrounding punctuation and way of writing numbers."""
    return float(_normal(final_answer(completion)) == _normal(problem.answer))


def math(problem: Problem, completion: str) -> float:
    """1 if the answer that the completion states is the problem's, by its letters or as math-verify says, and worked out. Raises
    ValueError if the problem's is empty."""
    right = _right_answer(problem.answer)
    if not right.plain:
        raise ValueError(f"the problem's answer {problem.answer!r} is empty")
    mine = math_reading.stated(completion)
    return float(math_answers.same(mine, right) if mine else plain(completion) == right.plain)


@lru_cache(maxsize=64)
def _right_answer(text: str) -> math_reading.Answer:
    """Kept, because many completions are compared with it."""
    return math_reading.known(text)


def reasoning_gym(problem: Problem, completion: str) -> float:
    """The score of the reasoning-gym family that the problem's metadata names. Raises ValueError if it names none."""
    metadata = problem.metadata
    if "source_dataset" not in metadata:
        raise ValueError("the problem's metadata names no reasoning-gym family (source_dataset)")
    if metadata["source_dataset"] in GRID_FAMILIES:
        metadata = metadata | {"output": tuple(tuple(row) for row in metadata["output"])}
    question = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    entry = {"question": question, "answer": problem.answer, "metadata": metadata}
    return _scored(metadata["source_dataset"], final_answer(completion), entry)


def task(problem: Problem, completion: str) -> float:
    """For the built-in tasks: what stands after the last ``#``, scored by the reasoning-gym family that the problem is of, if any."""
    _, marked, answer = completion.rpartition("#")
    family = BY_NAME.get(problem.metadata.get("source_dataset", ""))
    if not marked or family is None:
        return exact(problem, answer) if marked else 0.0
    entry = {"question": problem.prompt, "answer": problem.metadata["gym_answer"], "metadata": problem.metadata}
    return _scored(family.family, family.spoken(answer.split()), entry)


def _scored(family: str, answer: str, entry: dict[str, Any]) -> float:
    seen = gym_answers.shown(family, answer, entry)
    return 0.0 if seen is None else _family_score(family)(seen, entry)


@lru_cache
def _family_score(family: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    score: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(family)
    return score


BUILTIN: dict[str, Callable[[Problem, str], object]] = {
    "math": math,
    "exact": exact,
    "normalised": normalised,
    "reasoning-gym": reasoning_gym,
    "task": task,
}


def _math_spelling(text: str) -> str | None:
    found = math_reading.stated(text)
    return None if found is None else math_answers.spelling(found)


def _stated(text: str) -> str | None:
    return None if marked(text) is None and not boxes(text) else final_answer(text)


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "math": _math_spelling,
    "exact": str.strip,
    "normalised": lambda text: str(_normal(final_answer(text))),
    "reasoning-gym": lambda text: final_answer(text).casefold(),
    "task": lambda text: " ".join(text.rpartition("#")[2].split()) if "#" in text else None,
}


def warm_up(name: str) -> None:
    """Does what a built-in verifier does once, so that the first verdict's deadline need not cover it."""
    if name == "math":
        math(Problem("warm-up", "", r"\frac{1}{2}"), r"\boxed{x + 1}")
    elif name in ("reasoning-gym", "task"):
        importlib.import_module("reasoning_gym")


def _normal(text: str) -> Fraction | str:
    bare = _bare(looks(text).casefold())
    number = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", bare)
    try:
        value = bare if LARGE_EXPONENT.search(number) or "_" in number else Fraction(number)
    except (ValueError, ZeroDivisionError):
        return bare
    undone = "/" in number and isinstance(value, Fraction) and value.denominator == 1  # 84/2 is a question, 42 its answer
    return bare if undone else value


def _bare(text: str) -> str:
    for _ in range(3):
        text = text.lstrip(LEADING).rstrip(TRAILING) or text
        if len(text) < 3 or text[0] + text[-1] not in ENCLOSING or "," in text:  # (0, 1] is not [0, 1)
            break
        text = text[1:-1]
    return text


def _last_match(pattern: re.Pattern[str], completion: str) -> str | None:
    last = deque(pattern.finditer(completion), maxlen=1)
    return last[0].group(1) if last else None


def _reward(value: object) -> float:
    try:
        reward = float(value) if isinstance(value, SupportsFloat) else None
    except Exception:  # arrays of several numbers have __float__ too
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
        hint = f"did you mean {close[0]!r}?" if close else f"choose {', '.join(BUILTIN)} or your own module:function or file.py:function"
        raise UserError(f"verifier.name: there is no verifier {name!r}; {hint}")
    function = load_attribute(name, "verifier.name")
    if not callable(function):
        raise UserError(f"verifier.name: {name} is not a function")
    return function  # type: ignore[no-any-return]
