"""Parameters of which each process holds a part: ``DTensor``, as FSDP2 (`fully_shard`) and tensor parallelism make it.

All arithmetic is done on the parts. What it takes of the whole are sums over a layer, a few numbers each, which are
added up over the processes in one message.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


def mesh_of(tensor: Tensor) -> Any:
    """The ``DeviceMesh`` over which a tensor is distributed; None where it is an ordinary one."""
    return getattr(tensor, "device_mesh", None)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor if mesh_of(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; of a DTensor or its part, but torch._foreach_ leaves no trace on these."""
    return tensor._version if mesh_of(tensor) is None else tensor._version + local(tensor)._version


def like(param: Tensor, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that belongs to a parameter: its gradient, say.

    Tensor parallelism may leave a gradient distributed otherwise than its parameter, also as parts of a sum.
    """
    if mesh_of(param) is None:
        return tensor
    if tensor.placements != param.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(tensor)


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state, of which each tensor is what this process holds."""
    return {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}


class Shards:
    """How the tensors of a selection, all on one mesh, are spread over processes.

    Args:
        mesh: Theirs.
        params: The tensors, DTensors all.

    Attributes:
        weights: For each tensor, one over the processes that hold the same part of it, where these add up their parts.
        even: Whether that is 1 for all, as under FSDP2.
    """

    def __init__(self, mesh: Any, params: Sequence[Tensor]):
        self.mesh = mesh
        spread = [[not place.is_replicate() for place in p.placements] for p in params]  # type: ignore[attr-defined]
        self._dims = [dim for dim in range(mesh.ndim) if any(places[dim] for places in spread)]
        copies = [[mesh.size(dim) for dim in self._dims if not places[dim]] for places in spread]
        self.weights = [1 / math.prod(sizes) for sizes in copies]
        self.even = all(weight == 1 for weight in self.weights)

    def share(self, values: Tensor) -> Tensor:
        """This process's share in sums of numbers of tensors, (N, ...)."""
        if self.even:
            return values
        weights = torch.tensor(self.weights, dtype=values.dtype, device="cpu").to(values.device)
        return values * weights.view(-1, *[1] * (values.dim() - 1))

    @cached_property
    def groups(self) -> list[Any]:
        """The process groups over which parts are added up, one after the other: one, most often."""
        return _groups(self.mesh, self._dims)


def add_up(values: Sequence[Tensor], of: Sequence[Shards | None]) -> list[Tensor]:
    """Sum tensors over the processes that hold parts of what they are of; all get the same bits.

    Those of one mesh go in one message; what is not sharded is returned as it is.
    """
    found = list(values)
    together: dict[Any, list[int]] = {}
    for i, shards in enumerate(of):
        if shards is not None and shards.groups:
            together.setdefault((shards.mesh.device_type, *map(id, shards.groups)), []).append(i)
    for members in together.values():
        shards = of[members[0]]
        assert shards is not None
        dtype = torch.float64 if any(values[i].dtype == torch.float64 for i in members) else torch.float32
        flat = torch.cat([values[i].detach().flatten().to(values[members[0]].device, dtype) for i in members])
        flat = _summed(flat, shards.groups, shards.mesh.device_type)
        for i, part in zip(members, torch.split(flat, [values[i].numel() for i in members]), strict=True):
            found[i] = part.view_as(values[i]).to(values[i])
    return found


def mean(values: Tensor, mesh: Any) -> Tensor:
    """Average numbers over all processes of a mesh."""
    total = _summed(values, _groups(mesh, list(range(mesh.ndim))), mesh.device_type)
    return total / float(mesh.size())


def _groups(mesh: Any, dims: list[int]) -> list[Any]:
    if len(dims) == mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        return [torch.distributed.group.WORLD]
    return [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]


def _summed(values: Tensor, groups: list[Any], device: str) -> Tensor:
    # Of parameters that are offloaded to the CPU, to where the processes talk.
    there = values.detach().to(device if values.is_cpu else values.device, copy=True)
    for group in groups:
        torch.distributed.all_reduce(there, group=group)
    return there.to(values.device)


def _fsdp_states(modules: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The modules among these that FSDP2 manages, each with what it keeps of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in modules:
            if issubclass(type(module), fsdp.FSDPModule):  # by type(): the __class__ of a proxy may run anything
                yield module, module._get_fsdp_state()


def gradients_held_back(model: nn.Module | None) -> bool:
    """Whether FSDP2 was told not to reduce gradients yet: ``set_requires_gradient_sync(False)``."""
    for _, state in _fsdp_states(() if model is None else model.modules()):
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        return any(group is not None and not group.reduce_grads for group in groups)
    return False


def computed_in(model: nn.Module | None) -> torch.dtype | None:
    """The dtype that FSDP2's mixed precision casts weights to; None if there is none."""
    dtypes = (state._mp_policy.param_dtype for _, state in _fsdp_states(() if model is None else model.modules()))
    return next(filter(None, dtypes), None)


def reshard(model: nn.Module | None) -> None:
    """Have FSDP2 gather parameters anew when they are next needed, for they have been changed.

    Args:
        model: Whose; if that is not known, of every module that is alive.
    """
    for module, _ in _fsdp_states(gc.get_objects() if model is None else model.modules()):
        module.reshard()
