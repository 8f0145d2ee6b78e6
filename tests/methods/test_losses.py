"""The objectives, tested against hand-worked values, an independent float64 computation and finite
differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from handrail.methods import METHODS, losses
from handrail.methods.base import Method
from handrail.methods.batch import TokenBatch
from handrail.types.trajectory import Author

NAN = float("nan")


def columns(advantage: list[list[float]], **others: Any) -> TokenBatch:
    """Make a batch of these columns; old log-probabilities equal the sampling ones unless they are given."""
    tensor = torch.tensor(advantage)
    fields = {name: torch.tensor(value) for name, value in others.items()}
    zeros, unknown = torch.zeros_like(tensor), torch.full_like(tensor, NAN)
    sampling_logp = fields.pop("sampling_logp", unknown)
    known = {
        "advantage": tensor,
        "imitation_weight": fields.pop("imitation_weight", zeros),
        "sampling_logp": sampling_logp,
        "old_logp": fields.pop("old_logp", sampling_logp),
    }
    mask, author = (
        fields.pop("mask", torch.ones_like(tensor)),
        fields.pop("author", torch.zeros(tensor.shape, dtype=torch.long)),
    )
    entropy_coef, kl_coef = fields.pop("entropy_coef", zeros), fields.pop("kl_coef", zeros)
    return TokenBatch(mask, author, {**known, **fields}, entropy_coef, kl_coef)


def method(name: str, **settings: Any) -> Method[Any]:
    cls = METHODS[name]
    return cls(cls.Settings.model_validate({"name": name, **settings}))


def gradient(
    surrogate: Callable[..., torch.Tensor], logp: list[list[float]], known: TokenBatch
) -> list[float]:
    leaf = torch.tensor(logp, requires_grad=True)
    surrogate(leaf, known).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.flatten().tolist()


@pytest.mark.parametrize(
    ("p", "weight"), [(0.001, 0.0098), (0.01, 0.0826), (0.1, 0.25), (0.5, 0.1389), (1.0, 0.0826)]
)
def test_luffys_weight_of_a_reference_token_follows_the_papers_formula(p: float, weight: float) -> None:
    known = columns([[1.0]], author=[[int(Author.REFERENCE)]])
    (found,) = gradient(method("luffy").surrogate, [[math.log(p)]], known)
    assert found == pytest.approx(weight, abs=5e-5)


def test_luffys_shaping_has_slope_one_in_p_at_root_gamma_minus_gamma() -> None:
    p = math.sqrt(0.1) - 0.1
    assert p == pytest.approx(0.2162, abs=5e-5)
    known = columns([[1.0]], author=[[int(Author.REFERENCE)]])
    (by_logp,) = gradient(method("luffy").surrogate, [[math.log(p)]], known)
    assert by_logp / p == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "constant", "value"),
    [("p/(p+c)", 0.1, lambda p: p / (p + 0.1)), ("p/(p+c)", 0.5, lambda p: p / (p + 0.5)),
    ("p", 0.1, lambda p: p),
     ("p^e", 0.3, lambda p: p**0.3), ("sqrt", 0.1, math.sqrt), ("log", 0.1, math.log)],
)  # fmt: skip
def test_every_shape_of_the_released_code(
    shape: losses.Shape, constant: float, value: Callable[[float], float]
) -> None:
    ps = [1e-6, 0.01, 0.3, 1.0]
    found = losses.shaped(torch.tensor([[math.log(p) for p in ps]]), columns([[2.0] * 4]), shape, constant)
    assert found[0].tolist() == pytest.approx([2 * value(p) for p in ps], rel=1e-4)


def test_luffy_never_clips_a_reference_and_clips_nothing_by_default() -> None:
    known = columns([[1.0, 1.0]], author=[[0, 1]], sampling_logp=[[math.log(0.1), NAN]])
    found = method("luffy").surrogate(torch.tensor([[math.log(0.9), math.log(0.9)]]), known)
    assert found[0].tolist() == pytest.approx([9.0, 0.9 / 1.0])
    clipped = method("luffy", clip=True).surrogate(torch.tensor([[math.log(0.9), math.log(0.9)]]), known)
    assert clipped[0].tolist() == pytest.approx([1.2, 0.9 / 1.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [(1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0),
    (1.5, -2.0, -3.0, -3.0),
     (0.5, -2.0, -1.6, 0.0)],
)  # fmt: skip
def test_grpos_clip_stops_only_gradients_that_move_the_ratio_further_away(
    ratio: float, advantage: float, value: float, slope: float
) -> None:
    old = math.log(0.3)
    known = columns([[advantage]], sampling_logp=[[old]])
    logp = [[old + math.log(ratio)]]
    assert method("grpo").surrogate(torch.tensor(logp), known).item() == pytest.approx(value, rel=1e-5)
    assert gradient(method("grpo").surrogate, logp, known) == pytest.approx([slope], rel=1e-5)


def test_dapo_clips_higher_above_than_below() -> None:
    known = columns([[1.0, -1.0]], sampling_logp=[[0.0, 0.0]])
    logp = torch.tensor([[math.log(1.5), math.log(0.5)]])
    assert method("grpo", clip_high=0.28).surrogate(logp, known)[0].tolist() == pytest.approx([1.28, -0.8])


def test_gspo_takes_one_ratio_for_the_sequence_and_ignores_padding() -> None:
    # log-ratios .2 and .4, then padding: the ratio of the sequence is exp(.3)
    known = columns([[1.0, 1.0, 0.0]], sampling_logp=[[-1.0, -1.0, 0.0]], mask=[[1.0, 1.0, 0.0]])
    found = method("grpo", ratio="sequence", clip=False).surrogate(torch.tensor([[-0.8, -0.6, -9.0]]), known)
    assert found[0].tolist() == pytest.approx([math.exp(0.3), math.exp(0.3), 0.0])
    clipped = method("grpo", ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    assert clipped.surrogate(torch.tensor([[-0.8, -0.6, -9.0]]), known)[0].tolist() == pytest.approx(
        [1.0004, 1.0004, 0.0]
    )


def test_the_sequence_ratio_of_a_replayed_answer_is_over_its_tokens() -> None:
    """Log-ratios .2 and .4: exp(.3) = 1.34986, a token has half of the gradient of both tokens."""
    known = columns([[1.0, 1.0]], old_logp=[[-1.0, -1.0]], author=[[int(Author.REPLAY)] * 2])
    surrogate = method("grpo", ratio="sequence", clip=False).surrogate
    assert surrogate(torch.tensor([[-0.8, -0.6]]), known)[0].tolist() == pytest.approx([1.34986] * 2)
    assert gradient(surrogate, [[-0.8, -0.6]], known) == pytest.approx([1.34986] * 2)
    mixed = columns([[1.0] * 3], old_logp=[[-1.0] * 3], author=[[0, int(Author.REPLAY), 1]])
    found = surrogate(torch.tensor([[-0.8, -0.6, -9.0]]), mixed)  # the reference's token does not count
    assert found[0].tolist() == pytest.approx([1.34986] * 3)


def test_a_token_of_unknown_sampling_logp_counts_as_on_policy() -> None:
    known = columns([[3.0]])
    assert method("grpo").surrogate(torch.tensor([[-2.5]]), known).item() == pytest.approx(3.0)
    assert gradient(method("grpo").surrogate, [[-2.5]], known) == pytest.approx([3.0])


@pytest.mark.parametrize("name", ["sft", "grpo+sft", "sft-on-failures", "dmpo"])
def test_the_imitation_gradient_of_a_token_is_its_weight(name: str) -> None:
    known = columns([[0.0, 0.0]], imitation_weight=[[0.25, 0.75]], author=[[1, 1]])
    assert gradient(method(name).surrogate, [[-3.0, -0.1]], known) == pytest.approx([0.25, 0.75])


def test_the_dft_gradient_of_a_token_is_its_probability() -> None:
    known = columns([[0.0, 0.0]], imitation_weight=[[0.25, 0.75]], author=[[1, 1]])
    assert gradient(method("dft").surrogate, [[math.log(0.2), math.log(0.9)]], known) == pytest.approx(
        [0.05, 0.675]
    )


def sort_batch(p1: list[float], **others: Any) -> TokenBatch:
    """One reference whose tokens have the probabilities ``p1`` with the plan in the prompt; NaN without a
    plan."""
    length = len(p1)
    known = {
        "imitation_weight": [[1.0] * length],
        "author": [[1] * length],
        "plan_logp": [[math.log(p) for p in p1]],
    }
    return columns(
        [[0.0] * length], **{**known, "weight_order": [[float(place) for place in range(length)]], **others}
    )


@pytest.mark.parametrize(
    ("p0", "p1", "weight"),
    [(0.01, 0.01, 0.01), (0.01, 0.8, 0.0894), (0.05, 0.01, 0.0224), (0.05, 0.6, 0.1732), (0.5, 0.9, 0.6708),
    (0.9, 0.9, 0.9),
     (0.9, 0.99, 0.9439), (0.3, NAN, 0.3)],
)  # fmt: skip
def test_sorts_weight_is_the_geometric_mean_of_both_scorings(p0: float, p1: float, weight: float) -> None:
    (found,) = gradient(method("sort").surrogate, [[math.log(p0)]], sort_batch([p1]))
    assert found == pytest.approx(weight, abs=5e-5)


def test_sorts_settings_change_the_weights_as_documented() -> None:
    p0, p1 = [0.01, 0.5, 0.9], [0.81, 0.3, 0.9]

    def weights(p1: list[float] = p1, order: list[float] | None = None, **settings: Any) -> list[float]:
        others = {"weight_order": [order]} if order else {}
        return gradient(
            method("sort", **settings).surrogate, [[math.log(p) for p in p0]], sort_batch(p1, **others)
        )

    assert weights(alpha=0.0) == pytest.approx([0.01, 0.5, 0.9])
    assert weights(alpha=1.0) == pytest.approx([0.81, 0.3, 0.9])
    assert weights([NAN] * 3) == pytest.approx([0.01, 0.5, 0.9])
    assert weights(hard_mask=True) == pytest.approx([0.09, 0.0, 0.0])
    assert weights([NAN] * 3, hard_mask=True) == pytest.approx([0.01, 0.5, 0.9])
    normalized = weights(normalize_weights=True)
    assert sum(normalized) == pytest.approx(3.0) and normalized[0] / normalized[2] == pytest.approx(0.1)
    assert weights(order=[2, 0, 1], weights="random") == pytest.approx([0.9, 0.09, math.sqrt(0.15)])
    assert weights(weights="uniform") == pytest.approx([1.0] * 3)


def test_sorts_weights_can_be_those_of_the_rollout() -> None:
    known = sort_batch([0.4, 0.9], base_logp=[[math.log(0.1), math.log(0.4)]])
    found = gradient(method("sort", weights_at="rollout").surrogate, [[math.log(0.8), math.log(0.8)]], known)
    assert found == pytest.approx([0.2, 0.6])


def float64_objective(
    name: str, logp: np.ndarray, s: dict[str, np.ndarray], at: np.ndarray, gamma: float = 0.1
) -> np.ndarray:
    """Objective in float64, written from the papers' formulas independently of the library; ``at`` holds the
    values under stop-gradients."""
    ratio = np.exp(logp - np.where(np.isnan(s["sampling_logp"]), logp, s["sampling_logp"]))
    if name == "gspo":
        lengths = s["mask"].sum(1, keepdims=True)
        ratio = np.exp(np.log(ratio).sum(1, keepdims=True) / lengths) * s["mask"]
    low, high = {"dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(name, (0.8, 1.2))
    own = np.minimum(ratio * s["advantage"], np.clip(ratio, low, high) * s["advantage"])
    weight = s["imitation_weight"]
    if name == "luffy":
        p = np.exp(logp)
        own = np.where(s["author"] == 1, p / (p + gamma) * s["advantage"], ratio * s["advantage"])
    if name == "sort":
        weight = weight * np.sqrt(
            np.exp(at) * np.where(np.isnan(s["plan_logp"]), np.exp(at), np.exp(s["plan_logp"]))
        )
    return np.where(s["mask"] > 0, own + weight * logp, 0)


VARIANTS = {
    "grpo": ("grpo", {}),
    "dr-grpo": ("grpo", {"normalize_std": False, "loss_normalizer": "constant"}),
    "dapo": ("grpo", {"clip_high": 0.28, "loss_normalizer": "token", "skip_dead_groups": True}),
    "gspo": ("grpo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "luffy": ("luffy", {}),
    "sort": ("sort", {}),
}


def random_columns(seed: int, with_references: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = (5, 7)
    mask = (np.arange(7)[None] < np.array([7, 1, 4, 6, 2])[:, None]).astype(float)
    logp = -rng.exponential(1.5, shape) * mask
    author = np.where(np.arange(5)[:, None] >= 3, int(with_references), 0) * np.ones(shape, dtype=int)
    sampling_logp = np.where(author == 1, np.nan, (logp + rng.normal(0, 0.3, shape)) * mask)
    advantage = rng.normal(0, 1, (5, 1)) * mask
    imitation_weight = np.where(author == 1, rng.random(shape), 0) * mask
    known = {"advantage": advantage, "imitation_weight": imitation_weight, "sampling_logp": sampling_logp}
    plan_logp = np.where(np.arange(5)[:, None] == 4, np.nan, -rng.exponential(1.0, shape)) * mask
    return logp, {"mask": mask, "author": author, "plan_logp": plan_logp, **known}


def as_columns(s: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> TokenBatch:
    tensors = {
        name: torch.tensor(value, dtype=torch.long if name == "author" else dtype)
        for name, value in s.items()
    }
    zeros = torch.zeros_like(tensors["mask"])
    known = {"old_logp": tensors["sampling_logp"], **tensors}
    return TokenBatch(known.pop("mask"), known.pop("author"), known, zeros, zeros)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_objective_equals_a_float64_computation(variant: str, seed: int) -> None:
    name, settings = VARIANTS[variant]
    logp, s = random_columns(seed, with_references=name != "grpo")
    found = (
        method(name, **settings).surrogate(torch.tensor(logp, dtype=torch.float32), as_columns(s))
        * as_columns(s).mask
    )
    np.testing.assert_allclose(found.numpy(), float64_objective(variant, logp, s, logp), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_finite_differences(variant: str) -> None:
    name, settings = VARIANTS[variant]
    logp, s = random_columns(7, with_references=name != "grpo")
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    known = as_columns(s, torch.float64)
    (method(name, **settings).surrogate(leaf, known) * known.mask).sum().backward()
    assert leaf.grad is not None
    on_policy = np.isnan(s["sampling_logp"])
    for row, column in np.argwhere(s["mask"] > 0):
        if on_policy[row, column] and name != "luffy" and s["advantage"][row, column] != 0:
            continue  # the on-policy ratio contains a stop-gradient, which finite differences ignore
        step = np.zeros_like(logp)
        step[row, column] = 1e-6
        above, below = (float64_objective(variant, logp + sign * step, s, logp).sum() for sign in (1, -1))
        assert leaf.grad[row, column].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6), (
            row,
            column,
        )


def test_importance_weights_by_hand() -> None:
    """π_old/μ if both are known, at most the cap; π/μ if the old log-probability is not computed; 1 if nobody
    sampled the token."""
    probabilities = {"old_logp": [0.6, NAN, 0.9, 0.1], "sampling_logp": [0.5, 0.5, 0.1, NAN]}
    known = columns(
        [[1.0] * 4], **{name: [[math.log(value) for value in row]] for name, row in probabilities.items()}
    )
    logp = torch.tensor([[0.2, 0.4, 0.9, 0.3]]).log()
    assert losses.importance_weight(logp, known, 2.0)[0].tolist() == pytest.approx([1.2, 0.8, 2.0, 1.0])
    assert losses.sampling_ratio(logp, known)[0].tolist() == pytest.approx([1.2, 0.8, 9.0, NAN], nan_ok=True)


def test_the_divergence_by_hand() -> None:
    """π_ref/π − log(π_ref/π) − 1 on the policy's own tokens, times the coefficient."""
    author = [[int(Author.POLICY), int(Author.POLICY), int(Author.REFERENCE)]]
    known = columns([[0.0] * 3], kl_coef=[[0.1, 0.5, 0.5]], author=author)
    logp, frozen = torch.tensor([[0.25, 0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.1]]).log()
    expected = [0.1 * (2 - math.log(2) - 1), 0.5 * (0.5 + math.log(2) - 1), 0.0]
    assert losses.divergence(logp, frozen, known)[0].tolist() == pytest.approx(expected)


def test_the_divergence_and_its_gradient_in_float64() -> None:
    rng = np.random.default_rng(0)
    logp, frozen = (torch.tensor(-rng.exponential(1.5, (4, 6)), dtype=torch.float64) for _ in range(2))
    known = columns([[0.0] * 6] * 4, kl_coef=[[0.3] * 6] * 4)
    leaf = logp.clone().requires_grad_()
    total = losses.divergence(leaf, frozen, known).sum()
    total.backward()
    ratio = np.exp(frozen.numpy() - logp.numpy())
    assert total.item() == pytest.approx(0.3 * (ratio - np.log(ratio) - 1).sum(), rel=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), 0.3 * (1 - ratio), rtol=1e-6)


def test_environment_tokens_do_not_affect_the_loss() -> None:
    """The loss and its gradient equal those of the trajectory without these tokens."""
    tool = columns(
        [[0.5, 0.0, 0.5]], author=[[0, int(Author.ENVIRONMENT), 0]], mask=[[1.0, 0.0, 1.0]],
        sampling_logp=[[-1.0, NAN, -2.0]],
        entropy_coef=[[0.1, 0.0, 0.1]], kl_coef=[[0.2, 0.0, 0.2]],
    )  # fmt: skip
    plain = columns(
        [[0.5, 0.5]], sampling_logp=[[-1.0, -2.0]], entropy_coef=[[0.1, 0.1]], kl_coef=[[0.2, 0.2]]
    )
    found = []
    for batch, logp in ((tool, [[-0.9, -7.0, -2.1]]), (plain, [[-0.9, -2.1]])):
        leaf = torch.tensor(logp, requires_grad=True)
        loss = losses.token_loss(
            method("grpo"), leaf, batch, torch.ones_like(leaf), torch.full_like(leaf, -1.5), 2.0
        )
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.item(), leaf.grad[batch.mask > 0].tolist()))
        assert (leaf.grad[batch.mask == 0] == 0).all()
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][1] == pytest.approx(found[1][1])


def test_the_whole_loss_by_hand() -> None:
    """−(surrogate with the truncated importance weight + entropy_coef·H − kl_coef·k3), summed over two
    tokens."""
    batch = columns(
        [[1.0, -1.0]], sampling_logp=[[math.log(0.25), math.log(0.5)]],
        old_logp=[[math.log(0.5), math.log(0.1)]],
        entropy_coef=[[0.01, 0.01]], kl_coef=[[0.1, 0.1]],
    )  # fmt: skip
    logp = torch.tensor([[0.5, 0.1]]).log()
    entropy, reference = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.1]]).log()
    surrogate = 1.5 * 1 - 0.2 * 1  # weights min(.5/.25, 1.5) and .1/.5, ratios 1
    k3 = 0.5 - math.log(0.5) - 1
    loss = losses.token_loss(method("grpo"), logp, batch, entropy, reference, 1.5)
    assert loss.item() == pytest.approx(-(surrogate + 0.01 * 3 - 0.1 * k3))


def test_surrogates_compose_by_author() -> None:
    mixed = losses.by_author(
        {Author.POLICY: lambda logp, batch: logp, Author.REPLAY: lambda logp, batch: 2 * logp}
    )
    authors = [[int(Author.POLICY), int(Author.TEACHER), int(Author.REPLAY)]]
    assert mixed(torch.tensor([[1.0, 1.0, 1.0]]), columns([[0.0] * 3], author=authors)).tolist() == [
        [1.0, 0.0, 2.0]
    ]
