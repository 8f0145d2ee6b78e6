"""FSDP2: every process keeps a shard of the weights, the gradients and the optimizer's state.

One set of weights, two models. The trained one keeps shards, and gathers a layer only while it computes it,
in all processes at once. The whole one samples and scores, when every process goes its own way, and is empty
during an update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from handrail._util.errors import UserError
from handrail._util.launch import Fsdp


class ShardedModel:
    """``whole``: a plain model. ``trained``: the same model in shards, one per process."""

    def __init__(self, whole: Any, fsdp: Fsdp, device: torch.device) -> None:
        """Shard the weights that ``whole`` has in the main process. Raises UserError as ``shard``."""
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self.whole = whole.to(device)
        # transformers reads a checkpoint in one process of a host, and leaves zeros in the others.
        for buffer in self.whole.buffers():
            torch.distributed.broadcast(buffer, 0)
        self.trained = shard(without_weights(whole), fsdp, mesh)
        self.trained.load_state_dict(
            {name: cut for name, _, cut in self._cuts()}, strict=False, assign=True
        )  # strict would ask for tied weights and buffers
        transformers_model(self.trained).tie_weights()
        self.gather()

    @torch.no_grad()
    def scatter(self) -> None:
        """Set the shards to the weights that ``whole`` has in the main process, and the buffers to this
        process's."""
        for _, shard, cut in self._cuts():
            shard.copy_(cut)
        for own, buffer in zip(self.whole.buffers(), self.trained.buffers(), strict=True):
            buffer.copy_(own)
        self.gather()

    def _cuts(self) -> Iterator[tuple[str, DTensor, DTensor]]:
        """Yield the name, the shard and the new shard of every weight."""
        values = dict(self.whole.named_parameters())
        for name, shard in self.trained.named_parameters():
            yield name, shard, distribute_tensor(values[name].detach(), shard.device_mesh, shard.placements)

    @torch.no_grad()
    def gather(self) -> None:
        """Set the weights of ``whole`` to those of ``trained``."""
        for value, shard in zip(self.whole.parameters(), self.trained.parameters(), strict=True):
            value.data = shard.full_tensor()

    def release(self) -> None:
        """Free the weights of ``whole``, until ``gather``."""
        for value in self.whole.parameters():
            value.data = value.data.new_empty(0)


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


def without_weights(model: Any) -> Any:
    """Copy a model, its buffers too, with weights that take no memory."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, empty)


def transformers_model(model: Any) -> Any:
    """The model itself, or the one that adapters were added to."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def local(tensor: Tensor) -> Tensor:
    """This process's shard, or the whole tensor if it is not in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, weight: Tensor) -> Tensor:
    """Cut a whole ``value``, equal in every process, as ``weight`` is cut; a scalar stays whole."""
    if not isinstance(weight, DTensor) or value.ndim == 0:
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
