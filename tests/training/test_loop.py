"""The real loop: what it writes, exact resumption, and that it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from handrail import Author, Context, Group, Method, Problem, Score, Trajectory, UserError, train
from handrail.methods import METHODS
from handrail.methods.base import GrpoSettings
from handrail.methods.sort import Sort
from handrail.models.trainable import TrainablePolicy
from handrail.training.config import Config
from handrail.training.update import Update
from tests.conftest import EASY, HARD, config


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory / "model").state_dict())


def small(**changes: Any) -> Config:
    sets = {"hard": f"{HARD}&split=test&n=8", "easy": f"{EASY}&split=test&n=8"}
    return config(**{"eval": {"sets": sets, "every": 2, "limit": 8}, **changes})


def test_a_run_directory_has_all_documented_files(tmp_path: Path) -> None:
    summary = train(small(train={"checkpoint_every": 1}, method={"name": "sort"}), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.toml", "contents.json", "metrics.jsonl", "timings.jsonl", "samples.jsonl",
        "evaluations.jsonl", "summary.json",
        "checkpoints", "model", "tensorboard", "versions.jsonl", ".lock",
    }  # fmt: skip
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    first = metrics[1]
    assert (
        first["groups/all"]
        == first["groups/all_wrong"] + first["groups/mixed"] + first["groups/all_right"]
        == 4
    )
    assert first["groups/guided"] == first["groups/all_wrong"] > 0
    assert first["tokens/trained"] + first["tokens/dropped"] > first["tokens/sampled"]  # plus the references
    assert {
        "reward",
        "correct",
        "groups/dead",
        "entropy",
        "truncated",
        "loss",
        "grad_norm/all",
        "grad_norm/guided",
    } <= first.keys()
    assert {"sample", "verify", "guide", "update"} <= lines(tmp_path / "run/timings.jsonl")[1].keys()
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["eval"]["hard"]["end"]["n"] == 8
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    text = AutoTokenizer.from_pretrained(tmp_path / "run/model").decode([10, 11])
    assert text == "7 8" and weights(tmp_path / "run")


def test_evaluations_keep_the_result_of_every_problem(tmp_path: Path) -> None:
    train(
        small(
            eval={
                "sets": {"hard": f"{HARD}&split=test&n=4", "easy": f"{EASY}&split=test&n=4"},
                "every": 1,
                "samples": 2,
            }
        ),
        tmp_path,
    )
    rows, metrics = lines(tmp_path / "evaluations.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["set"]) for row in rows] == [
        (step, name) for step in range(3) for name in ("hard", "easy")
    ]
    for row in rows:
        assert set(row["correct"]) == {f"{row['set']}-test-0-{n}" for n in range(4)}
        assert sum(row["correct"].values()) / 4 == metrics[row["step"]][f"eval/{row['set']}/mean"]


def test_a_run_ends_with_its_budget_of_tokens(tmp_path: Path) -> None:
    steps = {"steps": 6, "checkpoint_every": 1}
    whole = train(small(train=steps), tmp_path / "whole")
    sampled = [line["tokens/sampled"] for line in lines(tmp_path / "whole/metrics.jsonl")[1:]]
    assert (whole["ended_by"], whole["tokens_sampled"]) == ("steps", sum(sampled))
    for budget in (sum(sampled[:3]), sum(sampled[:2]) + 1):  # reached exactly, and exceeded in the same step
        summary = train(small(train={**steps, "token_budget": budget}), tmp_path / str(budget))
        assert (summary["ended_by"], summary["steps"], summary["tokens_sampled"]) == (
            "tokens",
            3,
            sum(sampled[:3]),
        )
        assert "eval/hard/mean" in lines(tmp_path / str(budget) / "metrics.jsonl")[-1]
    with pytest.raises(UserError, match="has already spent its budget of tokens"):
        train(small(train={**steps, "token_budget": budget}), tmp_path / str(budget), resume=True)
    more = train(
        small(train={**steps, "token_budget": sum(sampled[:4]) + 1}), tmp_path / str(budget), resume=True
    )
    assert more["steps"] == 5
    assert [
        line["tokens/sampled"] for line in lines(tmp_path / str(budget) / "metrics.jsonl")[1:]
    ] == sampled[:5]


def test_tokens_of_repairs_count_towards_the_budget(tmp_path: Path) -> None:
    method = {"name": "scope", "judge": "random", "corrector": "reference"}
    summary = train(
        small(method=method, train={"steps": 9, "token_budget": 1500, "updates_per_step": 1}),
        tmp_path / "run",
    )
    steps = lines(tmp_path / "run/metrics.jsonl")[1:]
    own, repairs = (sum(step.get(f"tokens/{kind}", 0) for step in steps) for kind in ("sampled", "resampled"))
    assert repairs > 0 and summary["ended_by"] == "tokens"
    assert summary["tokens_sampled"] == own + repairs >= 1500
    last = steps[-1]["tokens/sampled"] + steps[-1]["tokens/resampled"]
    assert own + repairs - last < 1500


@pytest.mark.parametrize("budget", [{}, {"token_budget": 1}])
def test_a_run_stopped_after_its_last_checkpoint_is_finished_on_resuming(
    tmp_path: Path, budget: dict[str, int]
) -> None:
    settings = small(train={"checkpoint_every": 1, **budget})
    summary = train(settings, tmp_path)
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "model")
    again = train(settings, tmp_path, resume=True)
    assert again == summary and (tmp_path / "model").exists()


def test_a_prolonged_run_killed_before_its_end_is_finished_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small(train={"steps": 1, "checkpoint_every": 1}), tmp_path)
    longer = small(train={"steps": 2, "checkpoint_every": 1})
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(TrainablePolicy, "save", lambda *_: 1 / 0)
        train(longer, tmp_path, resume=True)
    assert train(longer, tmp_path, resume=True)["steps"] == 2


def test_a_run_ends_with_its_budget_of_seconds(tmp_path: Path) -> None:
    summary = train(small(train={"steps": 500, "seconds_budget": 0.7}), tmp_path)
    timings = lines(tmp_path / "timings.jsonl")
    figures = [
        line[part]
        for line in timings[1:-1]
        for part in ("sample", "verify", "guide", "update")
        if part in line
    ]
    before = sum(figures) - 5e-5 * len(figures)  # each is rounded to a tenth of a millisecond
    assert summary["ended_by"] == "seconds" and before < 0.7 <= summary["seconds"] + 0.01


def test_samples_have_the_author_and_weight_of_each_token(tmp_path: Path) -> None:
    train(small(method={"name": "sort"}, train={"steps": 1}), tmp_path / "sort")
    rows = lines(tmp_path / "sort/samples.jsonl")
    references = [row for row in rows if row["role"] == "imitated"]
    assert references
    for row in references:
        assert set(row["author"]) == {"reference"} and len(row["author"]) == len(row["tokens"]) == len(
            row["gradient_weight"]
        )
        assert (
            row["tokens"][-1] == "<eos>"
            and min(row["gradient_weight"]) > 0
            and max(row["gradient_weight"]) <= 1
        )
    train(small(method={"name": "luffy"}, train={"steps": 1}), tmp_path / "luffy")
    rows = lines(tmp_path / "luffy/samples.jsonl")
    references = [row for row in rows if row["author"][0] == "reference"]
    assert len(references) == 4 and len(rows) == 16
    for row in references:
        assert max(row["gradient_weight"]) <= 0.25 + 1e-6 and set(row["advantage"]) < {0.25, 0.5, 0.75}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_in_the_loop_and_changes_the_model(name: str, tmp_path: Path) -> None:
    needs_signal = ("grpo", "scope", "dmpo", "npo", "autonpo", "int", "calibrl")
    changes: dict[str, Any] = {"data": {"train": f"{EASY}&n=64"}} if name in needs_signal else {}
    answer = '{"id": "easy-train-0-0", "answers": [{"tokens": [5], "logp": [-1.0], "text": "2"}]}'
    (tmp_path / "answers.jsonl").write_text("{}\n" + answer + "\n")
    needed = {"cache": str(tmp_path / "answers.jsonl")} if name == "npo" else {}
    hot = {"group_size": 4, "max_tokens": 48, "temperature": 2.0}
    changes |= {"experts": {"teacher": "builtin:house-tiny"}} if name == "tgpo" else {}
    train(
        config(
            method={"name": name, **needed},
            train={"steps": 3, "samples_every": 0, "checkpoint_every": 1},
            rollout=hot,
            **changes,
        ),
        tmp_path / "run",
    )
    before = AutoModelForCausalLM.from_pretrained(
        "handrail/models/builtin/house-tiny", dtype=torch.float32
    ).state_dict()
    after = weights(tmp_path / "run")
    assert any((before[key] - after[key]).abs().max() > 1e-5 for key in before)


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ({"name": "luffy"}, {}),
        ({"name": "sort", "weights": "random"}, {}),
        ({"name": "sort"}, {"token_budget": 5000}),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    method: dict[str, Any], budget: dict[str, int], tmp_path: Path
) -> None:
    schedule = {"schedule": "cosine", "warmup_steps": 2, "updates_per_step": 2}
    settings = small(
        method=method,
        train={"steps": 5, "checkpoint_every": 2, **schedule, **budget},
        eval={"sets": {"easy": f"{EASY}&split=test&n=4"}, "every": 2},
    )
    train(settings, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after(step: int, steps: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        if step == 3:  # a step after the checkpoint, which must be discarded
            raise Stop

    with pytest.raises(Stop):
        train(settings, tmp_path / "parts", progress=stop_after)
    assert len(lines(tmp_path / "parts/metrics.jsonl")) == 4
    with (tmp_path / "parts/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "gro')  # as if killed while writing
    earlier = {**lines(tmp_path / "parts/versions.jsonl")[0], "torch": "2.0"}
    (tmp_path / "parts/versions.jsonl").write_text(json.dumps(earlier) + "\n")
    train(settings, tmp_path / "parts", resume=True)
    assert lines(tmp_path / "parts/versions.jsonl") == [
        earlier,
        {**lines(tmp_path / "whole/versions.jsonl")[0], "step": 3},
    ]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    settings = small(train={"steps": 2, "checkpoint_every": 0})
    train(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(UserError, match="a finished run without checkpoints"):
        train(settings, tmp_path / "again", resume=True)
    (tmp_path / "again/summary.json").unlink()
    train(settings, tmp_path / "again", resume=True)
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_finished_directory_is_not_overwritten(tmp_path: Path) -> None:
    settings = small(train={"steps": 1})
    train(settings, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        train(settings, tmp_path / "run")


def test_a_run_is_resumed_only_with_its_own_configuration_but_may_be_prolonged(tmp_path: Path) -> None:
    train(small(train={"steps": 2, "checkpoint_every": 1}), tmp_path / "run")
    with pytest.raises(UserError, match="holds a run of another configuration"):
        train(small(train={"steps": 3, "checkpoint_every": 1, "seed": 5}), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="is already at step 2"):
        train(small(train={"steps": 2, "checkpoint_every": 1}), tmp_path / "run", resume=True)
    assert (
        train(small(train={"steps": 3, "checkpoint_every": 1}), tmp_path / "run", resume=True)["steps"] == 3
    )


def test_a_run_that_ran_out_of_memory_can_be_resumed_with_smaller_batches(tmp_path: Path) -> None:
    settings = {"train": {"steps": 1, "checkpoint_every": 1}, "method": {"name": "luffy"}}
    train(small(**settings), tmp_path / "run")
    less = {
        "train": {"steps": 2, "checkpoint_every": 1, "micro_batch_tokens": 200},
        "model": {"gradient_checkpointing": True},
        "rollout": {"batch_size": 3},
        "sampler": {"cache_gib": 1.0},
    }
    assert train(small(**{**settings, **less}), tmp_path / "run", resume=True)["steps"] == 2


def test_a_step_without_signal_has_a_note_and_leaves_the_model_unchanged(tmp_path: Path) -> None:
    notes: list[str] = []
    settings = small(
        train={"steps": 4, "problems_per_step": 1},
        rollout={"group_size": 2, "max_tokens": 48},
        eval={"sets": {}},
    )
    train(
        settings,
        tmp_path / "run",
        progress=lambda step, steps, metrics, seconds: notes.append(metrics.get("note", "")),
    )
    assert "no signal: 1 of 1 groups all wrong" in notes
    assert (
        "loss" not in lines(tmp_path / "run/metrics.jsonl")[notes.index("no signal: 1 of 1 groups all wrong")]
    )


def test_warm_up_also_applies_to_a_constant_schedule(tmp_path: Path) -> None:
    changed = {}
    for warmup in (0, 1000):
        settings = small(
            method={"name": "sft"}, train={"steps": 2, "warmup_steps": warmup}, eval={"sets": {}}
        )
        train(settings, tmp_path / str(warmup))
        before = AutoModelForCausalLM.from_pretrained(
            "handrail/models/builtin/house-tiny", dtype=torch.float32
        ).state_dict()
        after = weights(tmp_path / str(warmup))
        changed[warmup] = max(float((before[key] - after[key]).abs().max()) for key in before)
    assert changed[1000] < 0.01 * changed[0]


def test_a_learning_rate_falls_with_the_tokens_of_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    budget = {"steps": 50, "token_budget": 2000, "schedule": "linear", "learning_rate": 1e-3}
    train(small(method={"name": "sort"}, train=budget, eval={"sets": {}}), tmp_path / "run")
    sampled = [0, *(line["tokens/sampled"] for line in lines(tmp_path / "run/metrics.jsonl")[1:])]
    assert len(rates) == len(sampled) - 1 > 2
    assert rates == pytest.approx([1e-3 * (1 - before / 2000) for before in accumulate(sampled[:-1])])
    assert [line["learning_rate"] for line in lines(tmp_path / "run/metrics.jsonl")[1:]] == rates


PARTIAL = """
import zlib
def alike(problem, completion): return 0.1
def unlike(problem, completion): return zlib.crc32(completion.encode()) / 2**33
"""


@pytest.mark.parametrize(("verifier", "dead"), [("alike", 4), ("unlike", 0)])
def test_wrong_rollouts_are_wrong_whatever_their_reward(verifier: str, dead: int, tmp_path: Path) -> None:
    (tmp_path / "partial.py").write_text(PARTIAL)
    graded = {"name": f"{tmp_path}/partial.py:{verifier}", "extract": None}
    settings = small(
        verifier=graded,
        method={"name": "sft-on-failures"},
        rollout={"require_end": False},
        train={"steps": 1},
        eval={"sets": {}},
    )
    train(settings, tmp_path / "run")
    metrics = lines(tmp_path / "run/metrics.jsonl")[1]
    assert [metrics[f"groups/{kind}"] for kind in ("all_wrong", "mixed", "all_right", "guided", "dead")] == [
        4,
        0,
        0,
        4,
        dead,
    ]
    assert metrics["correct"] == 0 < metrics["reward"] and metrics["diversity/correct_derivations"] == 0
    rollouts = [row for row in lines(tmp_path / "run/samples.jsonl") if row["role"] == "trajectory"]
    assert {row["correct"] for row in rollouts} == {False}


RAISING = """
def boom(problem, completion): return float(problem["answer"] == completion)
def negative(problem, completion): return -1.0
def half(problem, completion): return 0.5
def some(problem, completion): return boom(problem, completion) if len(completion) % 2 else 0.0
"""


def graded_by(function: str, directory: Path, **changes: Any) -> Config:
    (directory / "raising.py").write_text(RAISING)
    verifier = {"name": f"{directory}/raising.py:{function}", "extract": None}
    return small(**{"verifier": verifier, "rollout": {"require_end": False}, "eval": {"sets": {}}, **changes})


@pytest.mark.parametrize(
    ("function", "text"), [("boom", "subscriptable"), ("negative", "-1.0, which is not between 0 and 1")]
)
def test_a_verifier_that_always_fails_stops_the_run_with_a_checkpoint_and_its_text(
    function: str, text: str, tmp_path: Path
) -> None:
    said: list[str] = []
    easy = f"{EASY}&n=64"
    settings = graded_by(
        function,
        tmp_path,
        data={"train": easy},
        train={"steps": 9, "problems_per_step": 4, "samples_every": 0},
    )
    (tmp_path / "bare.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + 1 ?", "answer": "1"}) + "\n" for n in range(8))
    )
    bare = settings.model_copy(update={"data": config(data={"train": str(tmp_path / "bare.jsonl")}).data})
    with pytest.raises(UserError, match=f"reached no verdict on 32 of 32 .*{text}.*step 1 is checkpointed"):
        train(
            bare,
            tmp_path / "run",
            progress=lambda step, steps, metrics, seconds: said.append(metrics.get("warning", "")),
        )
    assert text in said[1] and "bare.jsonl, line" in said[1]
    assert (
        text in lines(tmp_path / "run/metrics.jsonl")[1]["warning"]
        and text in (tmp_path / "run/stopped.txt").read_text()
    )
    with pytest.raises(
        UserError, match=f"{text}.*nothing has been trained yet"
    ):  # the references already show it
        train(settings, tmp_path / "referenced")


def test_unverified_held_out_completions_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    held_out = {"sets": {"hard": f"{HARD}&split=test&n=4"}, "samples": 8}
    train(graded_by("some", tmp_path, eval=held_out, train={"steps": 1}), tmp_path / "run")
    first, *_ = lines(tmp_path / "run/metrics.jsonl")
    assert (
        0 < first["eval/hard/unverified"] < 32
        and first["eval/hard/mean"] == 0
        and "subscriptable" in first["warning"]
    )
    train(graded_by("half", tmp_path, eval=held_out, train={"steps": 1}), tmp_path / "half")
    first, *_ = lines(tmp_path / "half/metrics.jsonl")
    assert (first["eval/hard/mean"], first["eval/hard/reward"]) == (
        0,
        0.5,
    ) and "eval/hard/unverified" not in first


class BestOnly(Method[GrpoSettings]):
    """A method that trains only on the best rollouts of a group."""

    async def credit(self, group: Group, ctx: Context) -> Group:
        ctx.counts["best/groups"] += 1
        return group.map(
            lambda member: member.with_advantage(float(member.reward == 1 and not group.all_right))
        )


def test_a_users_method_trains_without_changes_to_the_package(tmp_path: Path) -> None:
    settings = small(
        data={"train": f"{EASY}&n=64"}, rollout={"group_size": 4, "max_tokens": 48, "temperature": 2.0}
    )
    summary = train(settings, tmp_path / "run", method=BestOnly)
    assert (summary["method"], summary["status"]) == ("BestOnly", "yours")
    assert 'name = "tests.training.test_loop:BestOnly"' in (tmp_path / "run/config.toml").read_text()
    assert lines(tmp_path / "run/metrics.jsonl")[1]["best/groups"] == 4


def test_the_readmes_method_trains_from_a_configuration(tmp_path: Path) -> None:
    train(
        small(method={"name": "examples/my_method.py:RepairWhenStuck", "clip_high": 0.28}), tmp_path / "run"
    )
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert metrics[1]["groups/guided"] == metrics[1]["groups/all_wrong"] > 0


def test_the_share_of_easy_problems_is_kept_in_every_step(tmp_path: Path) -> None:
    sources = [{"path": f"{HARD}&n=64", "share": 3.0}, {"path": f"{EASY}&n=64"}]
    train(small(data={"train": sources}, method={"name": "luffy"}), tmp_path / "run")
    for step in (1, 2):
        problems = {row["problem"] for row in lines(tmp_path / "run/samples.jsonl") if row["step"] == step}
        assert sorted(problem.split("-")[0] for problem in problems) == ["easy", "hard", "hard", "hard"]


async def written(group: Group, texts: Sequence[str], ctx: Context) -> Group:
    """Return the group with fixed rollouts, so that any number of processes, on any machine, sees the same
    ones."""
    rollouts = []
    for text in texts:
        rollout = Trajectory.by(
            Author.POLICY, ctx.renderer.prompt(group.problem), ctx.renderer.completion(text), text
        )
        logp = await Score(rollout.prompt_ids, rollout.token_ids)
        rollouts.append(rollout.with_columns(sampling_logp=logp, old_logp=logp))
    return replace(group, trajectories=rollouts)


def script(problem: Problem) -> list[str]:
    solved = problem.references if int(problem.id.rsplit("-")[-1]) % 2 else ("# 3",)
    return ["1 + 1 = 2 # 2", *solved, "7 * 2 = 14 ; 14 - 3 = 11 # 14 11"]


class Scripted(Sort):
    """SORT with fixed rollouts."""

    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        return await super().reward(await written(group, script(group.problem), ctx), ctx)


class Copies(Sort):
    """Of two copies of a problem, one fails; each group becomes two, and each of them gets the repair."""

    def samples(self, problem: Problem) -> int:
        return 0

    async def reward(self, group: Group, ctx: Context) -> Group:
        solved = group.problem.references if ctx.counts[f"seen/{group.problem.id}"] else ()
        ctx.counts[f"seen/{group.problem.id}"] += 1
        return await super().reward(await written(group, ["# 2", "# 3", *solved], ctx), ctx)

    async def guide(self, group: Group, ctx: Context) -> list[Group]:  # type: ignore[override]
        guided = await super().guide(group, ctx)
        return [replace(guided, trajectories=[half, *guided.imitated]) for half in guided.baseline[:2]]


def test_guided_groups_are_counted_once_each_whatever_their_problems_are_called(tmp_path: Path) -> None:
    train(
        small(
            data={"train": f"{HARD}&n=2"}, method={"name": "sort", "repair": "all"},
            train={"updates_per_step": 2}, eval={"sets": {}},
        ),
        tmp_path / "run",
        method=Copies,
    )  # fmt: skip
    for row in lines(tmp_path / "run/metrics.jsonl")[1:]:
        assert row["groups/all"] == 4 and row["groups/guided"] == row["groups/all_wrong"] == 2


class Mends(Sort):
    """SORT that counts as a method of one's own would that repairs."""

    async def guide(self, group: Group, ctx: Context) -> Group:
        guided = await super().guide(group, ctx)
        ctx.counts["mends/partly_right"] += 2
        ctx.counts["mends/repaired"] += 1
        return guided


def test_the_summary_tells_what_any_method_salvages(tmp_path: Path) -> None:
    assert (
        train(small(train={"steps": 1}, eval={"sets": {}}), tmp_path / "mine", method=Mends)["salvaged"]
        == 0.5
    )
    assert train(small(train={"steps": 1}, eval={"sets": {}}), tmp_path / "grpo")["salvaged"] is None


def runs_out_of_memory(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """Let the ``call``-th call of a method end as on a full GPU, and those after it work again."""
    whole, calls = getattr(where, name), count(1)

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(*args, **kwargs)

    monkeypatch.setattr(where, name, full)


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (7, 2)])
def test_a_step_that_runs_out_of_memory_in_its_update_loses_no_step_before_it(
    call: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # i-MENTOR's networks are made and trained right before the update, so their state must go back too.
    settings = small(
        method={"name": "luffy", "terms": [{"name": "imentor"}]},
        train={"steps": 4, "checkpoint_every": 0, "micro_batch_tokens": 400},
    )
    train(settings, tmp_path / "whole")  # 3 micro-batches in step 1, then 2 in each
    runs_out_of_memory(monkeypatch, Update, "loss", call)
    with pytest.raises(UserError, match=f"out of memory while updating; .*step {kept} is checkpointed"):
        train(settings, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == [f"step-{kept:06d}"]
    train(settings, tmp_path / "parts", resume=True)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("where", "name", "call"), [(AdamW, "step", 1), (Update, "samples", 4)])
def test_a_step_whose_weights_may_have_changed_is_not_checkpointed(
    where: Any, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(
        method={"name": "luffy"}, train={"steps": 2, "checkpoint_every": 0, "updates_per_step": 2}
    )
    runs_out_of_memory(monkeypatch, where, name, call)
    with pytest.raises(UserError, match="resumed from its last checkpoint$"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()
