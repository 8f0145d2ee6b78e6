"""The built-in tasks: the verifier accepts every reference, no plan leaks a value, splits are disjoint."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.backbones.mixtures import SUITE_WORDS
from handrail._util.errors import UserError
from handrail.data.load import load_problems
from handrail.data.tasks import TASKS, structure
from handrail.data.tasks.gym import FAMILIES
from handrail.data.tasks.house_rules import FILLERS
from handrail.data.tasks.procedures import Impossible, carry_out, procedure
from handrail.experts.planners import leaks
from handrail.types.problem import Problem
from handrail.verifiers.builtin import resolve
from handrail.verifiers.config import VerifierConfig

GRADE = resolve(VerifierConfig(name="task"))
SOURCES = [*FAMILIES, "house-rules?level=hard", "house-rules?level=easy"]


def problems(source: str, **options: object) -> list[Problem]:
    name, _, given = source.partition("?")
    return load_problems(
        f"task:{name}?"
        + "&".join([*filter(None, [given]), *(f"{key}={value}" for key, value in options.items())])
    )


def sent(problem: Problem) -> Problem:
    """Return the problem as a verifier's process receives it."""
    return replace(problem, metadata=json.loads(json.dumps(problem.metadata)))


@pytest.mark.parametrize("style", ["clean", "foreign"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_reference_is_accepted_and_no_plan_leaks(source: str, style: str) -> None:
    made = problems(source, n=150, seed=901, split="test", style=style) + problems(
        source, n=250, seed=902, style=style
    )
    assert len(made) == 400
    for problem in made:
        (reference,) = problem.references
        assert GRADE(sent(problem), reference) == 1
        assert reference.endswith(f"# {problem.answer}")
        assert not leaks(problem.plan or "", problem)
        assert problem.plan and not any(word.isdigit() for word in problem.plan.split())
        assert {*str(problem.prompt).split(), *problem.plan.split(), *reference.split()} <= {*SUITE_WORDS}
        assert len(reference.split()) <= (39 if style == "clean" else 45)
        assert (style == "foreign") or not {*reference.split()} & {*FILLERS}


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_answers_earn_nothing(source: str) -> None:
    for problem in problems(source, n=50, seed=903):
        (reference,) = problem.references
        numbers = problem.answer.split()
        wrong = " ".join([*numbers[:-1], str(int(numbers[-1]) + 1)])
        head = reference.rpartition("#")[0]
        for completion in (
            f"{head}# {wrong}",
            head,
            problem.answer,
            f"{reference} 0",
            f"{reference} #",
            "# # #",
            "# x y",
            f"{head}# 1 / 0",
        ):
            assert GRADE(problem, completion) == 0, completion


@pytest.mark.parametrize("source", SOURCES)
def test_splits_share_no_prompt_and_seeds_differ(source: str) -> None:
    n = 100
    train, test = (problems(source, n=n, seed=901, split=split) for split in ("train", "test"))
    assert len({problem.prompt for problem in train + test}) == 2 * n
    other = problems(source, n=n, seed=902)
    assert len({problem.prompt for problem in train} & {problem.prompt for problem in other}) < n / 2
    assert problems(source, n=n, seed=902) == other
    assert len({problem.id for problem in train + test + other}) == 3 * n


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_documented_number_of_problems(name: str) -> None:
    for split, most in FAMILIES[name].most.items():
        if most < 10_000:
            assert len(problems(name, n=most, seed=904, split=split)) == most


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("task:base-conversion?n=151&split=test", "n is 151; here it must be from 1 to 150"),
        ("task:leg-counting?n=0", "n is 0; here it must be from 1 to 1500"),
        ("task:leg-counting?style=odd", "style is 'odd'; it must be one of clean, foreign"),
        ("task:time-intervals?level=hard", "no option 'level'; its options are n, seed, style, split"),
        ("task:gcd", f"there is no task 'gcd'; the tasks are {', '.join(TASKS)}"),
    ],
)
def test_invalid_task_options_are_refused(source: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        load_problems(source)


def test_guessing_the_most_common_answer_earns_little() -> None:
    """Always giving a benchmark's most common answer earns little."""
    for source in SOURCES:
        answers = [problem.answer for problem in problems(source, n=150, seed=905, split="test")]
        share = max(map(answers.count, answers)) / len(answers)
        assert share < 0.07, (source, share)


# A number in brackets is structure: the procedure selects it. A number without brackets follows from the
# words before it.

HAND_MARKED = {
    "complex-arithmetic": (
        "complex 8 4 2 2 ?",
        "[8] * [2] = 16 , [4] * [2] = 8 , 16 - 8 = 8 ; [8] * [2] = 16 , [4] * [2] = 8 , 16 + 8 = 24 # 8 24",
    ),
    "base-conversion": (
        "base 8 1 2 0 ?",
        "[1] * [8] = 8 , 8 + [2] = 10 ; 10 * [8] = 80 , 80 + [0] = 80 # 80",
    ),
    "leg-counting": ("legs 4 dog 8 cow ?", "[4] * [4] = 16 ; [8] * [4] = 32 , 16 + 32 = 48 # 48"),
    "time-intervals": ("clock 4 13 4 52 ?", "[4] - [4] = 0 ; [52] - [13] = 39 # 0 39"),
    "fraction-simplification": (
        "fraction 44 64 ?",
        "[44] / [2] = 22 , [64] / [2] = 32 ; 22 / [2] = 11 , 32 / [2] = 16 # 11 16",
    ),
    "chain-sum": ("sum 83 - 72 + 40 ?", "[83] - [72] = 11 ; 11 + [40] = 51 # 51"),
    "house-rules": (
        "1 D 7 C 6 E 7 ?",
        "1 * 2 = 2 , 2 + 7 = 9 ; 9 - 6 = 3 , 3 * 2 = 6 ; 6 - 7 = 99 , 99 - 7 = 92 # 9 6 92",
    ),
}


@pytest.mark.parametrize("name", HAND_MARKED)
def test_structure_by_hand(name: str) -> None:
    prompt, marked = HAND_MARKED[name]
    (problem,) = [problem for problem in problems(name, n=100, seed=901) if problem.prompt == prompt]
    assert problem.references == (marked.replace("[", "").replace("]", ""),)
    assert structure(problem, problem.references[0]) == [not word.isdigit() for word in marked.split()]


def test_a_borrowed_hour_is_structure() -> None:
    problem = next(
        problem
        for problem in problems("time-intervals", n=50, seed=901)
        if "60" in problem.references[0].split()
    )
    start_hour, start_minute, end_hour, end_minute = str(problem.prompt).split()[1:5]
    words = problem.references[0].split()
    picked = [
        word
        for word, true in zip(words, structure(problem, problem.references[0]), strict=True)
        if true and word.isdigit()
    ]
    assert picked == [end_hour, "1", start_hour, "60", start_minute, end_minute]


def test_structure_leaves_out_lead_in_words() -> None:
    for source in SOURCES:
        for plain, foreign in zip(
            problems(source, n=20, seed=901), problems(source, n=20, seed=901, style="foreign"), strict=True
        ):
            marks = structure(foreign, foreign.references[0])
            words = foreign.references[0].split()
            assert [word in FILLERS for word in words] == [mark is None for mark in marks]
            assert [mark for mark in marks if mark is not None] == structure(plain, plain.references[0])


# Procedures


def test_the_plan_of_a_procedure_is_its_text() -> None:
    text = "add first second then subtract it third\nhalve that\nanswer each"
    work = procedure(text)
    assert work.plan == text
    worked = carry_out(work, [80, 14, 5])
    assert worked.steps == ["80 + 14 = 94 , 94 - 5 = 89", "94 / 2 = 47"]
    assert worked.answer == "89 47"
    assert worked.chosen == [True, True, False, False, True, False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "numbers"), [("halve first", [3]), ("multiply first second", [10, 10]), ("rest first", [61])]
)
def test_values_outside_the_vocabulary_are_impossible(text: str, numbers: list[int]) -> None:
    with pytest.raises(Impossible):
        carry_out(procedure(f"{text}\nanswer last"), numbers)
