"""The built-in policies: their training mixtures, a recipe that makes a model, and what the shipped models
cannot do yet."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.backbones import make, mixtures
from benchmarks.backbones.measure import measure
from benchmarks.suite.suite import load_suite
from handrail.data.load import load_problems
from handrail.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN
from handrail.data.tasks.gym import FAMILIES, LEGS
from handrail.data.tasks.house_rules import KNOWN_RULES
from handrail.data.tasks.procedures import carry_out, procedure
from handrail.models.builtin import locate

SUITE = [name for name in make.RECIPES if name.startswith("suite-")]


def test_the_mixture_of_house_tiny_has_not_changed() -> None:
    recipe, rng = make.RECIPES["house-tiny"], random.Random(5)
    assert zlib.crc32(repr([recipe.example(recipe.shares, rng) for _ in range(500)]).encode()) == 3417542541


def test_no_known_procedure_belongs_to_a_benchmark_family() -> None:
    known = {work.plan for work in mixtures.known_procedures().values()}
    assert len(known) > 90
    for source in IN_DOMAIN.values():
        assert (
            not {problem.plan for problem in load_problems(f"{source}{'&' if '?' in source else '?'}n=100")}
            & known
        )


def test_examples_are_correct_and_use_only_known_words() -> None:
    recipe, rng = make.RECIPES["suite-middle"], random.Random(1)
    known = mixtures.known_procedures()
    for _ in range(2000):
        prompt, completion = recipe.example(recipe.shares, rng)
        assert {*prompt.split(), *completion.split()} <= {*recipe.words}
        name, *words = prompt.split("\n")[0].split()
        numbers = [int(word) for word in words if word.isdigit()]
        things = [mixtures.KNOWN_THINGS[word] for word in words if word in mixtures.KNOWN_THINGS]
        if name in known:
            worked = carry_out(known[name], numbers, things)
        elif name in mixtures.UNKNOWN_PROCEDURES and "Plan:" in prompt and not {*words} & {*LEGS}:
            worked = carry_out(procedure(prompt.split("Plan:\n")[1]), numbers, things)
        else:
            continue
        assert completion == f"{' ; '.join(worked.steps)} # {worked.answer}"


def test_the_families_names_mean_something_else_in_every_example() -> None:
    rng = random.Random(2)
    drawn = [mixtures.suite_example({"planned procedure": 1.0}, rng)[0] for _ in range(3000)]
    for family in FAMILIES.values():
        if family.word != "sum":
            plans = [prompt.split("Plan:\n")[1] for prompt in drawn if prompt.startswith(f"{family.word} ")]
            assert len({*plans}) > 300
            own = {problem.plan for problem in load_problems(f"task:{family.family.replace('_', '-')}?n=100")}
            assert sum(plan in own for plan in plans) <= 3


@pytest.mark.parametrize("name", ["house-tiny", "suite-weak"])
def test_a_recipe_makes_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        make.RECIPES, name, replace(make.RECIPES[name], hidden=16, layers=1, steps=2, batch=4)
    )
    make.make(name, tmp_path / "a", seed=1)
    make.make(name, tmp_path / "b", seed=1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").num_parameters() > 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.tokenize(f"7 {[*KNOWN_RULES][0]} +") == ["7", "K0", "+"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


# The shipped backbones of the suite


def sources() -> dict[str, str]:
    return {
        name: f"{source}{'&' if '?' in source else '?'}n=60"
        for name, source in (IN_DOMAIN | OUT_OF_DOMAIN).items()
    }


@pytest.mark.parametrize("name", [name for name in make.RECIPES if name.startswith("suite-")])
def test_a_suite_backbone_is_small_and_knows_every_word(name: str) -> None:
    directory = Path(locate(f"builtin:{name}"))
    assert {file.suffix for file in directory.iterdir()} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in directory.iterdir()) < 1.6e6
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == make.RECIPES[name].words
    for source in sources().values():
        for problem in load_problems(f"{source}&style=foreign"):
            text = f"{mixtures.PLAN.format(prompt=problem.prompt, plan=problem.plan)} {problem.references[0]}"
            assert tokenizer.unk_token_id not in tokenizer.encode(text)


def test_the_middle_backbone_solves_out_of_domain_but_not_in_domain_problems() -> None:
    lines = list(measure("builtin:suite-middle", 16))
    accuracy = {
        line.split(":")[0]: float(line.split("pass@1 ")[1].split("%")[0])
        for line in lines
        if "pass@1" in line
    }
    assert {*accuracy} == {"easy", "hard", *FAMILIES}
    assert accuracy.pop("easy") > 80 and accuracy.pop("chain-sum") > 80
    assert max(accuracy.values()) < 6


def test_the_suite_lists_the_benchmarks() -> None:
    suite = load_suite()
    style = "seed={problems}&style={style}"
    assert [source["path"] for source in suite.base["data"]["train"]] == [
        f"{source}{'&' if '?' in source else '?'}n=600&{style}" for source in IN_DOMAIN.values()
    ]
    sets = suite.base["eval"]["sets"]
    assert {name: path.partition("split")[0][:-1] for name, path in sets.items()} == IN_DOMAIN | OUT_OF_DOMAIN
    assert (suite.in_domain, suite.out_of_domain) == ([*IN_DOMAIN], [*OUT_OF_DOMAIN])
