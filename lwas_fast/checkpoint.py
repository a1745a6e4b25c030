"""Whether groups, gradients and saved states fit; and fitting a saved state to the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwas_fast.layers import state_dtype

if TYPE_CHECKING:
    from lwas_fast.optimizer import LayerwiseOptimizer


def parameter_name(group: dict[str, Any], i: int) -> str:
    """The i-th parameter of a group, for messages."""
    names = group.get("param_names")
    return repr(names[i]) if names else f"number {i} of its group, of shape {tuple(group['params'][i].shape)}"


def prepare_group(param_group: dict[str, Any], number: int) -> dict[str, Any]:
    """Copy a group, drop repeated (tied) tensors, and check its parameters.

    Raises:
        TypeError: No dictionary, or an entry that is no tensor.
        ValueError: A sparse, complex, integer or distributed tensor.
    """
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


def _partition(names: list[str]) -> list[int]:
    return [names.index(name) for name in names]


def checked(opt: LayerwiseOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Check that a saved state fits an optimizer, before anything is changed.

    Returns:
        The same state.

    Raises:
        ValueError: Says what does not fit.
    """
    for number, (group, saved) in enumerate(zip(opt.param_groups, state_dict["param_groups"], strict=False)):
        if len(group["params"]) != len(saved["params"]):
            break  # torch's own message is about to come
        if "layer_names" not in saved:
            raise ValueError(f"the saved state is not of a {type(opt).__name__}: its groups have no layers")
        for name, mine, theirs in zip(
            group["layer_names"], _partition(group["layer_names"]), _partition(saved["layer_names"]), strict=True
        ):
            if mine != theirs:
                raise ValueError(
                    f"the saved state has other layers in group {number}: layer {name!r} is made of other tensors "
                    "there. Pass the layers= (and names) that the saved optimizer was made with"
                )
        for i, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            entry = state_dict["state"].get(key)
            if not entry:
                continue
            if missing := {"step", "layer", *opt._buffers} - set(entry):
                raise ValueError(
                    f"the saved state of parameter {parameter_name(group, i)} lacks {sorted(missing)[0]!r}: "
                    f"it is not of a {type(opt).__name__}"
                )
            for name in opt._buffers:
                if entry[name].shape != param.shape:
                    raise ValueError(
                        f"the saved {name} of parameter {parameter_name(group, i)} has shape "
                        f"{tuple(entry[name].shape)}, but the parameter has {tuple(param.shape)}"
                    )
    return state_dict


def fit_state(groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]], saved: dict[str, Any]) -> None:
    """Fill `state` from a saved one, each tensor copied to its parameter's device and its state's own dtype.

    torch casts every state tensor to the parameter's dtype on loading, which would cut float32 state of a bf16
    parameter to bf16.
    """
    for group, old in zip(groups, saved["param_groups"], strict=True):
        for param, key in zip(group["params"], old["params"], strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if name in ("step", "layer") else state_dtype(param)
                    value = value.detach().to(device=param.device, dtype=dtype, copy=True)
                state[param][name] = value
