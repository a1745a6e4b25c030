"""Parameters to layers: which tensors share a rate, what is asked of them, and where each layer's numbers live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lwas_fast.selection import HALF, Selection, state_dtype
from lwas_fast.shards import Shards, copies_of, mesh_of, why_hidden
from lwas_fast.table import Column

Groups: TypeAlias = "Sequence[dict[str, Any]]"
Grouping: TypeAlias = "Callable[[str], str] | Mapping[str, str] | nn.Module | None"

FUSED_DTYPES = (torch.float32, *HALF)  # of parameters that compiled code and Triton take


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (nested lists or an array) as a tensor on a device, without waiting for it."""
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu")  # whatever torch.set_default_device says
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def parameter_name(group: dict[str, Any], i: int) -> str:
    """The i-th parameter of a group, for messages."""
    names = group.get("param_names")
    return repr(names[i]) if names else f"number {i} of its group, of shape {tuple(group['params'][i].shape)}"


def check_dense(groups: Groups, gradient_of: Callable[[Tensor], Tensor | None]) -> None:
    """Refuse sparse gradients.

    Raises:
        TypeError: Names the parameter and the way out.
    """
    for group in groups:
        for i, param in enumerate(group["params"]):
            gradient = gradient_of(param)
            if gradient is not None and gradient.layout != torch.strided:
                raise TypeError(
                    f"the gradient of parameter {parameter_name(group, i)} is sparse, which has no curvature pass: "
                    "make it dense (sparse=False in nn.Embedding) or give it an optimizer of its own"
                )


def module_of(name: str) -> str:
    """The module that a parameter name belongs to: ``"conv1.weight"`` -> ``"conv1"``.

    A parametrized tensor (``"conv1.parametrizations.weight.original0"``) belongs to the module that uses it; a
    parameter of the root module is a layer of its own.
    """
    owner, parametrized, _ = name.partition(".parametrizations.")
    return owner if parametrized else name.rpartition(".")[0] or name


def layer_names(params: Sequence[Tensor], names: Sequence[str] | None, rule: Grouping, first: int = 0) -> list[str]:
    """Name the layer of each parameter.

    Args:
        params: The parameters of one group.
        names: Their names, or None when the optimizer was given bare tensors.
        rule: The optimizer's ``layers=``; for a module its own names, for None a layer a module, or a tensor.
        first: Number of parameters in earlier groups, to number nameless ones.

    Raises:
        TypeError: The rule is of another kind or does not give strings.
        ValueError: The rule needs names that are not there, or leaves a parameter out.
    """
    if isinstance(rule, nn.Module):
        known: dict[Tensor, str] = {param: name for name, param in rule.named_parameters()}
        if missing := [first + i for i, param in enumerate(params) if param not in known]:
            raise ValueError(
                f"layers={type(rule).__name__}(...): parameter {missing[0]} is not one of that module's; "
                "pass the module whose parameters the optimizer gets"
            )
        names, rule = [known[param] for param in params], None
    if rule is None:
        return [module_of(name) for name in names] if names else [f"param{first + i}" for i in range(len(params))]
    if not callable(rule) and not isinstance(rule, Mapping):
        raise TypeError(f"layers= must be a callable, a mapping or a module, not {type(rule).__name__}")
    if names is None:
        raise ValueError("layers= works on names: pass model.named_parameters(), not model.parameters()")
    if isinstance(rule, Mapping):
        if left_out := [name for name in names if name not in rule]:
            raise ValueError(f"layers= has no layer for parameter {left_out[0]!r}; every parameter needs one")
        found = [rule[name] for name in names]
    else:
        found = [rule(name) for name in names]
    for name, layer in zip(names, found, strict=True):
        if not isinstance(layer, str):
            raise TypeError(f"layers= gave {layer!r} for parameter {name!r}; a layer's name must be a string")
    return found


@dataclass
class Bucket:
    """The layers of one parameter group on one device and mesh; a rate never spans two buckets.

    Attributes:
        group: Index of the parameter group.
        params: Its parameters on this device, those of a layer side by side.
        row: For each parameter, the row of its layer in `table`; does not decrease.
        names: Layer names, one for each row.
        table: (L, len(Column)), each layer's statistics: see table.Column.
        decays: For each parameter, whether weight decay acts on it.
        steps: (N,) float32, the updates that each parameter has had.
        counts: Views of `steps`, one for each parameter.
        dtypes: The parameters', when they were laid out.
        mesh: The ``DeviceMesh`` over which the parameters are distributed; None where they are this process's own.
        mixed: Whether its layers have tensors of which unlike numbers of processes hold the same part.
    """

    group: int
    params: list[Tensor]
    row: list[int]
    names: list[str]
    table: Tensor
    decays: list[bool]
    steps: Tensor
    counts: list[Tensor]
    mesh: Any = None
    mixed: bool = False
    _selections: dict[tuple[int, ...], Selection] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtypes = [param.dtype for param in self.params]

    def select(self, indices: Sequence[int]) -> Selection:
        """The selection of these tensors (positions in `params`), made once for each pattern."""
        key = tuple(indices)
        if key not in self._selections:
            if len(self._selections) >= 4 * len(self.names) + 64:  # patterns that never come back must not pile up
                self._selections.clear()
            self._selections[key] = self._make(key)
        return self._selections[key]

    def _make(self, indices: tuple[int, ...]) -> Selection:
        rows = sorted({self.row[i] for i in indices})
        position = {row: s for s, row in enumerate(rows)}
        layer = [position[self.row[i]] for i in indices]
        members: list[list[int]] = [[] for _ in rows]
        for n, s in enumerate(layer):
            members[s].append(n)
        width = max(map(len, members))
        device = self.table.device
        index = upload([m + [len(indices)] * (width - len(m)) for m in members], torch.int64, device)
        sizes = [sum(self.params[indices[n]].numel() for n in m) for m in members]
        elements = upload(sizes, torch.int64, device)
        contiguous = rows == list(range(rows[0], rows[-1] + 1))
        which = slice(rows[0], rows[-1] + 1) if contiguous else upload(rows, torch.int64, device)
        where = torch.tensor(
            [[self.row[i], i, self.decays[i], sizes[s]] for i, s in zip(indices, layer, strict=True)], device="cpu"
        )
        decays = [n for n, i in enumerate(indices) if self.decays[i]]
        owner = upload(layer, torch.int64, device)
        places = slice(None) if len(indices) == len(self.params) else upload(indices, torch.int64, device)
        params = [self.params[i] for i in indices]
        shards = None if self.mesh is None else Shards(self.mesh, params, layer)
        dtype = self.table.dtype
        return Selection(indices, params, which, layer, index, owner, places, elements, where, decays, dtype, shards)


class Layout:
    """Every group's layers, and the state and statistics of each.

    Args:
        groups: The optimizer's parameter groups, each with ``layer_names``.
        state: The optimizer's state; ``state[p]["layer"]`` is p's layer's row, where it is there.
        buffers_of: Names of the state tensors, shaped like the parameter, that a group keeps.
        scalars: Names of those without dimension.

    Raises:
        ValueError: A group has other parameters than it was made with, and not as many, or of FSDP1 or ZeRO-3.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        buffers_of: Callable[[dict[str, Any]], tuple[str, ...]],
        scalars: tuple[str, ...] = (),
    ):
        self.groups, self.state, self._buffers_of, self._scalars = groups, state, buffers_of, scalars
        for number, group in enumerate(groups):
            for i, param in enumerate(group["params"]):  # somebody may have put others there
                if (why := why_hidden(param)) is not None:
                    raise ValueError(f"parameter {parameter_name(group, i)} is {why[0]}: {why[1]}")
            if len(group["params"]) != len(group["layer_names"]):
                raise ValueError(
                    f"parameter group {number} was made with {len(group['layer_names'])} parameters and now has "
                    f"{len(group['params'])}: somebody put others there, as DeepSpeed's ZeRO does. Use fully_shard"
                )
        self._params = [list(group["params"]) for group in groups]
        self._decay_on = [group.get("weight_decay_on") for group in groups]
        # What took part in the last step, and all entries of `state` then: to look each up costs more than a step.
        self._states: dict[Selection, list[dict[str, Any]]] = {}
        self._entries: tuple[list[Tensor], list[dict[str, Any]]] = ([], [])

    @cached_property
    def buckets(self) -> list[Bucket]:
        """In the order of groups. ``state[p]["layer"]`` and ``state[p]["step"]`` are made views of theirs.

        Laid out when first asked for, that is late: a model may move to its device after the optimizer was made.

        Raises:
            ValueError: A layer's tensors are on two devices or meshes.
        """
        return [bucket for number in range(len(self.groups)) for bucket in self._buckets_of(number)]

    def is_of(self, groups: Groups, state: MutableMapping[Tensor, dict[str, Any]]) -> bool:
        """Whether these are the groups, with the parameters, and the state that were laid out; decaying as then."""
        if self.groups is not groups or self.state is not state or len(groups) != len(self._params):
            return False
        if [group.get("weight_decay_on") for group in groups] != self._decay_on:
            return False
        pairs = zip(self._params, (group["params"] for group in groups), strict=True)
        return all(len(known) == len(now) and all(map(is_, known, now)) for known, now in pairs)

    def fits(self) -> bool:
        """Whether the parameters have the dtypes that they were laid out with."""
        return all(bucket.dtypes == [param.dtype for param in bucket.params] for bucket in self.buckets)

    def _buffers(self) -> Iterator[tuple[dict[str, Any], int, Tensor, str]]:
        for group in self.groups:
            for i, param in enumerate(group["params"]):
                entry = self.state.get(param, {})
                yield from ((group, i, param, name) for name in self._buffers_of(group) if name in entry)

    def check_shapes(self) -> None:
        """Refuse states of other shapes than their parameters'.

        Raises:
            ValueError: Names the parameter.
        """
        for group, i, param, name in self._buffers():
            if (shape := self.state[param][name].shape) != param.shape:
                raise ValueError(
                    f"parameter {parameter_name(group, i)} had shape {tuple(shape)} when it took its last step, and "
                    f"now has {tuple(param.shape)}: put a new nn.Parameter into the model and into opt.param_groups, "
                    "or drop its entry of opt.state"
                )

    def check_whole(self, optimizer: str) -> None:
        """Refuse sharded parameters, of which no process has all that a direction needs.

        Raises:
            ValueError: Names the parameter and the optimizer.
        """
        for bucket in self.buckets:
            if bucket.mesh is not None:
                i = next(i for i, p in enumerate(self.groups[bucket.group]["params"]) if p is bucket.params[0])
                raise ValueError(
                    f"parameter {parameter_name(self.groups[bucket.group], i)} is distributed, and {optimizer} "
                    "orthogonalizes whole matrices: take AdamWLW, or DistributedDataParallel instead of sharding"
                )

    def recast(self) -> None:
        """Have states follow parameters that somebody cast or moved in mid-training; then lay out anew."""
        self.check_shapes()
        for group in self.groups:
            for param in group["params"]:
                entry = self.state.get(param, {})
                for what in entry.keys() & {*self._buffers_of(group), *self._scalars}:
                    entry[what] = entry[what].to(param.device, state_dtype(param))

    @cached_property
    def home(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter."""
        return {param: group for group in self.groups for param in group["params"]}

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order of groups."""
        return [p for group in self.groups for p in group["params"]]

    def group_of(self, bucket: Bucket) -> dict[str, Any]:
        """The parameter group that a bucket is of."""
        return self.groups[bucket.group]

    def state_of(self, bucket: Bucket, i: int) -> dict[str, Any]:
        """The state of a bucket's i-th parameter; zeros, not yet entered in `state`, before its first step."""
        param, count = bucket.params[i], bucket.counts[i]
        if state := self.state.get(param):
            if state["step"] is not count:  # somebody put another one there
                state["step"] = count.copy_(state["step"])
            return state
        count.zero_()  # of a state that was thrown away
        zeros = {
            name: torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
            for name in self._buffers_of(self.group_of(bucket))
        }
        zeros |= {name: torch.zeros((), dtype=state_dtype(param), device=param.device) for name in self._scalars}
        # Views of the bucket's: a layer's numbers travel with its parameters.
        return {"step": count, **zeros, "layer": bucket.table[bucket.row[i]]}

    def states_of(self, bucket: Bucket, selection: Selection) -> list[dict[str, Any]]:
        """The states of a selection's parameters: see `state_of`."""
        if (states := self._states.get(selection)) is not None and self._nothing_replaced():
            counts = (
                bucket.counts if len(states) == len(bucket.counts) else [bucket.counts[i] for i in selection.indices]
            )
            if all(map(is_, [state.get("step") for state in states], counts)):
                return states
        return [self.state_of(bucket, i) for i in selection.indices]

    def enter(self, states: dict[Selection, list[dict[str, Any]]]) -> None:
        """Put states that are about to take a step into `state`, where they are not there yet."""
        if all(self._states.get(selection) is found for selection, found in states.items()):
            return
        for param in (p for selection in states for p in selection.params if p not in self.state):
            # Its first step. In mid-training (it was frozen), and if it was not measured with this step: with the next.
            group = self.home[param]
            if group["steps"] > 0 and group.get("last_refresh") != group["steps"]:
                group["next_refresh"] = min(group["next_refresh"], group["steps"])
        for selection, found in states.items():
            self.state.update(zip(selection.params, found, strict=True))
        self._states, self._entries = states, (list(self.state), list(self.state.values()))

    def keep(self, bucket: Bucket, selection: Selection) -> None:
        """Make states of tensors that were measured and do not step, or copies and files would lack their numbers."""
        for i, param in zip(selection.indices, selection.params, strict=True):
            if param.grad is None and param not in self.state:
                self.state[param] = self.state_of(bucket, i)

    def attach(self) -> None:
        """Make the layers' rows in `state` views of the tables again, where somebody moved or copied them.

        Where nothing is laid out yet it stays so, for the model may move.
        """
        for bucket in self.__dict__.get("buckets", ()):
            for i, param in enumerate(bucket.params):
                if entry := self.state.get(param):
                    entry["layer"] = bucket.table[bucket.row[i]]

    def _nothing_replaced(self) -> bool:
        params, entries = self._entries
        same = len(params) == len(self.state) and all(map(is_, self.state, params))
        return same and all(map(is_, self.state.values(), entries))

    def _buckets_of(self, number: int) -> Iterator[Bucket]:
        group = self.groups[number]
        places: dict[tuple[torch.device, Any, bool], list[int]] = {}
        copies: dict[str, set[int]] = {}
        for param, layer in zip(group["params"], group["layer_names"], strict=True):
            copies.setdefault(layer, set()).add(copies_of(param))
        home: dict[str, tuple[torch.device, Any]] = {}
        for i, (param, layer) in enumerate(zip(group["params"], group["layer_names"], strict=True)):
            place = param.device, mesh_of(param)
            if home.setdefault(layer, place) != place:
                one, other = (
                    str(where) if mesh is None else f"{where}, distributed over {mesh}"
                    for where, mesh in (home[layer], place)
                )
                raise ValueError(
                    f"layer {layer!r} has tensors on {one} and on {other}; "
                    "give them layers of their own through layers="
                )
            places.setdefault((*place, len(copies[layer]) > 1), []).append(i)
        for (device, mesh, mixed), members in places.items():
            layers = [group["layer_names"][i] for i in members]
            rows = {name: r for r, name in enumerate(dict.fromkeys(layers))}
            members = [i for _, i in sorted(zip(map(rows.__getitem__, layers), members, strict=True))]
            params = [group["params"][i] for i in members]
            row = [rows[group["layer_names"][i]] for i in members]
            double = any(param.dtype == torch.float64 for param in params)
            dtype = torch.float64 if double else torch.float32
            table = torch.zeros(len(rows), len(Column), dtype=dtype, device=device)
            steps = torch.zeros(len(params), dtype=torch.float32, device=device)
            counts = list(steps.unbind())
            for i, (param, r) in enumerate(zip(params, row, strict=True)):
                if param in self.state and "layer" in self.state[param]:
                    table[r] = self.state[param]["layer"]
                    counts[i].copy_(self.state[param]["step"])
                    self.state[param] |= {"layer": table[r], "step": counts[i]}
            decays = [group.get("weight_decay_on") != "matrices" or param.ndim > 1 for param in params]
            yield Bucket(number, params, row, list(rows), table, decays, steps, counts, mesh, mixed)
