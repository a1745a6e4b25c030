"""Parameter groups: what is checked of a new one, and the layers that it is made of.

Besides its options a group has ``layer_names`` (one a parameter), ``steps`` taken, the steps ``last_refresh`` and
``next_refresh`` of its measurements (rates/when.py), ``train_mode`` (whether its parameters hold the weights to train
on), ``share`` (the average's in them, at the last step; update/average.py), and for loggers ``effective_lr``: the
median of its layers' measured rates, times ``lr``, as of the last measurement.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lwas_fast import options
from lwas_fast.layers import Grouping, layer_names
from lwas_fast.shards import why_hidden


def _checked_parameters(param_group: dict[str, Any], number: int) -> dict[str, Any]:
    """Copy a group, drop repeated (tied) tensors, and check its parameters."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
    group = dict(param_group)
    entries = group["params"]
    if isinstance(entries, set):
        raise TypeError("the parameters of a group must be in an ordered collection, such as a list, not in a set")
    entries = [entries] if isinstance(entries, Tensor) else list(entries)
    unique: dict[Any, Any] = {}
    for entry in entries:
        unique.setdefault(entry[1] if isinstance(entry, tuple) else entry, entry)  # the first name stands
    group["params"] = list(unique.values())
    for i, entry in enumerate(group["params"]):
        param = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(param, Tensor):
            raise TypeError(f"parameters must be tensors, not {type(param).__name__}")
        name = repr(entry[0]) if isinstance(entry, tuple) else f"{i} of group {number}"
        hidden = why_hidden(param)
        for bad, kind, remedy in (
            (param.is_complex(), "complex", "optimize torch.view_as_real of it"),
            (param.layout != torch.strided, "sparse", "make it dense"),
            (not param.is_floating_point() and not param.is_complex(), "not floating-point", "leave it out"),
            (
                any(place.is_partial() for place in getattr(param, "placements", ())),
                "a DTensor of parts that are to be summed up",
                "redistribute it, to Shard or Replicate",
            ),
            (hidden is not None, *(hidden or ("", ""))),
        ):
            if bad:
                raise ValueError(f"parameter {name} is {kind}: {remedy}")
    return group


def refuse_part_of_model(optimizer: str) -> None:
    """Refuse to be made by what gives each process other parameters, all of its own: no step would be of the model.

    Raises:
        ValueError: ``ZeroRedundancyOptimizer`` is making it.
    """
    caller: FrameType | None = sys._getframe(1)
    for _ in range(8):  # constructors of ours and of torch's lie between
        if caller is None:
            return
        # Not by f_locals, which would keep alive what the user's functions hold.
        if caller.f_code.co_filename.endswith("zero_redundancy_optimizer.py"):
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each process an {optimizer} with other parameters, none of which knows "
                "the others' steps: use fully_shard (FSDP2), which shards the state too"
            )
        caller = caller.f_back


def prepare(
    param_group: dict[str, Any],
    earlier: list[dict[str, Any]],
    defaults: dict[str, Any],
    rule: Grouping,
    optimizer: str,
) -> dict[str, Any]:
    """Check a group that is to be added to earlier ones, and name its layers.

    ``"layers"`` in the group overrides `rule`, the optimizer's own; `optimizer` is its name, for messages.

    Returns:
        A copy, each tensor in it once, with ``layer_names`` and what a group counts and remembers.

    Raises:
        TypeError: No dictionary, an entry that is no tensor, or an option that was removed.
        ValueError: A sparse, complex, integer or distributed tensor; an option out of range; a layer in two groups.
    """
    number = len(earlier)
    group = _checked_parameters(param_group, number)
    where = f" in parameter group {number}"
    options.refuse_removed(group, optimizer)
    for name in options.WHOLE:
        if name in group:
            raise ValueError(f"{name}={group[name]!r}{where}: it holds for the whole optimizer; pass it there")
    options_of = {**defaults, **group}
    options.check(options_of, where)
    rule = group.pop("layers", rule)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    names = [entry[0] for entry in group["params"] if isinstance(entry, tuple)] or group.get("param_names")
    found = layer_names(tensors, names, rule, sum(len(g["params"]) for g in earlier))
    taken = {name for g in earlier for name in g["layer_names"]}
    if clash := [name for name in found if name in taken]:
        if rule is not None and not isinstance(rule, nn.Module):
            raise ValueError(f"layer {clash[0]!r} spans two parameter groups; name it apart in layers=")
        # Weights and biases in groups of their own (no decay on biases, say) are a common idiom: a layer a group.
        found = [f"{name}@{number}" if name in taken else name for name in found]
    group["layer_names"] = found
    group["steps"] = 0
    group["next_refresh"] = group.get("warmup_steps", defaults["warmup_steps"])
    group["last_refresh"] = None
    group["train_mode"] = all(g["train_mode"] for g in earlier)
    group["share"] = None
    group["effective_lr"] = float(options_of["lr"]) * options_of["warmup_rate"]
    return group
