"""Choose the problems of a step: a pure function of the seed and the step number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from handrail._util.errors import UserError
from handrail._util.seeds import derive
from handrail.types.problem import Problem


class ProblemSampler:
    """Give every step a fixed quota of each source, and shuffle a source anew for each pass."""

    def __init__(
        self, sources: Sequence[Sequence[Problem]], shares: Sequence[float], per_step: int, seed: int
    ) -> None:
        self.sources, self.seed = sources, seed
        self.quotas = apportion(shares, per_step)
        self._order = lru_cache(maxsize=2 * len(sources))(self._shuffled_order)

    def problems(self, step: int) -> list[Problem]:
        """Return the problems of step ``step`` (from 1), with the sources mixed."""
        chosen = [
            self._at(source, position)
            for source, quota in enumerate(self.quotas)
            for position in range((step - 1) * quota, step * quota)
        ]
        random.Random(derive("mix", self.seed, step)).shuffle(chosen)
        return chosen

    def _at(self, source: int, position: int) -> Problem:
        epoch, place = divmod(position, len(self.sources[source]))
        return self.sources[source][self._order(source, epoch)[place]]

    def _shuffled_order(self, source: int, epoch: int) -> list[int]:
        order = list(range(len(self.sources[source])))
        random.Random(derive("epoch", self.seed, source, epoch)).shuffle(order)
        return order


def apportion(shares: Sequence[float], seats: int) -> list[int]:
    """Divide ``seats`` in proportion to the shares (largest remainder). Raises UserError if a quota is 0."""
    exact = [share / sum(shares) * seats for share in shares]
    quotas = [int(value) for value in exact]
    for place in sorted(range(len(shares)), key=lambda i: quotas[i] - exact[i])[: seats - sum(quotas)]:
        quotas[place] += 1
    if not all(quotas):
        raise UserError(
            f"data.train: source {quotas.index(0) + 1} gets none of the {seats} problems of a step; "
            "raise its share or train.problems_per_step"
        )
    return quotas
