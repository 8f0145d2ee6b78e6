"""Count on a CPU what would wait for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select")
INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")


class Waits(TorchDispatchMode):
    """Counts the numbers that are read, and the choices by a mask, whose size must be read."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        chosen = args[1] if name in INDEXES else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in chosen)
        self.count += by_mask or name in READS
        return func(*args, **(kwargs or {}))
