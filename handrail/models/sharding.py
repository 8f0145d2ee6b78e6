"""FSDP2: every process keeps a shard of the weights, the gradients and the optimizer's state.

One set of weights, two models. The trained one keeps shards, and gathers a layer only while it computes it,
in all processes at once. The whole one samples and scores, when every process goes its own way, and is empty
during an update. If something else samples, the whole one stays empty, and the processes score in turns with
the trained one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from handrail._util.errors import UserError
from handrail._util.launch import Fsdp

T = TypeVar("T")


class ShardedModel:
    """``whole``: a plain model. ``trained``: the same model in shards, one per process."""

    def __init__(
        self,
        whole: Any,
        fsdp: Fsdp,
        device: torch.device,
        apart: bool = False,
        keep_start: bool = False,
    ) -> None:
        """Shard the weights that ``whole`` has in the main process.

        ``apart``: True if ``whole`` is not needed to sample. It is then empty, except in ``at_hand``.
        ``keep_start``: True to keep a copy of the initial model, ``start``, in shards too.

        Raises UserError as ``shard``.
        """
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self.whole, self.device, self.apart = whole, device, apart
        if not apart:
            whole.to(device)
        self.trained = self._sharded(fsdp, mesh)
        self.start = self._sharded(fsdp, mesh).requires_grad_(False).eval() if keep_start else None
        if apart:
            self.release()
        else:
            self.gather()

    def _sharded(self, fsdp: Fsdp, mesh: DeviceMesh) -> Any:
        model = shard(without_weights(self.whole, self.device), fsdp, mesh)
        model.load_state_dict(
            {name: cut for name, _, cut in self._cuts(model)}, strict=False, assign=True
        )  # strict would ask for tied weights and buffers
        transformers_model(model).tie_weights()
        self._share_buffers(model)
        return model

    @torch.no_grad()
    def scatter(self) -> None:
        """Set the shards and the buffers to those that ``whole`` has in the main process."""
        for _, shard, cut in self._cuts(self.trained):
            shard.copy_(cut)
        self._share_buffers(self.trained)
        if not self.apart:
            self.gather()

    def _cuts(self, model: Any) -> Iterator[tuple[str, DTensor, DTensor]]:
        """Yield the name, the shard in ``model`` and the new shard of every weight."""
        values, is_main = dict(self.whole.named_parameters()), torch.distributed.get_rank() == 0
        for name, shard in model.named_parameters():
            if is_main:
                value = values[name].detach().to(self.device)
            else:
                value = torch.empty(shard.shape, dtype=shard.dtype, device=self.device)
            yield name, shard, distribute_tensor(value, shard.device_mesh, shard.placements)

    def _share_buffers(self, model: Any) -> None:
        # The weights are read in one process of a host or of all, and the others have zeros or no data.
        for own, buffer in zip(self.whole.buffers(), model.buffers(), strict=True):
            if not own.is_meta:
                buffer.copy_(own)
            torch.distributed.broadcast(buffer, 0)
            if not own.is_meta:
                own.copy_(buffer)

    @torch.no_grad()
    def gather(self) -> None:
        """Set the weights of ``whole`` to those of ``trained``; in the memory of the main process's host if
        they are ``apart``."""
        keep = not self.apart or torch.distributed.get_rank() == 0
        for value, shard in zip(self.whole.parameters(), self.trained.parameters(), strict=True):
            full = shard.full_tensor()
            if keep:
                value.data = full.cpu() if self.apart else full

    def release(self) -> None:
        """Free the weights of ``whole``, until ``gather``."""
        for value in self.whole.parameters():
            value.data = value.data.new_empty(0)

    def reshard(self) -> None:
        """Free what calls without a backward pass have gathered."""
        for model in filter(None, (self.trained, self.start)):
            for part in model.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Enclose work of the main process with ``whole``, in all processes at once."""
        if not self.apart:
            yield
            return
        self.gather()
        try:
            yield
        finally:
            self.release()


class Turns:
    """Turns at a model in shards: each process has calls of its own, and all must take part in each.

    The calls between two ``join`` of a process may be of any number, in any order.
    """

    def __init__(self, model: ShardedModel, idle: Callable[[int], object]) -> None:
        """``idle(kind)``: takes part in another process's call of that kind, a number from 1."""
        self.model, self.idle = model, idle
        self.broken = False
        """True if a call has failed: the others are still in it, and will not come where processes meet."""

    def take(self, kind: int, work: Callable[[], T]) -> T:
        """Return ``work()``, a call of ``kind``, in which all processes take part."""
        while (turn := self._next(kind)) != kind:
            self._call(partial(self.idle, turn))
        return self._call(work)

    def join(self) -> None:
        """Take part in the others' calls until each process has joined."""
        while turn := self._next(0):
            self._call(partial(self.idle, turn))

    def _call(self, work: Callable[[], T]) -> T:
        self.broken = True
        result = work()
        self.broken = False
        self.model.reshard()
        return result

    def _next(self, wanted: int) -> int:
        turn = torch.tensor(wanted, device=self.model.device)
        torch.distributed.all_reduce(turn, torch.distributed.ReduceOp.MAX)
        return int(turn)


def shard(model: Any, fsdp: Fsdp, mesh: DeviceMesh) -> Any:
    """Shard ``model`` in place, every layer on its own and the rest together. Raises UserError as
    ``layers``."""
    for layer in layers(model, fsdp):
        fully_shard(layer, mesh=mesh, reshard_after_forward=fsdp.reshard_after_forward)
    # The output layer is used after the model's own forward pass, so the rest stays gathered until backward.
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def layers(model: Any, fsdp: Fsdp) -> list[nn.Module]:
    """The layers that are gathered one at a time. Raises UserError if a named one does not exist."""
    names = transformers_model(model)._no_split_modules or () if fsdp.layers is None else fsdp.layers
    known = {type(module).__name__ for module in model.modules()}
    if fsdp.layers and (missing := [name for name in names if name not in known]):
        raise UserError(
            f"accelerate launch: fsdp_transformer_layer_cls_to_wrap names {missing[0]}, which is no layer of "
            "the model; leave it out"
        )
    return [module for module in model.modules() if type(module).__name__ in names]


def without_weights(model: Any, device: torch.device) -> Any:
    """Copy a model to ``device``, with weights that take no memory and buffers of any value."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    empty |= {id(buffer): torch.empty_like(buffer, device=device) for buffer in model.buffers()}
    return copy.deepcopy(model, empty)


def transformers_model(model: Any) -> Any:
    """The model itself, or the one that adapters were added to."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def local(tensor: Tensor) -> Tensor:
    """This process's shard, or the whole tensor if it is not in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered in all processes at once if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, weight: Tensor) -> Tensor:
    """Cut a whole ``value``, equal in every process, as ``weight`` is cut; a scalar stays whole."""
    if not isinstance(weight, DTensor) or value.ndim == 0:
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
