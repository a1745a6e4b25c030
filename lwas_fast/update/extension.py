"""The compiled extension: found, loaded, and which buckets it serves."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lwas_fast.layers import FUSED_DTYPES, Bucket
from lwas_fast.options import wants_plain
from lwas_fast.rule import Rule

INTERFACE = 4  # of the operators, in csrc/bindings.cpp as well: to be raised there and here when a schema changes


def load_extension(version: str = torch.__version__) -> tuple[ModuleType | None, str]:
    """Import the compiled update that fits a torch, which registers its operators.

    An extension carries the torch it was built for in its name: there is no stable interface between torch's releases,
    so one built for another is never loaded. Returns the module, or None and why.
    """
    wanted = "_C_torch" + "_".join(version.split(".")[:2])
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps lwas_fast"
    # Looked for here, for the import system may know of another clone's.
    found = sorted(path.name.split(".")[0] for path in Path(__file__).parents[1].glob("_C_torch*"))
    if not found:
        return None, (
            "it was not built here (a clone's sources, while the installed package is elsewhere; or a build without "
            "--no-build-isolation, without a C++ compiler, or with LWAS_FAST_BUILD=none)"
        )
    if wanted not in found:
        built = ", ".join(name.removeprefix("_C_torch").replace("_", ".") for name in found)
        return None, f"it was built for torch {built}, and this is torch {version}; build it anew: {rebuild}"
    try:
        module = importlib.import_module(f"lwas_fast.{wanted}")
    except ImportError as error:
        return None, f"it cannot be loaded ({error}); build it anew: {rebuild}"
    if module.build_info().get("interface") != INTERFACE:  # an editable installation whose sources went on
        return None, f"it is of another state of the sources; build it anew: {rebuild}"
    return module, ""


EXTENSION, MISSING = load_extension()
BUILD: dict[str, Any] = EXTENSION.build_info() if EXTENSION is not None else {}  # asked for at every step


def check_fused(group: dict[str, Any]) -> None:
    """Refuse ``fused=True``, by a RuntimeError that says why, where no compiled update is there."""
    if group.get("fused") and EXTENSION is None:
        raise RuntimeError(
            f"fused=True, but this installation of lwas_fast has no compiled update: {MISSING}. Or leave fused out: "
            "the best implementation there is gets picked, and the results are the same."
        )


def why_not(rule: Rule, bucket: Bucket) -> str | None:
    """Why compiled code does not serve a bucket; None where it does."""
    if rule.operator is None:
        return f"there is none for {rule.name}"
    if EXTENSION is None:
        return MISSING
    device = bucket.table.device.type
    if device != "cpu" and not (device == "cuda" and BUILD["cuda"]):
        return f"it was not built for {device}"
    half = device == "cpu" and not BUILD["float16_on_cpu"]
    dtypes = [param.dtype for param in bucket.params]
    for dtype in dict.fromkeys(dtypes):
        if half and dtype == torch.float16:
            return "the compiler that built it knows no float16"
        if dtype not in FUSED_DTYPES or bucket.table.dtype != torch.float32:
            return f"the group has {dtype} parameters, and it takes float32, bfloat16 and float16"
    of_gradients = [
        dtype if (g := param.grad) is None else g.dtype for param, dtype in zip(bucket.params, dtypes, strict=True)
    ]
    if (
        of_gradients != dtypes
    ):  # at every step: one by one in Python that would cost more than the update of small tensors
        dtype, other = next((a, b) for a, b in zip(dtypes, of_gradients, strict=True) if a != b)
        return f"the gradient of a {dtype} parameter is {other}"
    return None


def serves(rule: Rule, group: dict[str, Any], bucket: Bucket) -> bool:
    """Whether compiled code updates a bucket; if not, plain torch does.

    Raises:
        RuntimeError: The group insists on it, and that cannot be; says why.
    """
    if wants_plain(group):
        return False
    reason = why_not(rule, bucket)
    if reason is not None and group.get("fused"):
        raise RuntimeError(f"fused=True, but the compiled update cannot serve it: {reason}. Leave fused out.")
    return reason is None
