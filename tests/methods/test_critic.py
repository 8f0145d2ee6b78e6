"""STRIDE's critic that is the policy: critiques, their rewards and weights, the schedule, and a run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file

from handrail import Group, Problem, TrainablePolicy, Trajectory, UserError, train
from handrail._util.files import sums
from handrail.engines.local import LocalEngine
from handrail.experts.conversations import read_critique
from handrail.methods import build
from handrail.methods import critic as critic_module
from handrail.methods.context import Context
from handrail.methods.requests import Generate, Pending, drive
from handrail.methods.stride import Stride
from handrail.models.builtin import locate
from handrail.models.config import RolloutConfig
from handrail.training.policies import require_trainable
from handrail.training.update import Update
from handrail.types.trajectory import Author
from handrail.verifiers.config import VerifierConfig
from handrail.verifiers.pool import VerifierPool
from tests.conftest import EASY, config, policy_of
from tests.forks import together
from tests.methods.terms.scripted import lines, state
from tests.tiny_models import save_chat_model

PROBLEM = Problem("p", "What is 2 + 3 * 4?", "14")
STEPS = ["3 * 4 = 12\n", "2 + 12 = 15\n", "so 15"]
RIGHT, WRONG = "CORRECT", "INCORRECT"


def make(**settings: Any) -> Stride:
    method = build({"name": "stride", "judge": "policy", **settings}, RolloutConfig(group_size=4))
    assert isinstance(method, Stride)
    return method


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> TrainablePolicy:
    """A policy that can read the question for a critique."""
    return policy_of(save_chat_model(tmp_path_factory.mktemp("model"), context=4096))


def solution(correct: bool | None, text: str = "".join(STEPS)) -> Trajectory:
    reward = math.nan if correct is None else float(correct)
    return replace(Trajectory.by(Author.POLICY, [5], [6], text), correct=correct, reward=reward)


def critique(*judgments: str, verdict: str | None = None) -> str:
    named = [f"{number}: {judgment}" for number, judgment in enumerate(judgments, 1)]
    return "\n".join([*named, f"verdict: {verdict}"] if verdict else named)


def guided(
    method: Stride, group: Group, written: Sequence[str], policy: TrainablePolicy, step: int = 1,
    longest: int | None = None,
) -> tuple[list[Group], list[Generate], Context]:  # fmt: skip
    """Guide with these critiques; whatever is sampled afterwards is wrong."""
    asked: list[Generate] = []
    ctx = Context(policy.renderer, 64, longest, step)

    def answer(pending: list[Pending]) -> list[Any]:
        requests = [each.request for each in pending]
        if not isinstance(requests[0], Generate):
            return [replace(each.trajectory, correct=False, reward=0.0) for each in requests]
        asked.extend(requests)
        texts = [written if each is asked[0] else ["15"] * each.n for each in requests]
        return [
            [Trajectory.by(Author.POLICY, each.prompt_ids, [7], text) for text in own]
            for each, own in zip(requests, texts, strict=True)
        ]

    (found,) = drive([(("guide",), method.guide(group, ctx))], answer)
    return found if isinstance(found, list) else [found], asked, ctx


@pytest.mark.parametrize(
    ("text", "judged", "verdict"),
    [
        ("1: CORRECT\n2: INCORRECT\nverdict: INCORRECT", [True, False], False),
        ("**Step 1:** correct\n- 2. incorrect\n**Verdict:** CORRECT", [True, False], True),
        ("<think>verdict: CORRECT</think>1: CORRECT\n2: CORRECT", [True, True], None),
        ("1: CORRECT\nverdict: INCORRECT", None, False),
        ("2: CORRECT\n1: CORRECT\nverdict: CORRECT\nverdict: CORRECT", None, True),
        ("1: CORRECT\n2: CORRECT\n2: CORRECT", None, None),
        ("1: CORRECTLY\n2: CORRECT", None, None),
        ("verdict: CORRECT\nverdict: INCORRECT", None, None),
        ("", None, None),
    ],
)
def test_how_a_critique_is_read(text: str, judged: list[bool] | None, verdict: bool | None) -> None:
    assert read_critique(text, 2) == (judged, verdict)


def test_critiques_are_a_group_on_their_own_prompt_with_rewards_by_hand(reader: TrainablePolicy) -> None:
    """For a wrong solution: a right verdict and the form, each alone, and neither; a verdict is needed."""
    written = [
        critique(RIGHT, WRONG, WRONG, verdict=WRONG),
        critique(verdict=WRONG),
        critique(RIGHT, RIGHT, RIGHT, verdict=RIGHT),
        critique(RIGHT, WRONG, WRONG),
        critique(RIGHT, verdict=RIGHT),
    ]
    group = Group(PROBLEM, [solution(None), solution(False), solution(True)])
    (found,), (asked,), ctx = guided(make(), group, written, reader)
    assert [each.reward for each in found.trajectories] == [1.8, 1.0, 0.8, 0.0, 0.0]
    assert [each.correct for each in found.trajectories] == [True, True, False, False, False]
    assert asked.n == 5 and {tuple(each.prompt_ids) for each in found.trajectories} == {
        tuple(asked.prompt_ids)
    }
    prompt = reader.tokenizer.decode(asked.prompt_ids)
    assert PROBLEM.prompt in prompt and "<step_2>\n2 + 12 = 15\n</step_2>" in prompt
    assert found.problem is PROBLEM and make().observe(found) == (False, 5)
    assert ctx.counts["stride/critiques"] == 5 and ctx.counts["stride/right_verdicts"] == 2
    (right,), _, _ = guided(make(), Group(PROBLEM, [solution(True)]), written, reader)
    assert [each.reward for each in right.trajectories] == [0.8, 0.0, 1.8, 0.0, 1.0]
    assert make().observe(right) == (True, 5) and make().observe(group) is None


def test_a_critic_step_without_a_solution_or_without_room_trains_nothing(reader: TrainablePolicy) -> None:
    for group, longest, count in (
        (Group(PROBLEM, [solution(None)]), None, "stride/nothing_to_judge"),
        (Group(PROBLEM, [solution(False, " ")]), None, "stride/nothing_to_judge"),
        (Group(PROBLEM, [solution(False)]), 100, "stride/too_long"),
    ):
        (found,), asked, ctx = guided(make(), group, [], reader, longest=longest)
        assert not found.trajectories and not asked and ctx.counts[count] == 1


def test_class_weights_by_hand() -> None:
    method = make()
    method.learn([(True, 100), (False, 64), (True, 92)])
    assert method.weights == pytest.approx([1.4641, 0.8453], abs=5e-5)
    resumed = make()
    resumed.load_state(json.loads(json.dumps(method.state())))
    for each in (method, resumed):
        each.learn([(True, 128), (False, 128)])
        assert each.sizes == pytest.approx([76.8, 179.2])
        assert each.weights == pytest.approx([1.2087, 0.7913], abs=5e-5)
        each.learn([])  # a step that trains the generator
        assert each.sizes == pytest.approx([76.8, 179.2])


def test_only_the_advantages_of_critiques_are_weighted(reader: TrainablePolicy) -> None:
    """Rewards 1 and 0: advantages ±.5 / (.7071 + 1e-4) = ±.7070; the solution was wrong, weight 1.4641."""
    method, ctx = make(), Context(reader.renderer, 64)
    method.learn([(True, 192), (False, 64)])
    plain = Group(PROBLEM, [solution(True), solution(False)])
    for group, expected in ((plain, 0.7070), (replace(plain, notes={"critic": (False, 2)}), 1.0351)):
        (credited,) = drive([(("credit",), method.credit(group, ctx))], lambda pending: [])
        values = [float(each.column("advantage")) for each in credited.trajectories]
        assert values == pytest.approx([expected, -expected], abs=1e-4)


def test_anchors_come_from_the_first_whole_critique_that_finds_a_wrong_solution_wrong(
    reader: TrainablePolicy,
) -> None:
    written = [
        critique(WRONG, WRONG, WRONG, verdict=RIGHT),
        critique(WRONG, verdict=WRONG),
        critique(RIGHT, WRONG, RIGHT, verdict=WRONG),
        critique(WRONG, WRONG, WRONG, verdict=WRONG),
        "",
    ]
    method, group = make(go_on="add", correct_it="mend {step}"), Group(PROBLEM, [solution(False)])
    (critiques, *anchors), (_, *asked), ctx = guided(method, group, written, reader, step=52)
    renderer = reader.renderer
    assert [each.prompt_ids for each in asked] == [
        renderer.prompt(PROBLEM, "add"),
        renderer.prompt(PROBLEM, "mend 2 + 12 = 15") + renderer.completion(STEPS[0], end=False),
    ]
    assert len(anchors) == 2 == ctx.counts["stride/anchors"] and make().observe(critiques) == (False, 5)
    assert all(make().observe(each) is None and each.trajectories[0].text == "15" for each in anchors)
    for right, texts in ((True, written), (False, written[:2] + written[4:])):
        found, _, _ = guided(method, Group(PROBLEM, [solution(right)]), texts, reader, step=52)
        assert len(found) == 1


def test_the_schedule_by_hand() -> None:
    """40 critic steps, then 3 generator steps to 1; anchors in every third of these, 33 in 440 steps."""

    class Recorded(Stride):
        async def critiqued(self, group: Group, ctx: Context) -> tuple[Group, list[Any]]:
            judged: list[tuple[str, float | None]] = [
                (step, float(place < 2)) for place, step in enumerate(STEPS)
            ]
            attempt = self.cut(PROBLEM, replace(solution(False), judged=judged), ctx)
            return Group(PROBLEM), [attempt]

        async def anchor(self, group: Group, attempt: Any, length: int, ctx: Context) -> Group:
            return group

    method, group = Recorded(Stride.Settings(judge="policy")), Group(PROBLEM, [solution(False)])
    critics: list[int] = []
    refining = []
    for step in range(1, 441):
        ctx = Context(None, 64, step=step)  # type: ignore[arg-type]  # nothing is rendered
        (found,) = drive([(("guide",), method.guide(group, ctx))], lambda pending: [])
        if isinstance(found, list):
            refining.append((step, len(critics)))
        critics += [step] if found is not group else []
    assert critics[:43] == [*range(1, 41), 44, 48, 52] and len(critics) == 140
    assert refining[:3] == [(52, 42), (64, 45), (76, 48)] and len(refining) == 33


def test_terms_are_refused_beside_a_critic_that_is_trained() -> None:
    with pytest.raises(UserError, match="^method.terms: terms act on solutions, .*name another judge"):
        make(terms=[{"name": "ace"}])
    assert make().experts == {"corrector": "reference"}
    assert make(judge="arithmetic", terms=[{"name": "ace"}]).experts["judge"] == "arithmetic"


FREQUENT = {"problems_per_step": 8, "checkpoint_every": 1, "keep_last": 3}


def asked(problem: Problem, steps: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": str(problem.prompt)}]


def read(text: str, steps: int) -> tuple[list[bool] | None, bool | None]:
    number = crc32(text.encode())
    verdict = number % 2 == 0
    return [verdict] * steps if number % 4 < 2 else None, verdict


def run(
    directory: Path,
    judge: str,
    steps: int = 3,
    resume: bool = False,
    train_section: Mapping[str, Any] | None = None,
    **sections: Any,
) -> None:
    """Steps 1 and 3 train critiques, step 3 anchors beside them, and step 2 the solutions.

    The backbone cannot read English: a critique is a solution, and its checksum its verdict.
    """
    method = {"name": "stride", "judge": judge, "warm_up": 1, "critic_every": 2, "first": 3, "every": 2}
    settings = config(
        data={"train": f"{EASY}&n=64"},
        rollout={"temperature": 3.0},
        method={**method, "go_on": "", "correct_it": ""},
        train={"steps": steps, **FREQUENT, **(train_section or {})},
        **sections,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critic_module, "critique_conversation", asked)
        patch.setattr(critic_module, "read_critique", read)
        train(settings, directory, resume=resume)


@pytest.mark.parametrize("judge", ["policy", "critic"])
def test_a_resumed_run_equals_an_uninterrupted_one(judge: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, judge)
    run(parts, judge, steps=2)
    run(parts, judge, resume=True)
    steps = lines(whole / "metrics.jsonl")[1:]
    assert steps == lines(parts / "metrics.jsonl")[1:]
    samples = lines(whole / "samples.jsonl")
    assert samples == lines(parts / "samples.jsonl")
    assert {row.get("model") for row in samples if row["step"] == 1} == {None if judge == "policy" else judge}
    assert {row.get("model") for row in samples if row["step"] == 2} == {None}
    last = "checkpoints/step-000003"
    assert state(whole / last) == state(parts / last)
    assert {*sums(whole / last)} == {*sums(parts / last)}
    for file in (whole / last).rglob("*.safetensors"):
        assert file.read_bytes() == (parts / last / file.relative_to(whole / last)).read_bytes()
    sizes = state(whole / last)[0]["method"]["sizes"]
    assert all(sizes) and sum(sizes) == pytest.approx(40)
    assert [row.get("stride/critiques", 0) for row in steps] == [40, 0, 40]
    trained = {"policy": [[""], [""], [""]], "critic": [["critic/"], [""], ["", "critic/"]]}[judge]
    for row, models in zip(steps, trained, strict=True):
        assert [row.get(f"{model}grad_norm/all", 0) > 0 for model in ("", "critic/")] == [
            model in models for model in ("", "critic/")
        ]
        assert "note" not in row
    assert [row.get("stride/anchors", 0) > 0 for row in steps] == [False, False, True]


def test_a_second_model_learns_what_the_policy_would_have_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    """Both start from the same model, and step 1 trains critiques alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, "policy")
    run(two, "critic")

    def weights(path: str | Path) -> dict[str, torch.Tensor]:
        return load_file(Path(path) / "model.safetensors")

    start = locate(config().model.path)
    first = [each / "checkpoints/step-000001" for each in (one, two)]
    assert same(weights(first[1] / "critic/model"), weights(first[0] / "model"))
    assert same(weights(first[1] / "model"), weights(start))
    assert same(weights(two / "critic"), weights(two / "checkpoints/step-000003/critic/model"))
    assert not same(weights(two / "critic"), weights(first[1] / "critic/model"))
    assert not same(weights(two / "model"), weights(start))
    assert TrainablePolicy(str(two / "critic")).renderer.vocabulary  # it loads like any model
    again = tmp_path / "again"
    run(again, "critic", steps=1, experts={"critic": str(two / "critic")})
    assert not same(weights(again / "critic"), weights(first[1] / "critic/model"))
    assert same(weights(again / "model"), weights(start))


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})


def test_two_models_in_two_processes_train_like_in_one(tmp_path: Path) -> None:
    run(tmp_path / "one", "critic")
    together(2, run, tmp_path / "two", "critic")
    for left, right in zip(
        *(lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True
    ):
        assert left.keys() == right.keys()
        for key, value in left.items():
            known = value is None or isinstance(value, str)
            assert right[key] == (value if known else pytest.approx(value, rel=1e-3, abs=1e-6)), key


def test_what_a_second_model_does_not_work_with_is_one_sentence(
    reader: TrainablePolicy, tmp_path: Path
) -> None:
    short = shutil.copytree(locate(config().model.path), tmp_path / "short")
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 80}))
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"sampler": {"name": "vllm"}},
            "stride trains a critic beside the policy, .* FSDP, vLLM or --samplers",
        ),
        ({"experts": {"critic": str(tmp_path / "none")}}, "^experts.critic: .*none"),
        ({"experts": {"critic": reader.config.path}}, "^experts.critic: .*the policy's tokenizer"),
        ({"experts": {"critic": str(short)}}, "^experts.critic: the context of .*; choose a critic that can"),
    ]
    for sections, said in refused:
        with pytest.raises(UserError, match=said):
            run(tmp_path / "run", "critic", **sections)
    with pytest.raises(UserError, match='--samplers; leave them out, or set method.judge = "policy"'):
        require_trainable(config(), make(judge="critic"), samples_elsewhere=True)

    class Verifying(Stride):
        trained = frozenset({"verifier"})

    with pytest.raises(
        UserError, match="trains 'verifier'; besides the policy, only \"critic\" can be trained"
    ):
        require_trainable(config(), Verifying(), samples_elsewhere=False)


def test_a_second_model_with_adapters(tmp_path: Path) -> None:
    """Each model has its own adapter, and KL is to its own start, which is the model without it."""
    run(tmp_path / "run", "critic", steps=2, lora={"rank": 2})
    critic, policy = (
        load_file(tmp_path / f"run/{name}/adapter_model.safetensors") for name in ("critic", "model")
    )
    assert critic.keys() == policy.keys() and not same(critic, policy)
    first, second = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert first["critic/grad_norm/all"] > 0 and second["grad_norm/all"] > 0


def test_a_second_model_that_computes_in_bfloat16_in_several_updates_a_step(tmp_path: Path) -> None:
    """Each model has a copy to sample from, and is asked for the log-probabilities of its own samples."""
    model = {"path": config().model.path, "device": "cpu", "dtype": "bfloat16"}
    run(tmp_path / "run", "critic", train_section={"updates_per_step": 2}, model=model)
    first, second, third = lines(tmp_path / "run/metrics.jsonl")[1:]
    assert 0 < first["critic/importance/mean"] < 2 and "importance/mean" not in first
    assert 0 < second["importance/mean"] < 2 and "critic/importance/mean" not in second
    assert {"importance/mean", "critic/importance/mean"} <= third.keys()


def test_a_second_model_without_a_finite_gradient_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps between, in which the policy alone learns, do not count for it."""
    loss = Update.loss

    def spoiled(self: Update, batch: Any) -> torch.Tensor:
        found: torch.Tensor = loss(self, batch)
        return found if self.policy.field == "model.path" else found * math.nan

    monkeypatch.setattr(Update, "loss", spoiled)
    critic = {"critic": locate(config().model.path)}
    with pytest.raises(
        UserError, match="no finite gradient in 2 updates in a row, the last in step 3.*critic"
    ):
        run(tmp_path / "run", "critic", train_section={"max_skipped_updates": 2}, experts=critic)
    assert {row["step"] for row in lines(tmp_path / "run/skipped.jsonl")} == {1, 3}


def test_a_critic_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    critic = shutil.copytree(locate(config().model.path), tmp_path / "critic")
    run(tmp_path / "run", "critic", steps=1, experts={"critic": str(critic)})
    weights = load_file(critic / "model.safetensors")
    save_file(
        {name: 0 * value for name, value in weights.items()}, critic / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="experts.critic"):
        run(tmp_path / "run", "critic", resume=True, experts={"critic": str(critic)})


def test_a_request_to_a_model_that_is_not_there_is_refused(reader: TrainablePolicy) -> None:
    with VerifierPool(VerifierConfig(name="exact", workers=1)) as verifier:
        engine = LocalEngine(reader, verifier)

        async def sample(model: str) -> Any:
            return await Generate([5, 6], model=model)

        for model, said in (("critic", "asks the model 'critic'"), ("reference", "can only score")):
            with pytest.raises(UserError, match=said):
                engine.run([(("guide",), sample(model))])
        same = Generate([5, 6], max_tokens=20)

        async def shared() -> Any:
            return await same

        first, second = engine.run([(("guide", place), shared()) for place in range(2)])
        assert first[0].tokens != second[0].tokens  # each flow has its own randomness
