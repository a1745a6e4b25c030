"""Whether a saved state fits an optimizer; and fitting it to the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lwas_fast.groups import parameter_name
from lwas_fast.layers import state_dtype

if TYPE_CHECKING:
    from lwas_fast.optimizer import LayerwiseOptimizer


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
            buffers = opt._buffers_of({"schedule_free": False, **saved})  # of a version that knew nothing else
            if missing := {"step", "layer", *buffers} - set(entry):
                raise ValueError(
                    f"the saved state of parameter {parameter_name(group, i)} lacks {sorted(missing)[0]!r}: "
                    f"it is not of a {type(opt).__name__}"
                )
            for name in buffers:
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
