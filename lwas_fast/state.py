"""Saved states: labelled with a version, statistics by name. `fits.py` checks them before anything changes.

A group carries ``state_version`` and ``state_columns``, the names of the numbers in each layer's row. So rows may get
other numbers, in another order, and old states still load: what a state lacks starts at 0 (the loss at 1),
what it has too many is dropped. torch would cast every tensor to its parameter's dtype; `fit` keeps float32 state of
half-precision parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lwas_fast.layers import Groups
from lwas_fast.options import RANGES, REMOVED
from lwas_fast.selection import state_dtype
from lwas_fast.shards import mesh_of
from lwas_fast.table import Column
from lwas_fast.update import ROUNDED, TRAINED

VERSION = 3
COLUMNS = [column.name.lower() for column in Column]
# Of version 1, which did not say so.
FIRST_COLUMNS = (
    "average weight signal power descent curvature applied refreshes negative nonfinite no_descent growth capped "
    "skipped length size"
).split()


def label() -> dict[str, Any]:
    """What every group says of its state; live ones too, for torch's flattened form keeps the keys that they have."""
    return {"state_version": VERSION, "state_columns": list(COLUMNS)}


def columns_of(group: Mapping[str, Any]) -> list[str]:
    """The names of the numbers in a group's rows; a group that is not whole may lack them."""
    return group.get("state_columns", []) if "state_version" in group else FIRST_COLUMNS


def lost_options(saved: dict[str, Any]) -> list[str]:
    """What to say of options that a saved state was trained with and that are no more."""
    found = [(name, group[name]) for name in REMOVED for group in saved["param_groups"] if name in group]
    other = dict.fromkeys((name, value) for name, value in found if value not in (REMOVED[name][0], None))
    return [f"{name}={value!r} ({REMOVED[name][1]})" for name, value in other]


def fit(groups: Groups, state: MutableMapping[Tensor, dict[str, Any]], saved: dict[str, Any]) -> None:
    """Fill `state` from a saved one, each tensor copied to its parameter's device and its state's own dtype."""
    for group, old in zip(groups, saved["param_groups"], strict=True):
        for param, key in zip(group["params"], old["params"], strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if name in (*ROUNDED, TRAINED) and mesh_of(param) is not None:
                    state[param].pop(name, None)  # of a run that was not sharded
                    continue
                if isinstance(value, Tensor):
                    dtype = value.dtype if name in ("step", "layer", TRAINED, *ROUNDED) else state_dtype(param)
                    value = value.detach().to(device=param.device, dtype=dtype, copy=True)
                state[param][name] = value


def upgrade(groups: Groups, state: Mapping[Tensor, dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Bring groups and rows of any version to the present one, in place; options they lack are the optimizer's."""
    for group in groups:
        columns = columns_of(group)
        if columns != COLUMNS:
            for param in group["params"]:
                if "layer" in (entry := state.get(param, {})):
                    entry["layer"] = _renamed(entry["layer"], columns)
        for name in REMOVED:
            group.pop(name, None)
        group |= label()
        group.setdefault("schedule_free", False)  # of a version that knew nothing else
        for name in RANGES.keys() & defaults.keys():  # torch's __setstate__ adds defaults of its own
            group.setdefault(name, defaults[name])
        for name, value in (("last_refresh", None), ("train_mode", True), ("share", None), ("effective_lr", 0.0)):
            group.setdefault(name, value)


def _renamed(row: Tensor, columns: list[str]) -> Tensor:
    """A layer's row in the present order; 0 for what it lacks."""
    new = torch.zeros(len(COLUMNS), dtype=row.dtype, device=row.device)
    there = [name for name in COLUMNS if name in columns]
    new[[COLUMNS.index(name) for name in there]] = row[[columns.index(name) for name in there]]
    if "loss" not in columns:  # it was taken for 1
        new[Column.LOSS] = new[Column.WEIGHT]
    return new
