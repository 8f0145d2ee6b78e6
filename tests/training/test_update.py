"""From groups with credit to the gradient: normalizers, dropped trajectories, micro-batches, end tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from handrail.engines.local import LocalEngine
from handrail.methods import METHODS
from handrail.methods.base import Method
from handrail.methods.batch import Sample, TokenBatch, micro_batch
from handrail.methods.imitating import imitated
from handrail.methods.luffy import Luffy, LuffySettings
from handrail.methods.normalizers import Normalizers
from handrail.models.batching import Layout, by_budget
from handrail.models.trainable import TrainablePolicy
from handrail.training.samples import gradient_weights
from handrail.training.update import Update
from handrail.types.problem import Problem
from handrail.types.trajectory import Author, Group, Trajectory
from tests.conftest import config
from tests.waits import Waits

PROBLEM = Problem("p", "77 A 8 ?", "70", ("77 + 8 = 85 ; 85 * 2 = 70 # 70",), "add double")


def build(name: str, group_size: int = 4, max_tokens: int = 48, **settings: Any) -> Method[Any]:
    cls = METHODS[name]
    return cls(cls.Settings.model_validate({"name": name, **settings}), group_size, max_tokens)


def rollout(policy: TrainablePolicy, text: str, reward: float, prompt: str = "77 A 8 ?") -> Trajectory:
    completion = policy.renderer.completion(text)
    prompt_ids = policy.tokenizer.encode(prompt)
    (logp,) = policy.score([prompt_ids], [completion])
    # A little off-policy, so that ratios are not all 1.
    sampled = logp - 0.1 * (-1) ** torch.arange(len(logp))
    member = Trajectory.by(Author.POLICY, prompt_ids, completion, text).with_columns(
        sampling_logp=sampled, old_logp=sampled
    )
    return replace(member, reward=reward, correct=reward == 1)


@pytest.fixture
def groups(policy: TrainablePolicy) -> list[Group]:
    """Return a mixed group with rows of very different lengths, an all-wrong group and an all-right one."""
    long = "77 + 8 = 85 ; 85 * 2 = 70 ; 70 - 3 = 67 ; 67 + 9 = 76 ; 76 * 2 = 52 # 70 76 52"
    mixed = [
        rollout(policy, text, reward)
        for text, reward in (("# 70", 1.0), (long, 0.0), ("77 * 2 = 54 # 54", 0.0), ("85", 1.0))
    ]
    wrong = [rollout(policy, text, 0.0, "3 B 4 A 9 C 2 ?") for text in ("# 1", "3 + 4 = 7 # 7", long, "3")]
    right = [rollout(policy, "5 + 5 = 10 # 10", 1.0, "5 + 5 ?") for _ in range(4)]
    other = replace(PROBLEM, id="q", prompt="3 B 4 A 9 C 2 ?")
    return [
        Group(PROBLEM, mixed),
        Group(other, wrong),
        Group(replace(PROBLEM, id="r", prompt="5 + 5 ?"), right),
    ]


def gradients(
    method: Method[Any],
    policy: TrainablePolicy,
    groups: list[Group],
    budget: int = 10**6,
    drop: bool = True,
    apart: bool = False,
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Return the gradient that one update would apply, and its figures; the policy is not changed."""
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model)
    seen: list[torch.Tensor] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.extend(p.grad.clone() for p in twin.model.parameters())

    settings = config(train={"grad_clip": 1e9, "micro_batch_tokens": budget}).train
    update = Update(method, twin, Accelerator(cpu=True), Spy(twin.model.parameters(), lr=1.0), settings)
    if not drop:
        samples = update.samples
        update.samples = lambda credited: [  # type: ignore[method-assign,assignment]
            replace(sample, entropy_coef=1e-300) for sample in samples(credited)
        ]
    outcome = update(groups, apart)
    return seen, outcome.figures


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Check equality up to float32 rounding (2e-5 of the gradient here); a wrong normalizer or a lost row
    would change it by percents."""
    assert left and len(left) == len(right)
    scale = torch.nn.utils.get_total_norm(right)
    difference = torch.nn.utils.get_total_norm([one - other for one, other in zip(left, right, strict=True)])
    assert scale > 0 and difference / scale < 1e-4, (difference, scale)


METHOD_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {}),
    ("grpo", {"normalize_std": False, "loss_normalizer": "constant"}),
    ("grpo", {"loss_normalizer": "token", "clip_high": 0.28, "skip_dead_groups": True}),
    ("grpo", {"ratio": "sequence", "clip_low": 0.3, "clip_high": 0.4}),
    ("luffy", {"entropy_bonus": 0.0}),
    ("sort", {}),
    ("sort", {"mean": "token", "divide_by": "failed"}),
    ("grpo+sft", {}),
    ("sft-on-failures", {}),
    ("scope", {"judge": "reference", "no_prefix": "reference", "placing": "append"}),
]


def credited(
    name: str, settings: dict[str, Any], groups: list[Group], engine: LocalEngine
) -> tuple[Method[Any], list[Group]]:
    method = build(name, **settings)
    return method, engine.credit(method, [each for found in engine.guide(method, groups) for each in found])


@pytest.mark.parametrize(("name", "settings"), METHOD_SETTINGS)
def test_micro_batches_do_not_change_the_gradient(
    name: str, settings: dict[str, Any], policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method, groups = credited(name, settings, groups, engine)
    whole, figures = gradients(method, policy, groups)
    for budget, apart in ((1, False), (60, False), (150, False), (150, True)):
        parts, split_figures = gradients(method, policy, groups, budget, apart=apart)
        assert_equal(parts, whole)
        assert {name: split_figures[name] for name in figures} == pytest.approx(figures, rel=1e-3)


def test_nothing_waits_for_a_gpu_between_micro_batches(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, groups = credited("grpo", {}, groups, engine)
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model)
    twin.layout = "padded"  # packing reads lengths, but those of rows that are still on the CPU
    monkeypatch.setattr(type(twin), "sampler_differs", property(lambda policy: True))
    optimizer = torch.optim.SGD(twin.model.parameters())
    update = Update(method, twin, Accelerator(cpu=True), optimizer, config().train)
    batches = [micro_batch([sample]) for sample in update.samples(groups) if sample.is_live]
    assert len(batches) == 4
    with Waits() as waits:
        loss = update.backward(batches, 4)
    with Waits() as models, torch.no_grad():
        for batch in batches:
            twin.forward(batch.inputs)
        assert waits.count == models.count
        assert loss == sum(update.loss(batch).item() for batch in batches)


@pytest.mark.parametrize(("name", "settings"), METHOD_SETTINGS)
def test_dropping_rows_without_credit_does_not_change_the_gradient(
    name: str, settings: dict[str, Any], policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method, groups = credited(name, settings, groups, engine)
    assert (
        any(not member.has_signal for group in groups for member in group.trajectories)
        or settings.get("skip_dead_groups")
        or name == "luffy"
    )
    dropped, _ = gradients(method, policy, groups)
    kept, _ = gradients(method, policy, groups, drop=False)
    assert_equal(dropped, kept)


def autograd_reference(
    policy: TrainablePolicy, terms: list[tuple[Trajectory, list[float], str]]
) -> list[torch.Tensor]:
    """Return the gradient of minus a plain sum over tokens, one row at a time, in float64: (trajectory,
    coefficients, kind)."""
    model = copy.deepcopy(policy.model).double()
    for member, coefficients, kind in terms:
        ids = torch.tensor([member.prompt_ids + member.tokens])
        logits = model(input_ids=ids).logits[0, len(member.prompt_ids) - 1 : -1].log_softmax(-1)
        logp = logits[torch.arange(len(member)), member.token_ids]
        a = torch.tensor(coefficients, dtype=torch.float64)
        if kind == "ratio":
            r = (logp - member.column("sampling_logp").double()).exp()
            value = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
        elif kind == "unclipped":
            value = (logp - member.column("sampling_logp").double()).exp() * a
        elif kind == "shaped":
            value = logp.exp() / (logp.exp() + 0.1) * a
        else:
            value = a * logp
        (-value.sum()).backward()
    return [p.grad.float() for p in model.parameters()]


def test_grpos_update_equals_a_float64_sum_over_single_rows(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method, credited_groups = credited("grpo", {}, groups, engine)
    advantage = 0.5 / ((1 / 3) ** 0.5 + 1e-4)  # rewards 1 0 0 1: mean 1/2, std √(1/3)
    signs = (1, -1, -1, 1)
    terms = [
        (member, [sign * advantage / (12 * len(member))] * len(member), "ratio")
        for member, sign in zip(groups[0].trajectories, signs, strict=True)
    ]
    found, _ = gradients(method, policy, credited_groups, budget=100)
    assert_equal(found, autograd_reference(policy, terms))


def test_luffys_update_equals_a_float64_sum_over_single_rows(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method = build("luffy", group_size=5, entropy_bonus=0.0)
    joined = [replace(group, problem=replace(PROBLEM, prompt=group.problem.prompt)) for group in groups]
    guided = [each for found in engine.guide(method, joined) for each in found]
    assert [group.trajectories[-1].reward for group in guided] == [1.0, 1.0, 1.0]
    # rewards with the reference: 1 0 0 1 +1 → mean .6;  0 0 0 0 +1 → mean .2;  1 1 1 1 +1 → nothing
    advantages = [[0.4, -0.6, -0.6, 0.4, 0.4], [-0.2, -0.2, -0.2, -0.2, 0.8]]
    scale = 1 / (15 * 48)
    terms = [
        (member, [a * scale] * len(member), "unclipped" if member.is_rollout else "shaped")
        for group, row in zip(guided, advantages, strict=False)
        for member, a in zip(group.trajectories, row, strict=True)
    ]
    found, _ = gradients(method, policy, engine.credit(method, guided), budget=100)
    assert_equal(found, autograd_reference(policy, terms))
    _, figures = gradients(method, policy, engine.credit(method, guided), apart=True)
    for origin, kind in (("policy", "unclipped"), ("guided", "shaped")):
        alone = autograd_reference(policy, [term for term in terms if term[2] == kind])
        assert figures[f"grad_norm/{origin}"] == pytest.approx(
            float(torch.nn.utils.get_total_norm(alone)), rel=1e-3
        )


def test_sorts_update_equals_a_float64_sum_over_single_rows(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method, credited_groups = credited("sort", {}, groups, engine)
    assert [len(group.imitated) for group in credited_groups] == [0, 1, 0]
    reference = credited_groups[1].imitated[0]
    planned = policy.renderer.prompt(credited_groups[1].problem, "add double")
    model = copy.deepcopy(policy.model).double()
    p0, p1 = (
        token_probabilities(model, prompt, reference.tokens) for prompt in (reference.prompt_ids, planned)
    )
    weights = (p0 * p1).sqrt()
    (shown,) = gradient_weights([reference], method, policy)
    assert shown == pytest.approx(weights.tolist(), rel=1e-4)
    advantage = 0.5 / ((1 / 3) ** 0.5 + 1e-4)
    terms = [
        (member, [sign * advantage / (12 * len(member))] * len(member), "ratio")
        for member, sign in zip(groups[0].trajectories, (1, -1, -1, 1), strict=True)
    ]
    terms.append((reference, [w / (len(reference) * 3) for w in weights.tolist()], "nll"))
    found, _ = gradients(method, policy, credited_groups, budget=100)
    assert_equal(found, autograd_reference(policy, terms))


@torch.no_grad()
def token_probabilities(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].softmax(-1)
    return logits[torch.arange(len(completion)), torch.tensor(completion)]


def test_gradient_norms_by_author_where_a_parameter_has_a_gradient_in_one_part_only(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    """As an expert of a mixture has that no token of the other part reaches."""
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model)
    twin.model.lone = torch.nn.Parameter(torch.ones(()))

    class Lone(Luffy):
        def surrogate(self, logp: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
            found = super().surrogate(logp, batch)
            of_references = batch.author == Author.REFERENCE
            return found + twin.model.lone * of_references if of_references.any() else found

    method = Lone(LuffySettings(entropy_bonus=0.0), 5, 48)
    guided = [each for found in engine.guide(method, groups[:2]) for each in found]
    credited_groups = engine.credit(method, guided)
    _, plain = gradients(build("luffy", 5, entropy_bonus=0.0), policy, credited_groups, apart=True)
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.0)
    settings = config(train={"grad_clip": 1e9}).train
    figures = Update(method, twin, Accelerator(cpu=True), optimizer, settings)(credited_groups, True).figures
    lone = sum(len(group.trajectories[-1]) for group in credited_groups)
    assert figures["grad_norm/policy"] == pytest.approx(plain["grad_norm/policy"], rel=1e-5)
    assert figures["grad_norm/guided"] == pytest.approx(math.hypot(plain["grad_norm/guided"], lone), rel=1e-5)


def test_a_batch_without_any_signal_touches_nothing(
    policy: TrainablePolicy, groups: list[Group], engine: LocalEngine
) -> None:
    method, credited_groups = credited("grpo", {}, groups[1:], engine)
    assert gradients(method, policy, credited_groups) == ([], {})


def test_groups_of_equal_rewards_have_exactly_zero_credit(policy: TrainablePolicy) -> None:
    rewards = [0.1 + 0.2] * 3  # because of rounding, their mean differs from each of them
    group = Group(PROBLEM, [rollout(policy, "# 70", reward) for reward in rewards])
    credited_group = build("grpo").advantages(group)
    assert not any(member.column("advantage").any() for member in credited_group.trajectories)


@pytest.mark.parametrize("right", range(8))
def test_luffys_advantages_by_hand(right: int, policy: TrainablePolicy) -> None:
    members = [rollout(policy, "# 70", float(place < right)) for place in range(7)]
    reference = replace(Trajectory.by(Author.REFERENCE, [1], [2]), reward=1.0)
    found = build("luffy", group_size=8).advantages(Group(PROBLEM, [*members, reference])).trajectories
    for place, member in enumerate(found):
        expected = 0.0 if right == 7 else (7 - right) / 8 if place < right or place == 7 else -(right + 1) / 8
        assert member.column("advantage").tolist() == pytest.approx([expected] * len(member))


def test_the_end_token_is_trained_even_if_it_is_the_padding_token(policy: TrainablePolicy) -> None:
    end = policy.tokenizer.eos_token_id
    short, long = (
        Trajectory.by(Author.REFERENCE, [5, 6], [7, end]),
        Trajectory.by(Author.REFERENCE, [5], [7, 8, 9, end]),
    )
    batch = micro_batch([Sample(imitated(member), imitation_scale=1.0) for member in (short, long)])
    assert batch.inputs.whole.tolist() == [[5, 6, 7, end, 0, 0], [0, 5, 7, 8, 9, end]]
    assert batch.inputs.whole_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert batch.tokens.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.tokens.imitation_weight.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_sampling_log_probabilities_equal_the_trainers(policy: TrainablePolicy) -> None:
    prompts = [policy.tokenizer.encode(text) for text in ("77 A 8 C 9 B 4 ?", "5 + 3 ?") for _ in range(3)]
    completions = policy.generate(prompts, range(6))
    assert all(
        member.finished and member.tokens[-1] == policy.tokenizer.eos_token_id for member in completions
    )
    scores = policy.score(prompts, [member.token_ids for member in completions])
    for member, score in zip(completions, scores, strict=True):
        assert member.column("sampling_logp").tolist() == pytest.approx(score.tolist(), abs=2e-4)


def test_entropy_is_that_of_the_sampling_distribution(policy: TrainablePolicy) -> None:
    prompt = policy.tokenizer.encode("77 A 8 ?")
    (member,) = policy.generate([prompt], [0])
    with torch.no_grad():
        logits = (
            policy.model(input_ids=torch.tensor([prompt + member.tokens]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
        )
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert member.column("entropy").tolist() == pytest.approx(expected.tolist(), abs=2e-4)
    batch = micro_batch([Sample(member.with_advantage(1.0), 1.0)])
    _, trained = policy.forward(batch.inputs, with_entropy=True)
    assert trained is not None and trained[0].tolist() == pytest.approx(expected.tolist(), abs=2e-4)


def test_micro_batches_respect_their_budget_and_lose_no_row() -> None:
    prompts = [[1] * 3, [2] * 10, [3], [1] * 3, [4] * 30, [5, 5], [4] * 30]
    lengths = [40, 1, 1, 39, 30, 5, 12]
    layouts: list[Layout] = ["packed", "shared", "padded"]
    for layout in layouts:
        parts = by_budget(prompts, lengths, 90, layout)
        assert sorted(index for part in parts for index in part) == list(range(7))
        for part in parts:
            read = len({tuple(prompts[i]) for i in part}) if layout == "shared" else len(part)
            tokens = max(len(prompts[i]) for i in part) * read + max(lengths[i] for i in part) * len(part)
            if layout == "packed":
                tokens = sum(map(len, {tuple(prompts[i]) for i in part})) + sum(lengths[i] for i in part)
            assert tokens <= 90 or len(part) == 1
    # 30 + 2·30, 3 + 2·40, 3·10 + 3·5
    assert by_budget(prompts, lengths, 90, "shared") == [[4, 6], [0, 3], [1, 5, 2]]
    # 30 + 30 + 12, 3 + 40 + 39, and the rest: 10 + 1 + 2 + 5 + 1 + 1
    assert by_budget(prompts, lengths, 90) == [[4, 6], [0, 3], [1, 5, 2]]
    assert by_budget(prompts, lengths, 102) == [[4, 6], [0, 3, 1, 5, 2]]
    # 2 + 38 + 9·2 tokens, but attention would gather 10 rows of 2 + 38: four of those 400 count as one token.
    assert by_budget([[1, 1]] * 10, [38] + [2] * 9, 90) == [[*range(9)], [9]]


def test_normalizers_include_trajectories_that_are_dropped_later(groups: list[Group]) -> None:
    found = Normalizers.of(groups)
    assert (found.problems, found.trajectories, found.imitated) == (3, 12, 0)
    assert found.tokens == sum(len(member) for group in groups for member in group.trajectories)


def test_the_normalizers_by_hand(policy: TrainablePolicy) -> None:
    totals = Normalizers(
        problems=4, trajectories=32, tokens=1000, imitating=2, imitated=2, imitated_tokens=50
    )
    member = Trajectory.by(Author.REFERENCE, [1], [2] * 20)
    assert build("grpo").advantage_scale(member, totals) == 1 / (32 * 20)
    assert build("grpo", loss_normalizer="token").advantage_scale(member, totals) == 1 / 1000
    assert build("luffy").advantage_scale(member, totals) == 1 / (32 * 48)
    assert build("sort", imitation_coef=3.0).imitation_scale(member, totals) == pytest.approx(3 / (20 * 4))
    assert build("sort", divide_by="failed").imitation_scale(member, totals) == pytest.approx(1 / (20 * 2))
    assert build("sort", mean="token").imitation_scale(member, totals) == pytest.approx((2 / 4) / 50)
    assert build("sft").imitation_scale(member, totals) == pytest.approx(1 / 50)
