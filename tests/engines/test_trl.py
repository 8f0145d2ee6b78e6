"""Handrail's methods inside TRL's real GRPOTrainer loop, on a CPU."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from pyarrow.parquet import read_table
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from handrail import METHODS as METHODS_OF
from handrail import Author, Context, Term, UserError
from handrail.data.answers import Answer, Answers, write_answers
from handrail.data.load import load
from handrail.engines.trl import GuidedGRPOTrainer
from handrail.engines.trl_limits import require_tested
from handrail.models.batching import Inputs
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.types.trajectory import Group
from tests.conftest import HARD
from tests.engines.parity import gradient, local_gradient, require_equal, whole
from tests.engines.trl_own import tokenizer
from tests.forks import together

VERIFIER = {"name": "exact", "extract": r"# ([\d ]+)$", "workers": 1}


def dataset(source: str = f"{HARD}&n=16") -> Dataset:
    return Dataset.from_list(
        [
            {
                "id": problem.id, "prompt": problem.prompt, "answer": problem.answer,
                "reference": problem.references[0], "plan": problem.plan,
            }
            for problem in load(source).problems
        ]
    )  # fmt: skip


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    found = [re.search(r"# ([\d ]+)$", text) for text in completions]
    return [float(each is not None and each[1] == right) for each, right in zip(found, answer, strict=True)]


def varied(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [sum(map(ord, text)) % 7 / 6 for text in completions]


def coin(completions: list[str], **_: Any) -> list[float]:
    """1 for about half of all completions."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def arguments(directory: Path, **changes: Any) -> GRPOConfig:
    return GRPOConfig(**{
        "output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 48,
        "learning_rate": 1e-3, "logging_steps": 1, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, **changes,
    })  # fmt: skip


def trainer(
    cls: type[GRPOTrainer],
    directory: Path,
    rewards: Any = exact,
    data: Dataset | None = None,
    config: Any = None,
    **named: Any,
) -> Any:
    model, tokenizer = load_model(ModelConfig(path="builtin:house-tiny"))
    return cls(
        model,
        rewards,
        arguments(directory, **(config or {})),
        data or dataset(),
        processing_class=tokenizer,
        **named,
    )


class Gradients:
    """Keep every micro-batch's loss, and of every update the weights before it and the gradient."""

    def __init__(self, trainer: Any) -> None:
        self.updates: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.guided: list[dict[int, list[tuple[int, Group]]]] = []
        """Of every update, the guided groups of each generation that it has a part of."""
        step, loss = trainer.training_step, trainer._compute_loss

        def training_step(model: Any, *rest: Any) -> Any:
            if trainer.state.global_step == len(self.weights):
                self.weights.append({key: whole(value) for key, value in trainer.model.state_dict().items()})
                self.guided.append({})
            out = step(model, *rest)
            if isinstance(trainer, GuidedGRPOTrainer):
                self.guided[-1][trainer.generations] = trainer.guided
            if trainer.accelerator.sync_gradients:
                self.updates.append(gradient(trainer.model))
            return out

        def compute(model: Any, inputs: Any) -> Any:
            found = loss(model, inputs)
            self.losses.append(float(found.detach()))
            return found

        trainer.training_step, trainer._compute_loss = training_step, compute


def test_grpo_without_anything_is_trls_own_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for cls in (GRPOTrainer, GuidedGRPOTrainer):
        run = trainer(
            cls, tmp_path / cls.__name__, varied, config={"beta": 0.04, "gradient_accumulation_steps": 2}
        )
        kept = Gradients(run)
        run.train()
        runs.append((kept, run.state.log_history))
    (plain, plain_log), (guided, guided_log) = runs
    assert plain.losses == guided.losses and len(plain.updates) == len(guided.updates) == 2
    for one, other in zip(plain.updates, guided.updates, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(g.abs().sum() > 0 for g in plain.updates[0].values())


METHODS = ["luffy", "sort", "grpo+sft", "sft", "scope", "actguide", "dmpo", "calibrl", "int", "stride"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_through_trls_loop(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": method}
    if method == "stride":
        settings |= {"every": 1, "first": 1}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, method=settings)
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 2
    assert any(gradient.abs().sum() > 0 for gradient in kept.updates[0].values())


def test_without_reward_functions_the_verifier_grades_by_the_answer(tmp_path: Path) -> None:
    rewards = []
    for name, function in (("own", exact), ("verifier", None)):
        run = trainer(GuidedGRPOTrainer, tmp_path / name, function, method="sort", verifier=VERIFIER)
        kept = Gradients(run)
        run.train()
        rewards.append([row["reward"] for row in run.state.log_history if "reward" in row])
        assert run.state.log_history[0]["handrail/groups/guided"] == 2
        assert any(gradient.abs().sum() > 0 for gradient in kept.updates[0].values())
    assert rewards[0] == rewards[1]


def npo_cache(directory: Path) -> Path:
    """Answers of a later checkpoint to every problem: its reference, with made-up log-probabilities."""
    tokenizer, rows = load_model(ModelConfig(path="builtin:house-tiny"))[1], []
    for problem in load(f"{HARD}&n=16").problems:
        tokens = [*tokenizer.encode(problem.references[0]), tokenizer.eos_token_id]
        logp = [-0.1 - 0.01 * place for place in range(len(tokens))]
        rows.append(Answers(problem.id, [Answer(tokens, logp, problem.references[0])]))
    file = directory / "answers.jsonl"
    file.write_text("{}\n" + write_answers(rows))
    return file


def require_parity(run: Any, kept: Gradients) -> None:
    """Every update of ``run`` is what the local engine makes of its groups and weights."""
    updates = max(1, run.args.steps_per_generation // run.args.gradient_accumulation_steps)
    sizes = []
    for update, found in enumerate(kept.updates):
        parts = {
            generation: [each for each in guided if each[0] * updates // run.problems == update % updates]
            for generation, guided in kept.guided[update].items()
        }
        guided = {
            step: ([group for _, group in part], [place for place, _ in part]) for step, part in parts.items()
        }
        expected = local_gradient(
            run.method, kept.weights[update], guided, run.args.seed, run.pool, experts=run.engine.experts
        )
        sizes.append(require_equal(found, expected))
    assert max(sizes) > 0


PARITY: dict[str, dict[str, Any]] = {
    "grpo": {"normalize_std": True},  # not TRL's own loss, but ours
    "luffy": {},
    "sort": {},
    "scope": {},
    "actguide": {"share": 1.0},
    "npo": {"threshold": 1.0},
    "dmpo": {},
    "calibrl": {},
    "int": {"judge": "reference", "corrector": "reference", "continuations": 4},
    "stride": {"judge": "reference", "first": 1, "every": 1},
    "cso": {"judge": "reference", "candidates": 1},
    "tgpo": {},
}
TEACHER = {"teacher": "builtin:house-tiny"}


@pytest.mark.parametrize("method", PARITY)
@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_equals_the_local_engines(method: str, updates: int, tmp_path: Path) -> None:
    """Also with two updates on each generation, so that the second one's ratios are not 1."""
    settings = {"name": method, **PARITY[method]}
    settings |= {"cache": str(npo_cache(tmp_path))} if method == "npo" else {}
    steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 2 * updates, "max_steps": 2 * updates}
    rewards = exact if method in ("luffy", "sort", "actguide") else coin
    run = trainer(GuidedGRPOTrainer, tmp_path, rewards, config=steps, method=settings, experts=TEACHER)
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 2 * updates
    require_parity(run, kept)


@pytest.mark.parametrize(("accumulated", "generated"), [(1, 1), (4, 1), (4, 2), (4, 4), (2, 4), (1, 4)])
def test_any_number_of_micro_batches_makes_the_same_update(
    accumulated: int, generated: int, tmp_path: Path
) -> None:
    changes = {"gradient_accumulation_steps": accumulated, "steps_per_generation": generated}
    changes |= {"per_device_train_batch_size": 4, "max_steps": 8 // accumulated}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, config=changes, method="grpo+sft")
    kept = Gradients(run)
    run.train()
    assert len(kept.updates) == 8 // accumulated and len(kept.losses) == 8
    assert run.generations == 8 // generated
    require_parity(run, kept)


def test_an_update_may_use_a_generation_twice(tmp_path: Path) -> None:
    changes = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 1}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, config=changes, method="dmpo")
    kept = Gradients(run)
    run.train()
    assert run.generations == 2 and len(kept.updates) == 4
    require_parity(run, kept)


TERMS: list[Any] = [
    {"name": "ace", "alpha": 1.0}, "arm", "dmpo", "imentor", {"name": "prorag", "judge": "arithmetic"},
    {"name": "pacr", "answer_template": " # {answer}"}, "fapo", {"name": "overlong", "buffer": 20}, "tgpo",
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term if isinstance(term, str) else term["name"])
def test_terms_work_under_a_method(term: Any, tmp_path: Path) -> None:
    named = {"config": {"max_steps": 1}, "method": "sort", "experts": TEACHER}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, **named, terms=[term])
    kept = Gradients(run)
    run.train()
    require_parity(run, kept)


class Doubled(Term):
    """A term of one's own: twice the advantages."""

    async def credit(self, group: Group, ctx: Context) -> Group:
        return group.map(lambda member: member.with_columns(advantage=2 * member.column("advantage")))


def test_a_term_may_be_an_object(tmp_path: Path) -> None:
    norms = []
    for name, terms in (("without", []), ("with", [Doubled()])):
        run = trainer(
            GuidedGRPOTrainer, tmp_path / name, coin, config={"max_steps": 1}, method="luffy", terms=terms
        )
        kept = Gradients(run)
        run.train()
        require_parity(run, kept)
        norms.append(float(run.state.log_history[0]["grad_norm"]))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3) and norms[0] > 0


def test_olr_reads_answers_with_the_verifier_only(tmp_path: Path) -> None:
    terms = [{"name": "olr", "start": 0, "slope": -1.0}]
    run = trainer(GuidedGRPOTrainer, tmp_path, None, method="luffy", terms=terms, verifier=VERIFIER)
    run.train()
    assert len(run.method.terms[0].state()["passes"]) == 4  # two groups in each of two steps


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Imentor's networks are the term's state, and the reference's choice depends on the generation."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    named = {"method": "sort", "terms": ["imentor"]}
    whole = trainer(GuidedGRPOTrainer, tmp_path / "whole", coin, config=changes, **named)
    whole.train()
    resumed = trainer(GuidedGRPOTrainer, tmp_path / "resumed", coin, config=changes, **named)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.generations == whole.generations == 4
    one, other = whole.method.terms[0].state(), resumed.method.terms[0].state()
    assert one["nets"].keys() == other["nets"].keys()
    assert all(torch.equal(one["nets"][name], other["nets"][name]) for name in one["nets"])
    before, after = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "whole/checkpoint-2/handrail.json").unlink()
    with pytest.raises(UserError, match="another trainer wrote it"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


CASES: list[tuple[dict[str, Any], Any, int, int]] = [
    ({"name": "sort", "terms": [{"name": "ace", "alpha": 1.0}]}, exact, 2, 2),
    ({"name": "scope", "corrector": "policy"}, coin, 1, 2),
    ({"name": "actguide", "share": 1.0}, exact, 2, 1),
    ({"name": "dmpo"}, coin, 1, 1),
    ({"name": "luffy"}, None, 2, 2),
    ({"name": "cso", "judge": "reference", "candidates": 1, "kl": 0.1}, coin, 1, 2),
]
SHARDED = (0, 5)
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` tells its processes."""


def case(number: int, directory: str, processes: int) -> Any:
    """A trainer with three groups in a generation; two processes share the second one."""
    method, rewards, accumulated, generated = CASES[number]
    changes = {
        "gradient_accumulation_steps": accumulated, "steps_per_generation": generated, "max_steps": 2,
        "num_generations": 4, "per_device_train_batch_size": 12 // processes // generated,
    }  # fmt: skip
    named = {"method": method, "verifier": VERIFIER}
    return trainer(GuidedGRPOTrainer, Path(directory, str(number)), rewards, config=changes, **named)


def train_cases(directory: Path, numbers: Sequence[int]) -> None:
    """Train cases as one of two processes, and write what ``Gradients`` keeps."""
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpus()
    for number in numbers:
        run = case(number, str(directory), 2)
        kept = Gradients(run)
        run.train()
        assert run.is_fsdp_enabled == any(isinstance(each, DTensor) for each in run.model.parameters())
        written = (kept.losses, kept.weights, kept.guided, kept.updates, run.state.log_history)
        with open(directory / f"{number}-{run.accelerator.process_index}.pickle", "wb") as file:
            pickle.dump((run.is_fsdp_enabled, *written), file)


def shard_on_cpus() -> None:
    """Let Accelerate take this process's CPU for a GPU when it decides whether to shard: it ignores FSDP on
    CPUs."""
    prepare = PartialState.__init__

    def prepared(state: Any, *arguments: Any, **named: Any) -> None:
        prepare(state, *arguments, **named)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = prepared


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "fsdp2"])
def test_two_processes_share_groups_and_make_one_update(sharded: bool, tmp_path: Path) -> None:
    numbers = SHARDED if sharded else range(len(CASES))
    together(2, train_cases, tmp_path, numbers, environment=FSDP2 if sharded else {})
    for number in numbers:
        run = case(number, str(tmp_path / "one"), 1)
        both = [Gradients(run), Gradients(run)]
        for rank, kept in enumerate(both):
            written = pickle.loads((tmp_path / f"{number}-{rank}.pickle").read_bytes())
            fsdp, kept.losses, kept.weights, kept.guided, kept.updates, log = written
            assert "handrail/trajectories/trained" in log[0] and fsdp == sharded
        run.problems = len({place for place, _ in next(iter(kept.guided[0].values()))})
        for one, two in zip(both[0].updates, both[1].updates, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
        require_parity(run, kept)


def refusals() -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    sort = {"method": "sort"}
    of_eight, of_four = (METHODS_OF["sort"](group_size=size, max_tokens=48) for size in (8, 4))
    uneven = {"gradient_accumulation_steps": 3, "steps_per_generation": 2}
    unguided = Dataset.from_list([{"prompt": "1 + 1 ?", "answer": "2"}])
    unclosed = Dataset.from_list([{"prompt": "1 + 1 ?", "reference": r"so \boxed{2", "id": None}])
    images = dataset().add_column("image", [None] * 16)
    return [
        ({"beta": 0.04}, sort, "beta is 0.04, but the objective is that of sort; leave it out and set kl"),
        ({"loss_type": "cispo"}, sort, "leave it out and set loss_normalizer in method="),
        ({"delta": 1.5}, sort, "but the objective is that of sort; leave it out$"),
        ({"remove_unused_columns": True}, sort, "would remove the columns that sort learns from"),
        ({"mask_truncated_completions": True}, sort, "sort decides what a truncated completion is worth"),
        (uneven, sort, "make one a multiple of the other"),
        ({}, {**sort, "tools": [print]}, "tools: sort reads and writes single-turn completions"),
        ({}, {**sort, "rollout_func": print}, "rollout_func: sort reads"),
        ({}, {"method": of_eight}, "num_generations is 4, but the method was made for 8"),
        ({}, {"method": of_four, "terms": ["arm"]}, "has its own terms"),
        ({}, {"method": "autonpo"}, "autonpo goes back to earlier checkpoints, which TRL cannot"),
        ({}, {"method": {"name": "stride", "judge": "critic"}}, "stride trains a critic beside"),
        ({}, {"method": "sorted"}, "there is no method 'sorted'; did you mean 'sort'"),
        ({}, {"method": {"name": "sort", "planner": "nobody"}}, "there is no planner 'nobody'"),
        ({}, {"method": "tgpo"}, "what reads a teacher's probabilities needs experts.teacher"),
        ({}, {"method": "sft", "terms": ["arm"]}, "sft has no advantages that a term could change"),
        ({}, {**sort, "rewards": [exact, coin]}, "say by correct_by= which one tells"),
        ({}, {**sort, "terms": ["olr"]}, "olr reads the answers in completions, which reward functions do"),
        ({}, {**sort, "terms": ["pacr"]}, "pacr reads .* leave out reward_funcs, so that verifier= grades"),
        ({}, {**sort, "correct_by": "exactly"}, "correct_by: there is no 'exactly'; there are: exact"),
        ({}, {**sort, "data": unguided}, "learns from references"),
        ({}, {**sort, "data": unclosed}, r"the prompt '1 \+ 1 \?', field reference: its last .*never closed"),
        ({}, {**sort, "rewards": None, "verifier": {"timeout": 0}}, "verifier.timeout: input should be"),
        ({}, {**sort, "experts": {"judge": "x"}}, "there is no setting experts.judge; known here: prm"),
        ({}, {**sort, "endpoint": {"model": "m"}}, "the setting endpoint.base_url is missing"),
        ({}, {**sort, "plan_template": "x"}, "plan_template: string should match pattern"),
        ({}, {**sort, "data": images}, "trains on text only inside TRL"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(27))
def test_what_a_method_cannot_do_inside_trl_is_refused_at_once(number: int, tmp_path: Path) -> None:
    changes, named, sentence = refusals()[number]
    with pytest.raises(UserError, match=sentence):
        trainer(GuidedGRPOTrainer, tmp_path, config=changes, **named)


def test_several_reward_functions_give_the_reward_and_one_tells_what_is_correct(tmp_path: Path) -> None:
    weights = {"reward_weights": [0.25, 2.0]}
    named = {"config": weights, "method": "sort", "correct_by": "exact"}
    run = trainer(GuidedGRPOTrainer, tmp_path, [coin, exact], **named)
    run.train()
    for _, group in run.guided:
        assert all(member.correct is False for member in group.rollouts)
        assert {member.reward for member in group.rollouts} <= {0.0, 0.25}
        (reference,) = group.imitated
        assert reference.correct and reference.reward == 2.0 + 0.25 * coin([reference.text])[0]


def test_what_reward_functions_log_is_of_rollouts_only(tmp_path: Path) -> None:
    """The references that SORT has graded are in neither TRL's table nor its means."""

    def logging(completions: list[str], log_metric: Any, log_extra: Any, **named: Any) -> list[float]:
        log_metric("graded", len(completions))
        log_extra("text", completions)
        return exact(completions, **named)

    run = trainer(GuidedGRPOTrainer, tmp_path, logging, config={"log_completions": True}, method="sort")
    run.train()
    assert [row["graded"] for row in run.state.log_history if "graded" in row] == [8.0, 8.0]
    assert all(group.imitated for _, group in run.guided)
    for step in (1, 2):
        table = read_table(tmp_path / f"completions/completions_{step:05d}.parquet").to_pydict()
        assert table["text"] == table["completion"] and len(table["text"]) == 8


def test_evaluation_between_two_updates_on_a_generation_changes_neither(tmp_path: Path) -> None:
    """TRL evaluates its own way: it samples and grades, and no method guides."""
    halves = {"steps_per_generation": 2, "max_steps": 2}
    evaluated = {**halves, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    kept = []
    for changes in (halves, evaluated):
        named = {"eval_dataset": dataset().select(range(2)), "method": "sort"}
        run = trainer(GuidedGRPOTrainer, tmp_path, exact, config=changes, **named)
        kept.append(Gradients(run))
        run.train()
    assert run.generations == 1 and sum("eval_reward" in row for row in run.state.log_history) == 2
    for one, other in zip(kept[0].updates, kept[1].updates, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_trained_and_turned_off_for_the_model_before_training(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    run = trainer(
        GuidedGRPOTrainer,
        tmp_path,
        config={"max_steps": 3},
        method={"name": "sort", "kl": 0.1},
        peft_config=adapter,
    )
    run.train()
    assert run.ref_model is None
    member = run.guided[0][1].trajectories[0]
    asked = [member.prompt_ids], [member.token_ids]
    now, before = run.policy.score(*asked)[0], run.policy.score(*asked, "reference")[0]
    start = trainer(GuidedGRPOTrainer, tmp_path / "start", method="sort").policy.score(*asked)[0]
    torch.testing.assert_close(before, start)
    assert (now - before).abs().max() > 1e-3


def test_adapters_get_the_gradient_of_the_weights_that_they_change(tmp_path: Path) -> None:
    """W = W0 + s·BA, so B gets s·GAᵀ and A gets s·BᵀG of the gradient G that the local engine gives W."""
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    changes = {"max_steps": 1, "gradient_checkpointing": True}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, config=changes, method="luffy", peft_config=adapter)
    kept = Gradients(run)
    run.train()
    scale, prefix, expected = 6 / 2, "base_model.model.", dict[str, torch.Tensor]()
    start = {key.replace(".base_layer", ""): value for key, value in kept.weights[0].items()}
    merged = {key.removeprefix(prefix): value for key, value in start.items() if ".lora_" not in key}
    layers = [key.removesuffix(".lora_A.default.weight") for key in start if ".lora_A" in key]
    factors = {layer: [start[f"{layer}.lora_{side}.default.weight"] for side in "AB"] for layer in layers}
    for layer, (a, b) in factors.items():
        merged[f"{layer.removeprefix(prefix)}.weight"] += scale * b @ a
    guided = {1: ([group for _, group in run.guided], [place for place, _ in run.guided])}
    gradients = local_gradient(run.method, merged, guided, run.args.seed)
    for layer, (a, b) in factors.items():
        g = gradients[f"{layer.removeprefix(prefix)}.weight"]
        expected[f"{layer}.lora_A.default.weight"] = scale * b.T @ g
        expected[f"{layer}.lora_B.default.weight"] = scale * g @ a.T
    assert require_equal(kept.updates[0], expected) > 0


@pytest.mark.parametrize("updates", [1, 2])
def test_dropout_makes_no_ratio(updates: int, tmp_path: Path) -> None:
    """Rollouts are scored without it; with one update, their ratio is exactly 1, as in TRL."""
    adapter = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights="gaussian", target_modules="all-linear")
    changes = {"steps_per_generation": updates, "max_steps": updates}
    run = trainer(GuidedGRPOTrainer, tmp_path, coin, config=changes, method="luffy", peft_config=adapter)
    run.train()
    batches = [batch.tokens for batch in run.micro_batches]
    sampled = [(batch.author == Author.POLICY) & (batch.mask > 0) for batch in batches]
    old = torch.cat([batch.old_logp[own] for batch, own in zip(batches, sampled, strict=True)])
    assert len(old) and bool(old.isnan().all()) == (updates == 1)
    run.model.train()
    first, again = (run.policy.score([[5, 6]], [[7, 8]])[0] for _ in range(2))
    assert torch.equal(first, again) and run.model.training


def test_the_state_is_written_before_trl_deletes_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", killed)
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        trainer(GuidedGRPOTrainer, tmp_path, coin, config=changes, method="luffy").train()
    assert (tmp_path / "checkpoint-1/handrail.json").exists()


def test_the_model_before_training_has_no_entropy(tmp_path: Path) -> None:
    """TRL computes none; log-probabilities are not passed off as one."""
    run = trainer(GuidedGRPOTrainer, tmp_path, method={"name": "sort", "kl": 0.1})
    inputs = Inputs.of([[5, 6]], [[7, 8, 9]], [[7, 8, 9]])
    logp, entropy = run.policy.forward(inputs)
    assert logp.shape == entropy.shape == (1, 3)
    before, none = run.policy.forward(inputs, run.ref_model)
    torch.testing.assert_close(before, logp)
    assert none is None


def test_padding_moves_no_token(tmp_path: Path) -> None:
    """GPT-2 learns its positions, so a row beside a longer one must be read at the same ones as alone."""
    words = load_model(ModelConfig(path="builtin:house-tiny"))[1]
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **shape))
    named = {"processing_class": words, "method": "sort"}
    run = GuidedGRPOTrainer(model, exact, arguments(tmp_path), dataset(), **named)
    (alone,) = run.policy.score([[5, 6]], [[7, 8, 9]])
    beside, _ = run.policy.score([[5, 6], [5, 6, 7, 8, 9, 10]], [[7, 8, 9], [7]])
    torch.testing.assert_close(beside, alone)


def test_a_compiled_model_is_called(tmp_path: Path) -> None:
    """It has no truth value."""
    run = trainer(GuidedGRPOTrainer, tmp_path, method="sort")
    inputs = Inputs.of([[5, 6]], [[7, 8, 9]])
    with torch.compiler.set_stance("force_eager"):
        found, _ = run.policy.forward(inputs, torch.compile(run.model))
    torch.testing.assert_close(found, run.policy.logprobs(inputs))


def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tested("1.16.3")
    with pytest.raises(
        UserError, match=r"in trl 1.17.0 GRPOTrainer has not been tested; pip install \"trl==1.16"
    ):
        require_tested("1.17.0")
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: None)
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(UserError, match="GRPOTrainer has changed _calculate_rewards, _generate; pip install"):
        require_tested("1.16.0")


def test_chat_prompts_are_trls_own(tmp_path: Path) -> None:
    """References and hints follow the prompt that TRL writes, also with a chat template."""
    rows = dataset()
    chats = [[{"role": "user", "content": prompt}] for prompt in rows["prompt"]]
    rows = rows.remove_columns("prompt").add_column("prompt", chats)
    model, tokenizer = load_model(ModelConfig(path="builtin:house-tiny"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

    def spoken(completions: list[list[dict[str, str]]], **named: Any) -> list[float]:
        return exact([completion[0]["content"] for completion in completions], **named)

    run = GuidedGRPOTrainer(
        model,
        spoken,
        arguments(tmp_path),
        rows,
        processing_class=tokenizer,
        method={"name": "actguide", "share": 1.0},
    )
    run.train()
    assert all(member.hint for _, group in run.guided for member in group.trajectories)
    assert any(member.correct for _, group in run.guided for member in group.trajectories)


def test_the_example_runs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("trl_guided", "examples/trl_guided.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, last = example.main("sort", 2, output=str(tmp_path))
    assert 0 <= first <= 1 and 0 <= last <= 1


class Room:
    """An environment that gives the reward itself."""

    def reset(self, **_: Any) -> None: ...

    def open(self, door: str) -> str:
        """Open a door.

        Args:
            door: Which one.

        Returns:
            What is behind it.
        """
        return door

    def get_reward(self) -> float:
        return 1.0


def test_an_environment_that_gives_the_reward_is_not_graded_by_the_verifier_too(tmp_path: Path) -> None:
    words = tokenizer((Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text())
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "Open it."}]}] * 4)
    for cls in (GRPOTrainer, GuidedGRPOTrainer):
        run = cls(
            LlamaForCausalLM(config),
            args=arguments(tmp_path),
            train_dataset=data,
            processing_class=words,
            environment_factory=Room,
        )
        assert run.reward_func_names == ["Room"]
