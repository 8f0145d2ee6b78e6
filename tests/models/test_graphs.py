"""Sampling with fixed shapes, which a GPU repeats as CUDA graphs (tests/gpu), draws the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handrail.models.cached import CachedModel
from handrail.models.generate import Completion, generate
from handrail.models.graphs import GraphedModel, can_repeat
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


def test_a_cpu_needs_no_graphs(words: Path, tmp_path: Path) -> None:
    assert not can_repeat(made(ATTENTION["grouped queries"], words, tmp_path).bare_model)
