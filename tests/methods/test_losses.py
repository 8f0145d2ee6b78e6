"""The objectives against hand-worked values, an independent float64 computation and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from handrail.methods import METHODS, losses
from handrail.methods.base import Method
from handrail.methods.losses import Streams
from handrail.types import Origin

NAN = float("nan")


def streams(credit: list[list[float]], **others: Any) -> Streams:
    tensor = torch.tensor(credit)
    fields = {name: torch.tensor(value) for name, value in others.items()}
    zeros = torch.zeros_like(tensor)
    defaults = {
        "mask": torch.ones_like(tensor),
        "weight": zeros,
        "bonus": zeros,
        "kl": zeros,
        "behaviour": torch.full_like(tensor, NAN),
        "old": fields.get("behaviour", torch.full_like(tensor, NAN)),
        "origin": torch.zeros(tensor.shape, dtype=torch.long),
    }
    return Streams(credit=tensor, **{**defaults, **fields})


def method(name: str, **settings: Any) -> Method:
    cls = METHODS[name]
    return cls(cls.Settings.model_validate({"name": name, **settings}))


def gradient(surrogate: Callable[..., torch.Tensor], logp: list[list[float]], known: Streams) -> list[float]:
    leaf = torch.tensor(logp, requires_grad=True)
    surrogate(leaf, known).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.flatten().tolist()


@pytest.mark.parametrize(("p", "weight"), [(0.001, 0.0098), (0.01, 0.0826), (0.1, 0.25), (0.5, 0.1389), (1.0, 0.0826)])
def test_luffy_weighs_a_reference_token_by_the_papers_formula(p: float, weight: float) -> None:
    known = streams([[1.0]], origin=[[int(Origin.REFERENCE)]])
    (found,) = gradient(method("luffy").surrogate, [[math.log(p)]], known)
    assert found == pytest.approx(weight, abs=5e-5)


def test_luffys_shaping_has_slope_one_in_p_at_root_gamma_minus_gamma() -> None:
    p = math.sqrt(0.1) - 0.1
    assert p == pytest.approx(0.2162, abs=5e-5)
    known = streams([[1.0]], origin=[[int(Origin.REFERENCE)]])
    (by_logp,) = gradient(method("luffy").surrogate, [[math.log(p)]], known)
    assert by_logp / p == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "constant", "value"),
    [("p/(p+c)", 0.1, lambda p: p / (p + 0.1)), ("p/(p+c)", 0.5, lambda p: p / (p + 0.5)), ("p", 0.1, lambda p: p),
     ("p^e", 0.3, lambda p: p**0.3), ("sqrt", 0.1, math.sqrt), ("log", 0.1, math.log)],
)  # fmt: skip
def test_every_shape_of_the_released_code(shape: losses.Shape, constant: float, value: Callable[[float], float]) -> None:
    ps = [1e-6, 0.01, 0.3, 1.0]
    found = losses.shaped(torch.tensor([[math.log(p) for p in ps]]), streams([[2.0] * 4]), shape, constant)
    assert found[0].tolist() == pytest.approx([2 * value(p) for p in ps], rel=1e-4)


def test_luffy_never_clips_a_reference_and_clips_nothing_by_default() -> None:
    known = streams([[1.0, 1.0]], origin=[[0, 1]], behaviour=[[math.log(0.1), NAN]])
    found = method("luffy").surrogate(torch.tensor([[math.log(0.9), math.log(0.9)]]), known)
    assert found[0].tolist() == pytest.approx([9.0, 0.9 / 1.0])
    clipped = method("luffy", clip=True).surrogate(torch.tensor([[math.log(0.9), math.log(0.9)]]), known)
    assert clipped[0].tolist() == pytest.approx([1.2, 0.9 / 1.0])


@pytest.mark.parametrize(
    ("ratio", "credit", "value", "slope"),
    [(1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (1.5, -2.0, -3.0, -3.0),
     (0.5, -2.0, -1.6, 0.0)],
)  # fmt: skip
def test_grpos_clip_holds_back_only_what_has_already_moved_far_enough(ratio: float, credit: float, value: float, slope: float) -> None:
    old = math.log(0.3)
    known = streams([[credit]], behaviour=[[old]])
    logp = [[old + math.log(ratio)]]
    assert method("grpo").surrogate(torch.tensor(logp), known).item() == pytest.approx(value, rel=1e-5)
    assert gradient(method("grpo").surrogate, logp, known) == pytest.approx([slope], rel=1e-5)


def test_dapo_clips_higher_above_than_below() -> None:
    known = streams([[1.0, -1.0]], behaviour=[[0.0, 0.0]])
    logp = torch.tensor([[math.log(1.5), math.log(0.5)]])
    assert method("grpo", clip_high=0.28).surrogate(logp, known)[0].tolist() == pytest.approx([1.28, -0.8])


def test_gspo_takes_one_ratio_for_the_sequence_and_ignores_padding() -> None:
    # log-ratios .2 and .4, then padding: the sequence's ratio is exp(.3)
    known = streams([[1.0, 1.0, 0.0]], behaviour=[[-1.0, -1.0, 0.0]], mask=[[1.0, 1.0, 0.0]])
    found = method("grpo", ratio="sequence", clip=False).surrogate(torch.tensor([[-0.8, -0.6, -9.0]]), known)
    assert found[0].tolist() == pytest.approx([math.exp(0.3), math.exp(0.3), 0.0])
    clipped = method("grpo", ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    assert clipped.surrogate(torch.tensor([[-0.8, -0.6, -9.0]]), known)[0].tolist() == pytest.approx([1.0004, 1.0004, 0.0])


def test_a_token_of_unknown_behaviour_counts_as_on_policy() -> None:
    known = streams([[3.0]])
    assert method("grpo").surrogate(torch.tensor([[-2.5]]), known).item() == pytest.approx(3.0)
    assert gradient(method("grpo").surrogate, [[-2.5]], known) == pytest.approx([3.0])


@pytest.mark.parametrize("name", ["sft", "dft", "sort", "grpo+sft", "sft-on-failures"])
def test_imitation_pulls_on_each_token_with_its_weight(name: str) -> None:
    known = streams([[0.0, 0.0]], weight=[[0.25, 0.75]], origin=[[1, 1]])
    assert gradient(method(name).surrogate, [[-3.0, -0.1]], known) == pytest.approx([0.25, 0.75])


def float64_objective(name: str, logp: np.ndarray, s: dict[str, np.ndarray], gamma: float = 0.1) -> np.ndarray:
    """Written from the papers' formulas, without looking at the library's."""
    ratio = np.exp(logp - np.where(np.isnan(s["behaviour"]), logp, s["behaviour"]))
    if name == "gspo":
        lengths = s["mask"].sum(1, keepdims=True)
        ratio = np.exp(np.log(ratio).sum(1, keepdims=True) / lengths) * s["mask"]
    low, high = {"dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(name, (0.8, 1.2))
    own = np.minimum(ratio * s["credit"], np.clip(ratio, low, high) * s["credit"])
    if name == "luffy":
        p = np.exp(logp)
        own = np.where(s["origin"] == 1, p / (p + gamma) * s["credit"], ratio * s["credit"])
    return np.where(s["mask"] > 0, own + s["weight"] * logp, 0)


VARIANTS = {
    "grpo": ("grpo", {}),
    "dr-grpo": ("grpo", {"normalise_std": False, "normaliser": "constant"}),
    "dapo": ("grpo", {"clip_high": 0.28, "normaliser": "token", "skip_dead_groups": True}),
    "gspo": ("grpo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "luffy": ("luffy", {}),
    "sort": ("sort", {}),
}


def random_streams(seed: int, with_references: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = (5, 7)
    mask = (np.arange(7)[None] < np.array([7, 1, 4, 6, 2])[:, None]).astype(float)
    logp = -rng.exponential(1.5, shape) * mask
    origin = np.where(np.arange(5)[:, None] >= 3, int(with_references), 0) * np.ones(shape, dtype=int)
    behaviour = np.where(origin == 1, np.nan, (logp + rng.normal(0, 0.3, shape)) * mask)
    credit = rng.normal(0, 1, (5, 1)) * mask
    weight = np.where(origin == 1, rng.random(shape), 0) * mask
    return logp, {"mask": mask, "credit": credit, "weight": weight, "behaviour": behaviour, "origin": origin}


def as_streams(s: dict[str, np.ndarray]) -> Streams:
    tensors = {name: torch.tensor(value, dtype=torch.long if name == "origin" else torch.float32) for name, value in s.items()}
    zeros = torch.zeros_like(tensors["mask"])
    return Streams(bonus=zeros, kl=zeros, old=tensors["behaviour"], **tensors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_objective_equals_a_float64_computation(variant: str, seed: int) -> None:
    name, settings = VARIANTS[variant]
    logp, s = random_streams(seed, with_references=name != "grpo")
    found = method(name, **settings).surrogate(torch.tensor(logp, dtype=torch.float32), as_streams(s)) * as_streams(s).mask
    np.testing.assert_allclose(found.numpy(), float64_objective(variant, logp, s), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_finite_differences(variant: str) -> None:
    name, settings = VARIANTS[variant]
    logp, s = random_streams(7, with_references=name != "grpo")
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    known = as_streams(s)
    known = Streams(**{key: value if key == "origin" else value.double() for key, value in vars(known).items()})
    (method(name, **settings).surrogate(leaf, known) * known.mask).sum().backward()
    assert leaf.grad is not None
    on_policy = np.isnan(s["behaviour"])
    for row, column in np.argwhere(s["mask"] > 0):
        if on_policy[row, column] and name != "luffy" and s["credit"][row, column] != 0:
            continue  # the on-policy ratio holds a stop-gradient, which differences cannot see
        step = np.zeros_like(logp)
        step[row, column] = 1e-6
        difference = float64_objective(variant, logp + step, s).sum() - float64_objective(variant, logp - step, s).sum()
        assert leaf.grad[row, column].item() == pytest.approx(difference / 2e-6, rel=1e-4, abs=1e-6), (row, column)


def test_importance_weights_by_hand() -> None:
    """π_old/μ where both are known, at most the cap; π itself where the old one is not computed; 1 where nobody sampled the token."""
    probabilities = {"old": [0.6, NAN, 0.9, 0.1], "behaviour": [0.5, 0.5, 0.1, NAN]}
    known = streams([[1.0] * 4], **{name: [[math.log(value) for value in row]] for name, row in probabilities.items()})
    logp = torch.tensor([[0.2, 0.4, 0.9, 0.3]]).log()
    assert losses.correction(logp, known, 2.0)[0].tolist() == pytest.approx([1.2, 0.8, 2.0, 1.0])


def test_the_divergence_by_hand() -> None:
    """π_ref/π − log(π_ref/π) − 1 on the policy's own tokens, times the coefficient."""
    origin = [[int(Origin.POLICY), int(Origin.POLICY), int(Origin.REFERENCE)]]
    known = streams([[0.0] * 3], kl=[[0.1, 0.5, 0.5]], origin=origin)
    logp, frozen = torch.tensor([[0.25, 0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.1]]).log()
    expected = [0.1 * (2 - math.log(2) - 1), 0.5 * (0.5 + math.log(2) - 1), 0.0]
    assert losses.divergence(logp, frozen, known)[0].tolist() == pytest.approx(expected)


def test_the_divergence_and_its_gradient_in_float64() -> None:
    rng = np.random.default_rng(0)
    logp, frozen = (torch.tensor(-rng.exponential(1.5, (4, 6)), dtype=torch.float64) for _ in range(2))
    known = streams([[0.0] * 6] * 4, kl=[[0.3] * 6] * 4)
    leaf = logp.clone().requires_grad_()
    total = losses.divergence(leaf, frozen, known).sum()
    total.backward()
    ratio = np.exp(frozen.numpy() - logp.numpy())
    assert total.item() == pytest.approx(0.3 * (ratio - np.log(ratio) - 1).sum(), rel=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), 0.3 * (1 - ratio), rtol=1e-6)
