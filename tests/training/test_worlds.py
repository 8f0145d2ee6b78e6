"""One, two and three processes give the same result: the same completions, token for token, and the same
gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from handrail import METHODS, Callback, Config, Context, Group, Trajectory, UserError, train
from handrail.models.generate import Completion, Sampler, generate
from handrail.models.loading import load_model
from handrail.models.sharding import local
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import load_config
from handrail.training.update import Update
from tests.conftest import EASY, HARD, config
from tests.forks import launch, together
from tests.training.test_loop import Scripted, lines


def scripted(steps: int = 3) -> Config:
    return config(
        rollout={"group_size": 3, "max_tokens": 48}, data={"train": f"{HARD}&n=64"},
        train={"steps": steps, "problems_per_step": 6, "learning_rate": 1e-4, "micro_batch_tokens": 300,
        "updates_per_step": 1,
               "schedule": "linear", "token_budget": 800, "checkpoint_every": 1},
    )  # fmt: skip


def train_and_resume(directory: Path) -> None:
    def note(step: int, steps: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        with open(f"{directory}-{os.environ['RANK']}.rates", "a") as file:
            file.write(f"{metrics.get('learning_rate')} ")

    train(scripted(steps=1), directory, method=Scripted, progress=note)
    train(scripted(), directory, resume=True, method=Scripted, progress=note)


def test_two_processes_train_like_one_also_after_resuming(tmp_path: Path) -> None:
    train(scripted(), tmp_path / "one", method=Scripted)
    together(2, train_and_resume, tmp_path / "two")
    rates = [(tmp_path / f"two-{rank}.rates").read_text().split() for rank in range(2)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 4  # none at step 0, then decreasing
    one, two = lines(tmp_path / "one/metrics.jsonl"), lines(tmp_path / "two/metrics.jsonl")
    assert len(one) == len(two) == 4 and one[1]["groups/mixed"] and one[1]["groups/guided"]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            close = (
                value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)
            )
            assert right[key] == close, key


def torchrun(*arguments: object) -> tuple[int, str]:
    """Run ``torchrun -m handrail`` as documented; return (exit code, all output)."""
    world = ("--standalone", "--nproc-per-node=2")
    return launch(
        "torch.distributed.run", *world, "-m", "handrail", *arguments,
        without=("ACCELERATE",), environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_torchrun_as_documented_gives_the_evaluation_of_one_process(tmp_path: Path) -> None:
    """The batches are smaller than the held-out sets, and one batch is a single row, so that a process has no
    part of it."""
    command = [
        "train",
        "examples/quick.toml",
        *("--set", "train.steps=1", "--set", "rollout.batch_size=5", "--set", "eval.limit=8"),
        *("--set", f"data.train={HARD}&n=64"),
    ]
    command += ["--set", "eval.samples=2", "--set", "train.problems_per_step=4", "--set", "model.device=auto"]
    code, said = torchrun(*command, "--output", tmp_path / "two")
    assert code == 0, said[-3000:]
    assert said.count("into ") == 1  # only one process prints
    train(load_config("examples/quick.toml", command[3::2]), tmp_path / "one")
    one, two = lines(tmp_path / "one/metrics.jsonl"), lines(tmp_path / "two/metrics.jsonl")
    assert one[0] == two[0] and len(two) == 2 and two[1]["rollouts"] == one[1]["rollouts"]
    started = [lines(tmp_path / name / "evaluations.jsonl")[:2] for name in ("one", "two")]
    assert started[0] == started[1] and list(started[0][0]["correct"]) == list(started[1][0]["correct"])


def train_noted(runs: dict[Path, dict[str, Any]]) -> None:
    """Train every run; write each process's completions and micro-batches, and the gradients."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("IN_FLOAT64"):
        use_float64()
    step, backward = torch.optim.AdamW.step, Update.backward

    def noted_method(name: str) -> Any:
        class Noted(METHODS[name]):  # type: ignore[valid-type, misc]
            async def credit(self, group: Group, ctx: Context) -> Group | None:
                with open(f"{directory}-{rank}.tokens", "a") as file:
                    for member in group.trajectories:
                        file.write(json.dumps([ctx.step, group.problem.id, member.tokens]) + "\n")
                credited: Group | None = await super().credit(group, ctx)
                if credited and "idle" in str(directory) and group.problem.id[-1] not in "07":
                    return credited.map(without_credit)
                return credited

        return Noted

    def noted_step(self: Any, closure: Any = None) -> Any:
        weights = [p for group in self.param_groups for p in group["params"]]
        gradient = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in weights]
        if rank == "0":
            number = len(list(directory.parent.glob(f"{directory.name}.gradient-*")))
            torch.save(gradient, f"{directory}.gradient-{number:02}")
        done = step(self, closure)
        state = [value for kept in self.state.values() for value in kept.values() if value.ndim]
        kept = [*weights, *state]
        shares = [local(value).numel() / value.numel() for value in kept]
        with open(f"{directory}-{rank}.kept", "w") as file:
            json.dump([all(isinstance(value, DTensor) for value in kept), max(shares)], file)
        return done

    def noted_backward(self: Update, batches: list[Any], passes: int) -> Any:
        with open(f"{directory}-{rank}.batches", "a") as file:
            file.write(json.dumps([len(batches), passes]) + "\n")
        return backward(self, batches, passes)

    torch.optim.AdamW.step = noted_step  # type: ignore[method-assign]
    Update.backward = noted_backward  # type: ignore[method-assign]
    for directory, sections in runs.items():
        method = noted_method(sections["method"]["name"])
        settings, sampler = Config.model_validate(sections), Elsewhere if "apart" in directory.name else None
        train(settings, directory, method=method, resume=directory.exists(), sampler=sampler)


class Elsewhere(Sampler):
    """Samples from a whole model of its own, as Ray's samplers do."""

    makes_batches = True
    differs = False

    def __init__(self, policy: TrainablePolicy) -> None:
        self.policy = policy
        self.model = load_model(policy.config)[0].to(torch.get_default_dtype())
        assert policy.apart == all(weight.numel() == 0 for weight in policy.bare_model.parameters())

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        missing, unexpected = self.model.load_state_dict(dict(weights), strict=False)
        assert set(missing) <= set(self.model.all_tied_weights_keys) and not unexpected

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        poll: Callable[[], None],
    ) -> list[Completion]:
        ends, temperature = self.policy.renderer.ends, self.policy.rollout.temperature
        return generate(self.model, prompts, seeds, max_tokens, temperature, ends, poll)


def without_credit(member: Trajectory) -> Trajectory:
    names = ("advantage", "imitation_weight")
    return member.with_columns(**{name: 0 * member.column(name) for name in names})


def use_float64() -> None:
    """Compute in float64, where a wrong normalizer cannot hide in the rounding of batches of other shapes."""
    prepare = TrainablePolicy._prepare
    TrainablePolicy._prepare = lambda self, model: prepare(self, model.double())  # type: ignore[method-assign]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)


def uneven(method: str, lora: int = 0, model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Five problems per step, which neither two nor three processes can share equally."""
    settings = config(
        **({"lora": {"rank": lora}} if lora else {}),
        model=model or {},
        data={"train": [{"path": f"{HARD}&n=8", "share": 2.0}, {"path": f"{EASY}&n=8", "share": 3.0}]},
        method={
            "name": method,
            **({"judge": "reference", "min_correct_prefix": 0.0} if method == "scope" else {}),
        },
        rollout={"group_size": 3, "max_tokens": 48, "temperature": 2.0, "batch_size": 4},
        train={
            "problems_per_step": 5,
            "seed": 1,
            "checkpoint_every": 1,
            "updates_per_step": 1,
            "micro_batch_tokens": 300,
            "steps": 1,
            **changes,
        },
        eval={"sets": {"easy": f"{EASY}&split=test&n=3"}},
    )
    return settings.model_dump(mode="json", exclude_none=True)


def noted(processes: int, runs: dict[Path, dict[str, Any]], **environment: str) -> None:
    """Train every run, directory -> sections of its configuration, in the same processes."""
    together(processes, train_noted, runs, environment=environment)


def completions(directory: Path) -> list[Any]:
    files = directory.parent.glob(f"{directory.name}-*.tokens")
    return sorted(json.loads(line) for file in files for line in file.read_text().splitlines())


def gradients(directory: Path) -> list[torch.Tensor]:
    """The gradient of every update."""
    files = sorted(directory.parent.glob(f"{directory.name}.gradient-*"))
    return [torch.cat([each.flatten() for each in torch.load(file)]).double() for file in files]


COMPARED = ("grpo", "luffy", "scope")
UNEVEN = ("none", "idle", "curve")


def runs(kind: str) -> dict[str, dict[str, Any]]:
    """The runs of a world that is alone, or that keeps whole models (ddp), or shards beside a whole model to
    sample from (fsdp) or without one (apart)."""
    # AdamW must not make large steps of the rounding of small gradients.
    learning: dict[str, Any] = {
        "learning_rate": 1e-3,
        "epsilon": 1e-3,
        "grad_clip": 0.01,
        "micro_batch_tokens": 100,
    }
    found = {
        "none": uneven("luffy", problems_per_step=1),  # a single process has a problem
        "idle": uneven("luffy"),  # two problems have credit, see NOTED
        "curve": uneven("luffy", steps=3, **learning),
    }
    found["idle"]["method"]["entropy_bonus"] = 0.0
    del found["none"]["data"]["train"][0]
    if kind in ("alone", "apart"):
        found["score"] = uneven("sort", steps=2, **learning)
    if kind in ("alone", "ddp"):
        found |= {method: uneven(method) for method in COMPARED}
        # Each of two updates gets five of ten problems; a dead group counts in no normalizer.
        found["dead"] = uneven("grpo", problems_per_step=10, updates_per_step=2, learning_rate=1e-9)
        found["dead"]["method"]["skip_dead_groups"] = True
    if kind != "ddp":
        found["start"] = uneven("luffy", model={"gradient_checkpointing": True})
        found["lora"] = uneven("luffy", 6, steps=2, updates_per_step=5, **learning)
        for name in ("start", "lora"):
            found[name]["method"]["kl"] = 0.1
    for sections in found.values():
        sections["train"]["fsdp"] = kind in ("fsdp", "apart")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME-alone-1: the runs of one process, in float64."""
    root = tmp_path_factory.mktemp("worlds")
    noted(1, {root / f"{name}-alone-1": sections for name, sections in runs("alone").items()}, IN_FLOAT64="1")
    return root


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def processes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def worlds(alone: Path, processes: int) -> Path:
    """NAME-ddp-2, NAME-fsdp-2, ... beside NAME-alone-1: the same runs in several processes."""
    together = {
        alone / f"{name}-{kind}-{processes}": sections
        for kind in ("ddp", "fsdp", "apart")
        for name, sections in runs(kind).items()
    }
    noted(processes, together, IN_FLOAT64="1")
    return alone


@pytest.fixture
def world(kind: str, processes: int) -> str:
    return f"{kind}-{processes}"


def assert_same_gradients(one: Path, other: Path, to: float = 1e-6) -> None:
    expected, found = gradients(one), gradients(other)
    assert len(found) == len(expected) > 0
    for left, right in zip(expected, found, strict=True):
        assert left.norm() > 0 and (right - left).norm() / left.norm() < to


whole_models = pytest.mark.parametrize("kind", ["ddp"])
shards = pytest.mark.parametrize("kind", ["fsdp", "apart"])
each_kind = pytest.mark.parametrize("kind", ["ddp", "fsdp", "apart"])


@whole_models
@pytest.mark.parametrize("method", COMPARED)
def test_several_processes_give_the_samples_and_the_gradient_of_one(
    method: str, world: str, worlds: Path
) -> None:
    alone, together = worlds / f"{method}-alone-1", worlds / f"{method}-{world}"
    one = completions(alone)
    assert len({problem for _, problem, _ in one}) == 5 and len(one) == 15
    assert completions(together) == one
    assert_same_gradients(alone, together)
    assert lines(together / "evaluations.jsonl")[0] == lines(alone / "evaluations.jsonl")[0]


@whole_models
def test_several_processes_skip_the_same_dead_groups_in_several_updates(world: str, worlds: Path) -> None:
    (_, one), (_, several) = (lines(worlds / f"dead-{each}/metrics.jsonl") for each in ("alone-1", world))
    assert one["groups/dead"] and one["groups/dead"] < one["groups/all"] == 10
    counts = [key for key in one if key.startswith(("groups/", "tokens/"))]
    assert {key: several[key] for key in counts} == {key: one[key] for key in counts}
    assert_same_gradients(worlds / "dead-alone-1", worlds / f"dead-{world}")


def assert_same_curves(one: Path, other: Path, to: float = 1e-6) -> None:
    expected, found = lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert len(expected) == len(found) > 2
    for left, right in zip(expected, found, strict=True):
        assert right == {
            key: pytest.approx(value, rel=to) if isinstance(value, float) else value
            for key, value in left.items()
        }
    assert completions(other) == completions(one)
    assert_same_gradients(one, other, to)


@each_kind
def test_several_processes_give_the_curve_of_one(world: str, worlds: Path) -> None:
    """At a high learning rate, and with clipping."""
    assert lines(worlds / "curve-alone-1/metrics.jsonl")[1]["grad_norm/all"] > 0.01
    assert_same_curves(worlds / "curve-alone-1", worlds / f"curve-{world}")


@shards
def test_adapters_in_shards_give_the_curve_of_one_process(world: str, worlds: Path) -> None:
    """With several updates a step, and a distance to the model without the adapters."""
    assert_same_curves(worlds / "lora-alone-1", worlds / f"lora-{world}")


@shards
def test_shards_give_the_gradient_of_the_distance_to_the_start(world: str, worlds: Path) -> None:
    """With recomputed activations too."""
    assert_same_gradients(worlds / "start-alone-1", worlds / f"start-{world}")


@each_kind
@pytest.mark.parametrize("run", UNEVEN)
def test_a_process_without_work_waits_for_the_others(
    run: str, world: str, processes: int, worlds: Path
) -> None:
    """No problems at all; problems without credit; fewer micro-batches than the others."""
    files = [worlds / f"{run}-{world}-{rank}.batches" for rank in range(processes)]
    counted = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len(set(map(len, counted))) == 1
    own = [sum(batches for batches, _ in each) for each in counted]
    assert min(own) < max(own) and (min(own) == 0 or run == "curve")
    assert_same_gradients(worlds / f"{run}-alone-1", worlds / f"{run}-{world}")


def test_processes_without_whole_weights_score_in_turns(processes: int, worlds: Path) -> None:
    """Although they have different numbers of batches to score, or none."""
    assert_same_curves(worlds / "score-alone-1", worlds / f"score-apart-{processes}")


def score_without_memory(directory: Path) -> None:
    score = TrainablePolicy.reference_logprobs

    def failing(self: TrainablePolicy, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA out of memory")
        return score(self, *arguments)

    TrainablePolicy.reference_logprobs = failing  # type: ignore[assignment, method-assign]
    sections = uneven("grpo", fsdp=True)
    sections["method"]["terms"] = [{"name": "ace"}]
    train(Config.model_validate(sections), directory, sampler=Elsewhere)


def test_a_process_that_fails_while_all_score_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """It ends, and its launcher ends them."""
    with pytest.raises(AssertionError, match="out of memory while guiding; lower"):
        together(2, score_without_memory, tmp_path / "apart", seconds=120)


@pytest.mark.parametrize("run", ["curve", "lora"])
def test_fsdp_keeps_a_shard_of_weights_and_optimizer_state(run: str, processes: int, worlds: Path) -> None:
    for rank in range(processes):
        sharded, share = json.loads((worlds / f"{run}-fsdp-{processes}-{rank}.kept").read_text())
        assert sharded and share < 1.05 / processes
        assert json.loads((worlds / f"curve-ddp-{processes}-{rank}.kept").read_text()) == [False, 1.0]


def test_a_run_stopped_in_two_processes_continues_the_same_in_one(tmp_path: Path) -> None:
    """And on in three, with whole models, or shards with and without a whole model beside them.

    The learning rate is so small that rounding cannot distinguish the two models.
    """
    never, whole, sharded, apart = (
        tmp_path / name for name in ("never-stopped", "whole", "sharded", "apart")
    )

    def until(last: int, fsdp: bool = False) -> dict[str, Any]:
        return uneven("sort", learning_rate=1e-9, steps=last, fsdp=fsdp)

    noted(2, {whole: until(1), sharded: until(1, fsdp=True), apart: until(1, fsdp=True)})
    noted(1, {whole: until(2), sharded: until(2), apart: until(2), never: until(3)})
    noted(3, {whole: until(3), sharded: until(3, fsdp=True), apart: until(3, fsdp=True)})
    expected = moments(never)
    for stopped in (whole, sharded, apart):
        found = completions(stopped)
        assert found == completions(never) and {step for step, *_ in found} == {1, 2, 3}
        for key, value in moments(stopped).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-7)
    files = sorted((sharded / "checkpoints/step-000003").glob("optimizer*"))
    assert len(files) == 3 and max(file.stat().st_size for file in files) < 0.4 * size(never)


def moments(run: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state after the third step, from one file or several."""
    files = sorted((run / "checkpoints/step-000003").glob("optimizer*"))
    shards = [load_file(file) for file in files]
    return {
        key: torch.cat([shard[key] for shard in shards]) if value.ndim else value
        for key, value in shards[0].items()
    }


def size(run: Path) -> int:
    return (run / "checkpoints/step-000003/optimizer.safetensors").stat().st_size


class Stops(Callback):
    def before_step(self, run: Any, step: int) -> None:
        if os.environ["RANK"] == "1" and step == 2:
            run.stop("said by one")


class Fails(Scripted):
    async def credit(self, group: Group, ctx: Context) -> Group | None:
        if os.environ["RANK"] == "1":
            raise UserError("no credit for this group")
        return await super().credit(group, ctx)


def end_twice(directory: Path) -> None:
    summary = train(scripted(), directory / "stopped", method=Scripted, callbacks=[Stops()])
    said = [summary["ended_by"], summary["steps"]]
    try:
        train(scripted(), directory / "failed", method=Fails)
    except UserError as error:
        said.append(str(error))
    (directory / f"said-{os.environ['RANK']}").write_text(json.dumps(said))


def test_what_ends_one_of_two_processes_ends_both(tmp_path: Path) -> None:
    """A callback that stops the run in one process, and an error in the credit of one."""
    together(2, end_twice, tmp_path)
    said = [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in range(2)]
    assert said[0] == said[1] == ["said by one", 2, "no credit for this group"]
    assert (tmp_path / "failed/stopped.txt").read_text().count("no credit for this group") == 1
