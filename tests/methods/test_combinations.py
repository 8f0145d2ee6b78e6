"""Terms under methods and beside each other: which pairs are refused, and others through the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handrail import UserError, train
from handrail.data.load import load_problems
from handrail.methods import METHODS, build, combinations, term_combinations, verbs
from handrail.methods.terms import TERMS
from handrail.models.config import RolloutConfig
from handrail.models.trainable import TrainablePolicy
from tests.conftest import EASY, HARD, Handrail, config
from tests.methods.terms.scripted import lines
from tests.methods.test_scope import TRUE_STEPS

ROOT = Path(__file__).parents[2]


def made(*names: str, method: str = "grpo") -> Any:
    return build({"name": method, "terms": [{"name": name} for name in names]}, RolloutConfig())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("ace", "arm"), "ace and arm exclude each other, because both scale"),
        (("arm", "prorag", "ace"), "arm and ace exclude each other"),
        (("imentor", "fapo"), "imentor and fapo exclude each other, because with fapo"),
        (("fapo", "imentor"), "fapo and imentor exclude each other"),
        (("fapo", "olr"), "put olr before fapo, whose rewards it would overwrite"),
        (("pacr", "pacr"), "pacr is there twice"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_in_a_sentence(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=f"^method.terms: .*{said}"):
        made(*names)


def test_what_is_listed_as_composing_does_and_what_is_refused_does_not() -> None:
    for name in TERMS:
        composes, refuses = term_combinations(name)
        assert len(composes) + len(refuses) == len(METHODS) + len(TERMS) - 1
        for kind in composes:
            other = kind.split()[1]
            pair = [name, other] if kind.startswith("term") else [name]
            pair = sorted(pair, key=lambda each: sum(each in term.precedes for term in TERMS.values()))
            if kind.startswith("method") and other == "npo":  # needs a file
                continue
            made(*pair, method="grpo" if kind.startswith("term") else other)
        for kind in refuses:
            other = kind.split()[1]
            with pytest.raises(UserError):
                made(name, other) if kind.startswith("term") else made(name, method=other)
    for key, cls in METHODS.items():
        composes, refuses = combinations(cls)
        assert not composes and refuses if not cls.uses_advantages else {*composes, *refuses} == {*TERMS}, key


def test_every_term_states_its_source_status_and_verbs() -> None:
    for name, cls in TERMS.items():
        assert cls.source.startswith("arXiv ") and cls.status in ("published", "secondary"), name
        assert {"reward", "credit"} & set(verbs(cls)), name
        assert all(field.description for key, field in cls.model_fields.items() if key != "name"), name
    assert verbs(TERMS["olr"]) == ["reward", "observe", "learn"]
    assert verbs(METHODS["tgpo"]) == ["guide", "credit"] and verbs(METHODS["grpo"]) == []


def test_the_command_lists_and_describes_terms_too(handrail: Handrail) -> None:
    every = handrail("methods").out
    assert all(f" {name} " in every for name in (*METHODS, *TERMS))
    fapo = handrail("methods", "fapo").out
    assert "fapo · term · arXiv 2510.22543 · status: published" in fapo
    assert "verbs of its own: reward\n" in fapo and "refuses term imentor: with fapo" in fapo
    assert "refuses method sft: it has no advantages" in fapo and "method luffy" in fapo
    both = handrail("methods", "tgpo").out
    assert "tgpo · method" in both and "tgpo · term" in both and "in an item of method.terms" in both
    unknown = handrail("methods", "fapoo")
    assert unknown.code == 2


def test_terms_compose_with_methods_through_the_loop(tmp_path: Path) -> None:
    """One run for each pair, of one step; every term's counts are there, and something is learned."""
    counts = {
        "ace": "ace/penalized",
        "arm": "arm/shifted",
        "fapo": "fapo/judged",
        "imentor": "imentor/bonuses",
        "olr": "olr/no_majority",
        "pacr": "pacr/scored",
        "prorag": "prorag/judged",
        "tgpo": "tgpo/tokens",
    }
    runs: dict[str, tuple[dict[str, Any], list[str]]] = {
        "luffy+fapo": ({"name": "luffy"}, ["fapo"]),
        "scope+pacr+fapo": ({"name": "scope"}, ["pacr", "fapo"]),
        "sort+ace+prorag": ({"name": "sort"}, ["ace", "prorag"]),
        "dmpo+olr+imentor": ({"name": "dmpo"}, ["olr", "imentor"]),
        "tgpo+arm+pacr": ({"name": "tgpo"}, ["arm", "pacr", "tgpo"]),
    }
    for directory, (method, terms) in runs.items():
        sizes = {"imentor": {"prompt_tokens": 8, "response_tokens": 48}}
        method = {**method, "terms": [{"name": term, **sizes.get(term, {})} for term in terms]}
        settings = config(
            data={"train": [{"path": f"{EASY}&n=64"}, {"path": f"{HARD}&n=64"}]},  # some right, some wrong
            method=method,
            rollout={"max_tokens": 48, "temperature": 2.0},  # some groups are mixed
            experts={"teacher": "builtin:house-tiny"},
            train={"steps": 1, "problems_per_step": 8, "samples_every": 0},
        )
        train(settings, tmp_path / directory)
        (_, row) = lines(tmp_path / directory / "metrics.jsonl")
        assert row["loss"] == row["loss"] and row["grad_norm/all"] > 0, directory
        assert {term for term in terms if row.get(counts[term], 0) > 0} == {*terms}, directory
        assert method["name"] != "dmpo" or row["dmpo/matched"] > 0


def test_guides_compose_with_terms_and_with_each_other_through_the_loop(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    problems = load_problems(f"{EASY}&n=64") + load_problems(f"{HARD}&n=64")
    policy = TrainablePolicy("builtin:house-tiny")
    rows = []
    for problem in problems:
        tokens = policy.renderer.completion(problem.references[0])
        answer = {"tokens": tokens, "logp": [-0.1] * len(tokens), "text": problem.references[0]}
        rows.append(json.dumps({"id": problem.id, "answers": [answer]}))
    answers.write_text("\n".join(["{}", *rows]) + "\n")
    own = f"{ROOT / 'examples/luffy_scope_npo.py'}:LuffyScopeNpo"
    runs: dict[str, tuple[dict[str, Any], list[str]]] = {
        "actguide+arm": (
            {"name": "actguide", "terms": [{"name": "arm"}]},
            ["actguide/guided", "arm/shifted"],
        ),
        "npo+dmpo": (
            {"name": "npo", "cache": str(answers), "threshold": 0.9, "terms": [{"name": "dmpo"}]},
            ["npo/replayed", "dmpo/matched"],
        ),
        "luffy+scope+npo": (
            {"name": own, "cache": str(answers), "judge": TRUE_STEPS, "min_correct_prefix": 0.0},
            ["npo/replayed", "scope/repaired", "groups/guided"],
        ),
    }
    for directory, (method, counts) in runs.items():
        settings = config(
            data={"train": [{"path": f"{EASY}&n=64"}, {"path": f"{HARD}&n=64"}]},
            method=method,
            rollout={"temperature": 2.0},
            train={"steps": 1, "problems_per_step": 8},
        )
        train(settings, tmp_path / directory)
        (_, row) = lines(tmp_path / directory / "metrics.jsonl")
        assert all(row[count] > 0 for count in counts) and row["grad_norm/all"] > 0, directory
    authors = {
        author for row in lines(tmp_path / "luffy+scope+npo/samples.jsonl") for author in row["author"]
    }
    assert {"policy", "reference", "replay"} <= authors
