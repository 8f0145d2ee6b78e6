"""Prompts that an expert or a method makes longer than the data's, whose lengths were checked.

The model is GPT-2's, which cannot read more tokens than it has positions.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from handrail import LocalEngine, VerifierPool, train
from handrail.data.load import load_problems
from handrail.experts.correctors import Draft
from handrail.experts.questions import CorrectionQuestion
from handrail.methods.requests import Pending, Score, TopTokens
from handrail.training.policies import load_policy
from tests.conftest import HARD, config
from tests.tiny_models import save_chat_model

PROBLEMS = load_problems(f"{HARD}&n=16")
PROMPT = "what is two and three"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with just the positions that the prompts need together with the references or completions."""
    directory = save_chat_model(tmp_path_factory.mktemp("model"))
    policy = load_policy(config(model={"path": str(directory)}), Accelerator(cpu=True))
    renderer = policy.renderer
    lengths = [
        len(renderer.prompt(each))
        + max(policy.max_tokens, *(len(renderer.reference(each, text)) for text in each.references))
        for each in PROBLEMS
    ]
    words = AutoTokenizer.from_pretrained(directory)
    shape: dict[str, Any] = {"vocab_size": len(words), "n_embd": 32, "n_layer": 1, "n_head": 2}
    ends = {"eos_token_id": words.eos_token_id, "bos_token_id": None, "pad_token_id": words.eos_token_id}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape, **ends, n_positions=max(lengths))).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"weights": "solution"}, "score/no_room"), ({"planner": "policy"}, "planner/no_room")],
)
def test_sort_does_without_plans_that_the_model_has_no_room_for(
    settings: dict[str, Any], count: str, model: Path, tmp_path: Path
) -> None:
    """Every repair is then weighted by p0, as without a plan."""
    data = {"train": f"{HARD}&n=16"}
    runs = {}
    for name, changes in (("run", settings), ("p0", {"alpha": 0.0})):
        method = {"name": "sort", **changes}
        train(config(model={"path": str(model)}, method=method, data=data), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[1:]
        runs[name] = [json.loads(line) for line in lines]
    assert all(row[count] > 0 for row in runs["run"])
    if count == "planner/no_room":
        assert all(row[count] == row["planner/no_answer"] == row["groups/guided"] for row in runs["run"])
        assert [row["loss"] for row in runs["run"]] == [row["loss"] for row in runs["p0"]]


def test_experts_and_scores_without_room_answer_nothing(model: Path, verifier: VerifierPool) -> None:
    policy = load_policy(config(model={"path": str(model)}), Accelerator(cpu=True))
    engine = LocalEngine(policy, verifier)
    problem = PROBLEMS[0]
    assert policy.context is not None
    long = Draft(problem, [PROMPT], " ".join([PROMPT] * policy.context))
    short = Draft(problem, [PROMPT], "2 + 3 = 5")
    questions = [CorrectionQuestion(draft, False, 0, True, 24) for draft in (long, short)]
    assert engine.experts.answer("policy", questions, [1, 2])[0] is None
    assert engine.experts.counts["corrector/no_room"] == 1

    fits, prompt = policy.renderer.completion(PROMPT), policy.renderer.prompt(problem)
    requests = [(prompt, torch.tensor(tokens)) for tokens in (fits * policy.context, fits)]
    none, some = engine.answer([Pending(Score(*each), (), None) for each in requests])  # type: ignore[arg-type]
    assert none.isnan().all() and len(none) == len(requests[0][1]) and not some.isnan().any()
    (alone,) = policy.score([prompt], [fits])
    assert some.tolist() == alone.tolist()
    top = engine.answer([Pending(TopTokens(*each), (), None) for each in requests])  # type: ignore[arg-type]
    assert top[0] is None and top[1].shape == some.shape
    assert engine.counts == Counter({"score/no_room": 2})
