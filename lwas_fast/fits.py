"""Whether a saved state fits an optimizer and is whole: asked before anything changes, and refused by name.

torch looks at the numbers of groups and parameters alone. A state that has these, but is of another optimizer or model,
or was cut short, would load without a word, and fail or mislead many steps later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lwas_fast import options
from lwas_fast.layers import Groups, parameter_name
from lwas_fast.rule import Rule
from lwas_fast.shards import local, mesh_of
from lwas_fast.state import VERSION, columns_of
from lwas_fast.update import ROUNDED, TRAINED

# What a group says of itself besides its options: whether a value can be, and what it must be.
_GROUP: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": options.integer(0),
    "next_refresh": options.integer(0),
    "last_refresh": options.or_none(options.integer(0)),
    "train_mode": (lambda value: isinstance(value, bool), "True or False"),
    "share": (lambda value: value is None or (isinstance(value, float) and 0 <= value < 1), "None or less than 1"),
}
_GROUP |= {"replays": _GROUP["train_mode"], "micro_batches": _GROUP["steps"]}
_NEEDED = ("steps", "next_refresh")  # the others are not in all states, and have defaults
# By these a state's optimizer is known: an option that all its versions have and another never had; torch's state.
_OWN = ("betas", "momentum", "eps")
_TORCHS = {"exp_avg": "Adam or AdamW", "momentum_buffer": "SGD", "square_avg": "RMSprop", "sum": "Adagrad"}
_RATES = ("average", "weight", "loss")  # of a row, what must be finite


def check(rule: Rule, groups: Groups, saved: Any) -> None:
    """Check that what `state_dict` gave fits the groups of an optimizer of this rule, and that it is whole.

    Raises:
        ValueError: Says what does not fit.
    """
    parts = (saved.get("state"), saved.get("param_groups")) if isinstance(saved, Mapping) else (None, None)
    if not isinstance(parts[0], Mapping) or not isinstance(parts[1], (list, tuple)):
        raise ValueError(
            f"what is to be loaded is no optimizer's state: {rule.name}.load_state_dict() takes what "
            f"{rule.name}.state_dict() gave, which has 'state' and 'param_groups'"
        )
    for number, (mine, theirs) in enumerate(zip(groups, parts[1], strict=False)):
        if len(mine["params"]) != len(theirs["params"]):
            return  # torch's own message is about to come
        version = theirs.get("state_version", 1)
        if not _GROUP["steps"][0](version) or version > VERSION:
            raise ValueError(
                f"the saved state is of version {version}, and this lwas_fast reads versions up to {VERSION}: "
                "load it with the newer lwas_fast that saved it"
            )
        _check_optimizer(rule, mine, theirs, parts[0])
        _check_group(f"parameter group {number} of the saved state", theirs)
        names = (mine["layer_names"], theirs["layer_names"])
        for name, one, other in zip(names[0], *map(_partition, names), strict=True):
            if one != other:
                raise ValueError(
                    f"the saved state has other layers in group {number}: layer {name!r} is made of other tensors "
                    "there. Pass the layers= (and names) that the saved optimizer was made with"
                )
        for i, key in enumerate(theirs["params"]):
            if (entry := parts[0].get(key)) is not None and entry != {}:
                _check_entry(rule, mine["params"][i], parameter_name(mine, i), theirs, entry)


def _partition(names: list[str]) -> list[int]:
    return [names.index(name) for name in names]


def _check_optimizer(rule: Rule, mine: Mapping[str, Any], theirs: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    lacks = [name for name in _OWN if name in mine and name not in theirs]
    has = [name for name in _OWN if name in theirs and name not in mine]
    if "layer_names" not in theirs:
        kept = {name for entry in state.values() if isinstance(entry, Mapping) for name in entry}
        known = next((f" (they are those of torch's {torchs})" for name, torchs in _TORCHS.items() if name in kept), "")
        why = f"its groups have no layers{known}"
    elif lacks:
        why = f"its groups have no {lacks[0]}"
    elif has:
        why = f"its groups have {has[0]}"
    else:
        return
    raise ValueError(
        f"the saved state is not of {rule.name}: {why}. Load the model's weights, and leave the optimizer's state out: "
        "a new optimizer measures its step sizes with its first step"
    )


def _check_group(where: str, theirs: Mapping[str, Any]) -> None:
    for name, (can_be, allowed) in _GROUP.items():
        if name in theirs:
            if not can_be(theirs[name]):
                raise ValueError(
                    f"{where} has {name}={theirs[name]!r}, but must have {allowed}: load another checkpoint"
                )
        elif name in _NEEDED:
            raise ValueError(f"{where} lacks {name!r}, so it is not whole: load another checkpoint")
    options.check({name: theirs[name] for name in options.RANGES if name in theirs}, f" in {where}")
    layers, columns = theirs["layer_names"], columns_of(theirs)
    for what, names in (("layer_names", layers), ("state_columns", columns)):
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} has {what}={names!r}, but must have a list of names: load another checkpoint")
    if (count := len(theirs["params"])) != len(layers):
        raise ValueError(f"{where} has {len(layers)} layer_names, but must have {count}: load another checkpoint")
    if len(set(columns)) != len(columns):
        raise ValueError(f"{where} has a column twice, but must have each once: load another checkpoint")
    if not _are_samples(theirs.get("samples")):
        raise ValueError(f"{where} has samples that cannot be read, but must have pairs: load another checkpoint")


def _are_samples(known: Any) -> bool:
    """Whether `update.holds` can read them."""
    try:
        pairs = (json.loads(known) if isinstance(known, str) else known) if known else []
        return len(pairs) == 0 or torch.tensor(pairs, dtype=torch.float64).shape == (len(pairs), 2)
    except (ValueError, TypeError):
        return False


def _check_entry(rule: Rule, param: Tensor, name: str, theirs: dict[str, Any], entry: Any) -> None:
    buffers = rule.buffers({"schedule_free": False, **theirs})  # of a version that knew nothing else
    entry = entry if isinstance(entry, Mapping) else {}
    places, kept = ROUNDED
    both = ROUNDED if places in entry or kept in entry else ()
    if missing := {"step", "layer", *buffers, *rule.scalars, *both} - set(entry):
        what = sorted(missing)[0]
        raise ValueError(f"the saved state of parameter {name} lacks {what!r}: it is not of {rule.name}")
    for what in ("step", "layer", *buffers, *rule.scalars, *(one for one in (places, kept, TRAINED) if one in entry)):
        value, allowed = entry[what], "integers" if what == places else "floating-point numbers"
        if not isinstance(value, Tensor) or not (
            value.dtype == torch.int64 if what == places else value.is_floating_point()
        ):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the saved {what} of parameter {name} is {kind}, but must be a tensor of {allowed}")
    for buffer in buffers:
        if (mesh_of(param) is None) != (mesh_of(entry[buffer]) is None):
            kinds = ("whole", "sharded") if mesh_of(param) is not None else ("sharded", "whole")
            raise ValueError(
                f"the saved {buffer} of parameter {name} is {kinds[0]}, and the parameter is {kinds[1]}: load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
    columns = columns_of(theirs)
    shapes = {what: tuple(param.shape) for what in (*buffers, TRAINED)} | {"layer": (len(columns),)}
    shapes |= dict.fromkeys(("step", *rule.scalars), ())
    if both:
        shapes |= {places: (entry[places].numel(),), kept: (entry[places].numel(),)}
    for what, shape in shapes.items():
        if what in entry and (found := tuple(entry[what].shape)) != shape:
            raise ValueError(f"the saved {what} of parameter {name} has shape {found}, but must have {shape}")
    # Not all of the row: norms that overflow are infinite there, and every step deals with that.
    rates = local(entry["layer"]).detach()[[i for i, column in enumerate(columns) if column in _RATES]]
    for what, values in [(what, local(entry[what]).detach()) for what in (*buffers, *rule.scalars, "step")] + [
        ("layer", rates)
    ]:
        low, high = _range(values)
        if not math.isfinite(high - low) or (what in ("step", *rule.scalars) and low < 0):
            raise ValueError(
                f"the saved {what} of parameter {name} has numbers that are not finite, or a count below 0. Training "
                "on with them would spoil the weights: load an earlier checkpoint"
            )
    low, high = _range(entry.get(places, torch.zeros(0)))
    if low < 0 or (mesh_of(param) is None and high >= max(1, param.numel())):
        raise ValueError(f"the saved {places} of parameter {name} has places outside of it: load another checkpoint")


def _range(values: Tensor) -> tuple[float, float]:
    """Least and greatest of some numbers, without memory for as many; NaN if there is one."""
    if values.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(values)
    return low.item(), high.item()
