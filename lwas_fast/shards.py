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


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return getattr(tensor, "_local_tensor", tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; of a DTensor or its part, but torch._foreach_ leaves no trace on these."""
    return tensor._version if mesh_of(tensor) is None else tensor._version + local(tensor)._version


def local_like(param: Tensor, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that belongs to a parameter: its gradient, say.

    Tensor parallelism may leave a gradient distributed otherwise than its parameter, also as parts of a sum.
    """
    if mesh_of(param) is None:
        return tensor
    if tensor.placements != param.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(tensor)


def local_state(state: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Some tensors of a parameter's state, as this process holds them."""
    return {name: local(state[name]) for name in names}


def why_hidden(param: Tensor) -> tuple[str, str] | None:
    """What makes a parameter another tensor than the model's, of which no layer can be told, and the way out."""
    if type(param).__name__ == "FlatParameter" or hasattr(param, "_fsdp_flattened"):
        return "part of FullyShardedDataParallel (FSDP1)", "use fully_shard (FSDP2)"
    return ("part of DeepSpeed's ZeRO-3", "use fully_shard (FSDP2)") if hasattr(param, "ds_id") else None


def copies_of(param: Tensor) -> int:
    """How many processes of its mesh hold the same part of a parameter; 1 of an ordinary one."""
    mesh = mesh_of(param)
    if mesh is None:
        return 1
    places = enumerate(param.placements)  # type: ignore[attr-defined]
    return math.prod(mesh.size(dim) for dim, place in places if place.is_replicate())


class Shards:
    """How the tensors of a selection, all on one mesh, are spread over its processes.

    All processes of the mesh add up their parts, those of which there are copies by their share: a sum over a part of
    the mesh could differ in the last bit from that over another, and so would the weights from there on.

    Args:
        mesh: Theirs.
        params: The tensors, DTensors all.
        layer: For each, its layer's number: 0, 1, ..., in order.

    Attributes:
        mesh: See above.
        copies: (N,) float64, for each tensor, how many processes hold the same part of it.
        of_layers: (S, 1) float64, likewise for each layer, of its first tensor.
    """

    def __init__(self, mesh: Any, params: Sequence[Tensor], layer: Sequence[int]):
        self.mesh = mesh
        found, device = list(map(copies_of, params)), params[0].device
        firsts = [found[layer.index(number)] for number in dict.fromkeys(layer)]
        self._single = set(found) == {1}
        self.copies = torch.tensor(found, dtype=torch.float64, device=device)  # once, for it waits for the device
        self.of_layers = torch.tensor(firsts, dtype=torch.float64, device=device).view(-1, 1)

    def share(self, values: Tensor) -> Tensor:
        """This process's share in sums of numbers of tensors, (N, ...)."""
        return values if self._single else values / self.copies.to(values).view(-1, *[1] * (values.dim() - 1))

    def share_of_layers(self, sums: Tensor) -> Tensor:
        """Likewise of sums over layers, (S, ...), where a layer's tensors have as many copies."""
        return sums if self._single else sums / self.of_layers.to(sums)

    @cached_property
    def groups(self) -> list[Any]:
        """The process groups over which parts are added up: one; of old releases of torch perhaps one a dimension."""
        return groups_of(self.mesh)


def add_up(values: Sequence[Tensor], of: Sequence[Shards | None], average: bool = False) -> list[Tensor]:
    """Sum tensors over the processes that hold parts of what they are of; all get the same bits.

    Those of one mesh go in one message. What is not sharded is returned as it is; or if told to `average`, and other
    things are sharded, as its mean over the largest mesh: all of a measurement must be equal on all processes.
    """
    found = list(values)
    meshes = [shards for shards in of if shards is not None]
    if average and meshes and len(meshes) < len(of):
        largest = max(meshes, key=lambda shards: shards.mesh.size())
        found = [v if shards is not None else v / largest.mesh.size() for v, shards in zip(values, of, strict=True)]
        return add_up(found, [largest if shards is None else shards for shards in of])
    together: dict[Any, list[int]] = {}
    for i, shards in enumerate(of):
        if shards is not None and shards.groups:
            together.setdefault((shards.mesh.device_type, *map(id, shards.groups)), []).append(i)
    for members in together.values():
        shards = of[members[0]]
        assert shards is not None
        sums = summed([values[i] for i in members], shards.groups, shards.mesh.device_type)
        for i, of_all in zip(members, sums, strict=True):
            found[i] = of_all
    return found


def mean(values: Tensor, mesh: Any) -> Tensor:
    """Average numbers over all processes of a mesh."""
    (total,) = summed([values], groups_of(mesh), mesh.device_type)
    return total / float(mesh.size())


def groups_of(mesh: Any) -> list[Any]:
    """A process group of all processes of a mesh, in which a message gives each the same bits."""
    dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(dims) < 2:
        return [mesh.get_group(dim) for dim in dims]
    if mesh.size() == torch.distributed.get_world_size():
        return [torch.distributed.group.WORLD]
    flatten = getattr(mesh, "_flatten", None)  # the same on all its processes, so that they make the group together
    return [mesh.get_group(dim) for dim in dims] if flatten is None else [flatten().get_group()]


def summed(values: Sequence[Tensor], groups: Sequence[Any], device: str | None = None) -> list[Tensor]:
    """Sum tensors over the processes of some groups, one after the other, in one message to each.

    Numbers on the CPU go by way of `device`, where one is given: those of parameters that are offloaded, while
    processes talk on GPUs.
    """
    on = values[0].device
    flat = torch.cat([value.detach().flatten().to(on) for value in values])
    flat = flat.to(device) if device is not None and on.type == "cpu" else flat
    for group in groups:
        torch.distributed.all_reduce(flat, group=group)
    parts = torch.split(flat, [value.numel() for value in values])
    return [part.view_as(value).to(value) for part, value in zip(parts, values, strict=True)]


def _fsdp_groups(modules: Iterable[Any]) -> Iterator[Any]:
    """What FSDP2 keeps of each group of parameters of some modules that it gathers together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if issubclass(type(module), fsdp.FSDPModule):  # by type(): the __class__ of a proxy may run anything
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            yield from (group for group in groups if group is not None)


def _parts(model: nn.Module | None) -> Iterable[nn.Module]:
    return () if model is None else model.modules()


def _all_sharded() -> Iterable[Any]:
    """Every module alive that FSDP2 may manage, and others."""
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    return gc.get_objects() if known is None else list(known)


def gradients_held_back(model: nn.Module | None) -> bool:
    """Whether FSDP2 was told not to reduce gradients yet, or not over all processes.

    By ``set_requires_gradient_sync(False)`` or ``set_requires_all_reduce(False)``.
    """
    flags = ("reduce_grads", "all_reduce_grads")
    return any(not getattr(group, flag, True) for group in _fsdp_groups(_parts(model)) for flag in flags)


def computed_in(model: nn.Module | None) -> torch.dtype | None:
    """The dtype that FSDP2's mixed precision casts weights to; None if there is none."""
    policies = (getattr(group, "mp_policy", None) for group in _fsdp_groups(_parts(model)))
    return next(filter(None, (getattr(policy, "param_dtype", None) for policy in policies)), None)


def loss_factor(model: nn.Module | None) -> float:
    """What the mean of the processes' losses is to be multiplied by to be the loss that FSDP2's gradients are of.

    Not 1 after ``set_gradient_divide_factor``, with a loss that each process divided by what is known of all, say.
    """
    for group in _fsdp_groups(_parts(model)):
        factor, mesh = getattr(group, "gradient_divide_factor", None), getattr(group, "mesh_info", None)
        return 1.0 if factor is None or mesh is None else float(mesh.mesh.size() / factor)
    return 1.0


def reshard(model: nn.Module | None) -> None:
    """Have FSDP2 gather parameters anew when they are next needed, for they have been changed.

    Args:
        model: Whose; if that is not known, of every module that is alive.
    """
    for group in _fsdp_groups(_all_sharded() if model is None else model.modules()):
        group._to_sharded()  # not reshard(), which leaves the root's gathered where a call of it was broken off
