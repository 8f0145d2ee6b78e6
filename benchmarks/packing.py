"""Nanoseconds per token for packing trajectories with credit into micro-batches:
``python -m benchmarks.packing``."""

from __future__ import annotations

import time

import torch

from handrail.methods.batch import Sample, pack
from handrail.types.trajectory import Author, Trajectory

GROUPS, SIZE, LENGTH, ROUNDS = 16, 8, 500, 20


def samples() -> list[Sample]:
    """Rollouts as after the credit of a step with 16 groups of 8."""
    out = []
    for group in range(GROUPS):
        for place in range(SIZE):
            rollout = Trajectory.by(Author.POLICY, [group] * 100, range(LENGTH - place))
            logp = torch.randn(len(rollout))
            out.append(
                Sample(rollout.with_columns(sampling_logp=logp, old_logp=logp).with_advantage(0.5), 0.1, 0.1)
            )
    return out


def main() -> None:
    torch.set_num_threads(1)
    live = samples()
    tokens = sum(len(sample.trajectory) for sample in live)
    best = min(seconds(live) for _ in range(ROUNDS))
    print(f"{best / tokens * 1e9:.0f} ns a token, the best of {ROUNDS} rounds over {tokens} tokens")


def seconds(live: list[Sample]) -> float:
    started = time.perf_counter()
    list(pack(live, 8192))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
