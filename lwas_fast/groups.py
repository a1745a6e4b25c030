"""Parameter groups and their gradients: what is checked of them, and the layers that a new group is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lwas_fast import backends, options
from lwas_fast.layers import LayerRule, layer_names


def parameter_name(group: dict[str, Any], i: int) -> str:
    """The i-th parameter of a group, for messages."""
    names = group.get("param_names")
    return repr(names[i]) if names else f"number {i} of its group, of shape {tuple(group['params'][i].shape)}"


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
        for bad, kind, remedy in (
            (param.is_complex(), "complex", "optimize torch.view_as_real of it"),
            (param.layout != torch.strided, "sparse", "make it dense"),
            (not param.is_floating_point() and not param.is_complex(), "not floating-point", "leave it out"),
            (hasattr(param, "device_mesh"), "a DTensor, which is not supported yet", "use DDP and opt.step(closure)"),
        ):
            if bad:
                raise ValueError(f"parameter {name} is {kind}: {remedy}")
    return group


def prepare(
    param_group: dict[str, Any],
    earlier: list[dict[str, Any]],
    defaults: dict[str, Any],
    by_mode: dict[str, tuple[Any, Any]],
    rule: LayerRule,
) -> dict[str, Any]:
    """Check a group that is to be added and name its layers.

    Args:
        param_group: ``{"params": ..., option: value, ...}``; ``"layers"`` overrides `rule`. Not changed.
        earlier: The optimizer's groups so far.
        defaults: Its options.
        by_mode: What an option of None stands for, schedule-free and with momentum.
        rule: Its ``layers=``.

    Returns:
        A copy, each tensor in it once, with ``layer_names``, ``steps``, ``next_refresh``, ``last_refresh``,
        ``train_mode`` and ``share``.

    Raises:
        TypeError: No dictionary, or an entry that is no tensor.
        ValueError: A sparse, complex, integer or distributed tensor; an option out of range; a layer in two groups.
    """
    number = len(earlier)
    group = _checked_parameters(param_group, number)
    where = f" in parameter group {number}"
    for name in options.WHOLE:
        if name in group:
            raise ValueError(f"{name}={group[name]!r}{where}: it holds for the whole optimizer; pass it there")
    options.check({**defaults, **group}, where)
    backends.check_fused({**defaults, **group})
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
    fill_by_mode(group, defaults, by_mode)
    group["train_mode"] = all(g["train_mode"] for g in earlier)
    group["share"] = None
    return group


def fill_by_mode(group: dict[str, Any], defaults: dict[str, Any], by_mode: dict[str, tuple[Any, Any]]) -> None:
    """Give a group's options of None what they stand for in its own mode: see `prepare`."""
    free = group.get("schedule_free", defaults["schedule_free"])
    for name, (schedule_free, with_momentum) in by_mode.items():
        if group.get(name, defaults[name]) is None:
            group[name] = schedule_free if free else with_momentum


def check_dense(groups: list[dict[str, Any]], gradient_of: Callable[[Tensor], Tensor | None]) -> None:
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
