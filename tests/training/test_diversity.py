"""Diversity of a group's completions: hand-worked values, and self-BLEU compared with sacrebleu pair by
pair."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from handrail.training.diversity import distinct_derivations as derivations
from handrail.training.diversity import (
    distinct_n,
    distinct_prefixes,
    diversity,
    measures,
    self_bleu_diversity,
)
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory

TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "=", "é", "語"]), max_size=9).map(" ".join),
    min_size=2,
    max_size=5,
)
SACREBLEU = BLEU(effective_order=True, tokenize="none")


def group(texts: list[str], rewards: list[float], reference: str | None = None) -> Group:
    bare = Trajectory.by(Author.POLICY, [1], [])
    rollouts = [
        replace(bare, text=text, reward=reward, correct=reward == 1)
        for text, reward in zip(texts, rewards, strict=True)
    ]
    references = [] if reference is None else [Trajectory.by(Author.REFERENCE, [1], [2], reference)]
    return Group(Problem("p", "?", "!"), rollouts + references)


def pair_by_pair(texts: list[str]) -> float:
    """Equal texts give 1 (sacrebleu returns 1 only up to rounding, and nothing for empty texts)."""
    pairs = permutations([" ".join(text.split()) for text in texts], 2)
    return 1 - mean(
        1.0 if one == other else SACREBLEU.sentence_score(one, [other]).score / 100 for one, other in pairs
    )


@pytest.mark.parametrize(
    ("texts", "n", "value"),
    [
        (["a b c d e", "a b c d f"], 4, 3 / 4),  # abcd twice, bcde, bcdf
        (["a b c d e", "a b c d f"], 1, 6 / 10),
        (["a a a a a", "b"], 4, 1 / 2),
        (["a  b\nc d", " a b c d "], 4, 1 / 2),
        (["a b c", "d e f"], 4, None),
        (["", ""], 4, None),
        (["a b c d e"], 4, None),
        ([], 4, None),
        (["語 語 é é", "語 語 é e"], 4, 1.0),
    ],
)
def test_distinct_n_is_distinct_n_grams_per_n_gram(texts: list[str], n: int, value: float | None) -> None:
    assert distinct_n(texts, n) == value


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["a b c d e", "a b c d f"], 1 - (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        (
            ["a b", "a c"],
            1 - (1 / 2 * 1 / 2) ** (1 / 2),
        ),  # no bigram in common: smoothed to half a match out of one
        (
            ["a", "a b"],
            1 - (2.718281828459045**-1 + (1 / 2 * 1 / 2) ** (1 / 2)) / 2,
        ),  # too short by one half, or too long
        (["a b", "a b", "c d"], 1 - 2 / 6),
        (["a b", "c d"], 1.0),
        (["a  b", " a b\n"], 0.0),
        (["", ""], 0.0),
        (["", "a"], 1.0),
        (["a b c d e"], None),
        ([], None),
    ],
)
def test_self_bleu_by_hand(texts: list[str], value: float | None) -> None:
    assert self_bleu_diversity(texts) == (value if value is None else pytest.approx(value))


@given(TEXTS)
def test_self_bleu_is_sacrebleus_pair_by_pair(texts: list[str]) -> None:
    assert self_bleu_diversity(texts) == pytest.approx(pair_by_pair(texts), abs=1e-12)


@given(st.lists(st.text(max_size=12), min_size=2, max_size=4))
def test_self_bleu_reads_any_text_as_sacrebleu_does(texts: list[str]) -> None:
    assert self_bleu_diversity(texts) == pytest.approx(pair_by_pair(texts), abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "k", "value"),
    [
        ([["a  b ; ", "c"], ["a b", "d"], ["b ;", "c"]], 1, 2 / 3),
        ([["a  b ; ", "c"], ["a b", "d"], ["b ;", "c"]], 2, 1.0),
        ([["It is 3.\n", "So"], ["It is 3"]], 1, 1 / 2),
        ([["a"], ["a", "b"]], 2, 1.0),
        ([[], []], 1, 1 / 2),
        ([[], ["a"]], 1, 1.0),
        ([["a"]], 1, None),
        ([], 1, None),
    ],
)
def test_distinct_prefixes_are_counted_per_completion(
    steps: list[list[str]], k: int, value: float | None
) -> None:
    assert distinct_prefixes(steps, k) == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("3 + 4 = 7 ; 7 * 2 = 14 # 14", "well 3 + 4  = 7 ; Okay so 7*2=14 # 14", True),
        ("3 + 4 = 7\n7 * 2 = 14\n#### 14", "3 + 4 = 7\n7 * 2 = 14\nThe answer is 14.", True),
        ("It was 3 + 4 = 7. That is 7 days.", "3 + 4 = 7", True),
        ("3 + 4 = 7, then 7 * 2 = 14", "3 + 4 = 7\n7 * 2 = 14", True),
        ("He sold 48/2 = <<48/2=24>>24 clips.", "So 48/2 = 24.", True),
        ("Let's see: 1,000 - 1 = 999", "1000 - 1 = 999", True),
        ("3 + 4 = 7 ; 7 * 2 = 14", "3 * 2 = 6 ; 4 * 2 = 8 ; 6 + 8 = 14", False),
        ("3 + 4 = 7 ; 7 * 2 = 14", "7 * 2 = 14 ; 3 + 4 = 7", False),
        ("12 + 3 = 15", "1 + 23 = 15", False),
        ("2x = 6 ; X = 3", "2X = 6 ; x = 3", True),
        ("2x = 6", "3x = 6", False),
        (r"\frac{12}{3} = 4", r"\frac{1}{23} = 4", False),
        ("Paris, of course.", "paris,  of course", True),
        ("Paris", "Rome", False),
    ],
)
def test_which_texts_count_as_the_same_derivation(one: str, other: str, same: bool) -> None:
    assert derivations([one, other], [True, True]) == (1 if same else 2)


def test_only_derivations_of_correct_completions_count() -> None:
    texts = ["1 + 1 = 2", "2 = 2", "1 + 1 = 2", "4 - 2 = 2"]
    assert derivations(texts, [True] * 4) == 3
    assert derivations(texts, [True, False, True, None]) == 1
    assert derivations(texts, [False] * 4) == 0
    assert derivations(texts[:1], [True]) is None and derivations([], []) is None


def test_the_end_of_a_step_can_be_given() -> None:
    pieces = group(["a | b", "a | c"], [1, 1])
    assert measures(pieces)["distinct_first_steps"] == 1
    assert measures(pieces, r"\| ")["distinct_first_steps"] == 1 / 2
    assert derivations(["x = 1 | so 2", "x = 1 | so 3"], [True, True], r"\| ") == 1


def test_diversity_is_the_mean_over_the_groups_in_which_a_measure_is_defined() -> None:
    two = group(["1 + 1 = 2 ; a", "1 + 1 = 2 ; b"], [1, 1], reference="a reference is not the policy's own")
    short = group(["x", "y"], [0, 0])
    alone = group(["1 + 1 = 2"], [1])
    found = diversity(list(map(measures, [two, short, alone, group([], [])])))
    assert found == {
        "diversity/distinct_4": 5 / 8,
        "diversity/one_minus_self_bleu": pytest.approx(
            (self_bleu_diversity(["1 + 1 = 2 ; a", "1 + 1 = 2 ; b"]) or 0) / 2 + 1 / 2
        ),
        "diversity/distinct_first_steps": (1 / 2 + 1) / 2,
        "diversity/correct_derivations": 1 / 2,
    }
    assert diversity([measures(alone)]) == diversity([]) == dict.fromkeys(found)


@given(TEXTS, st.randoms(use_true_random=False))
def test_measures_are_shares_and_do_not_depend_on_order(texts: list[str], rng: Random) -> None:
    rewards = [float(len(text) % 2) for text in texts]
    order = sorted(range(len(texts)), key=lambda _: rng.random())
    found = measures(group(texts, rewards))
    assert measures(group([texts[i] for i in order], [rewards[i] for i in order])) == found
    *shares, count = found.values()
    assert all(share is None or 0 <= share <= 1 for share in shares)
    assert count is not None and (sum(rewards) > 0) <= count <= sum(rewards)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12).map(" ".join), st.integers(2, 5))
def test_a_group_of_equal_completions_has_minimal_diversity(text: str, n: int) -> None:
    pair, found = distinct_n([text, text]), measures(group([text] * n, [1] * n))
    assert pair is not None and found.pop("distinct_4") == pytest.approx(pair * 2 / n)
    assert found == {"one_minus_self_bleu": 0, "distinct_first_steps": 1 / n, "correct_derivations": 1}
