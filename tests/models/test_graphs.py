"""Sampling with fixed shapes, which a GPU repeats as CUDA graphs (tests/gpu), draws the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from handrail.models import attention
from handrail.models.cached import CachedModel
from handrail.models.generate import Completion, generate
from handrail.models.graphs import REFUSED, GraphedModel, can_repeat
from tests.models.test_generate import ATTENTION, ENDS, PROMPTS, made, words

__all__ = ["words"]  # a fixture


class Small(GraphedModel):
    """Grows and loses rows often."""

    ROOM = 4


@pytest.mark.parametrize("ends", [ENDS, {129}])
@pytest.mark.parametrize("kind", ["grouped queries", "counted positions"])
def test_fixed_shapes_draw_the_same(kind: str, ends: set[int], words: Path, tmp_path: Path) -> None:
    model = made(ATTENTION[kind], words, tmp_path).bare_model.eval()

    def drawn(cached: type[CachedModel]) -> list[Completion]:
        limits = [20, 3, 17] * 16
        return generate(model, PROMPTS * 16, range(48), limits, 1.0, ends, kind=cached)

    expected, found = drawn(CachedModel), drawn(Small)
    assert len({len(each.tokens) for each in expected}) > 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens) and one.finished == other.finished
        torch.testing.assert_close(one.logp, other.logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.entropy, other.entropy, atol=1e-5, rtol=0)


def test_half_of_the_rows_stay_at_a_time(words: Path, tmp_path: Path) -> None:
    model = made(ATTENTION["grouped queries"], words, tmp_path).bare_model.eval()
    with torch.inference_mode():
        cached = Small(model, [[1], [2], [3], [4], [5]])
        assert cached.remaining(torch.tensor([True, False, False, True, False])) is None
        kept = cached.remaining(torch.tensor([True, False, False, True, True]))
        assert kept is not None and kept.tolist() == [1, 2]
        kept = cached.remaining(torch.tensor([True, True, False, True, True]))
        assert kept is not None and kept.tolist() == [2, 0]
        kept = cached.remaining(torch.ones(5, dtype=torch.bool))
        assert kept is not None and kept.tolist() == []


@pytest.mark.parametrize(("kind", "repeats"), [(CachedModel, False), (Small, True)])
def test_only_fixed_shapes_are_said_to_repeat(
    kind: type[CachedModel], repeats: bool, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def shares(query: torch.Tensor, *others: torch.Tensor) -> bool:
        seen.append((query.shape[2] == 1, attention.REPEATS.get()))
        return True

    model = made(ATTENTION["grouped queries"], words, tmp_path).bare_model.eval()
    monkeypatch.setattr(attention, "shares", shares)
    generate(model, [[1, 2], [3, 4, 5]], range(2), [4, 4], 1.0, set(), kind=kind)
    assert {told for alone, told in seen if alone} == {repeats}
    assert {told for alone, told in seen if not alone} == {False}


class OnGpu(nn.Module):
    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("operation not permitted when stream is capturing"), True),
    ],
)
def test_a_lack_of_memory_is_no_reason_to_give_graphs_up(
    error: Exception, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(graph: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", full)
    cached = GraphedModel.__new__(GraphedModel)
    cached.model = OnGpu()
    assert cached._repeated() == cached._step
    assert (cached.model in REFUSED) == refused


def test_a_cpu_needs_no_graphs(words: Path, tmp_path: Path) -> None:
    assert not can_repeat(made(ATTENTION["grouped queries"], words, tmp_path).bare_model)
