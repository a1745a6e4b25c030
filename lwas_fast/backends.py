"""Which implementation serves which tensors, and what this installation has."""

from __future__ import annotations

import importlib
import platform
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lwas_fast.layers import Bucket
from lwas_fast.triton_kernels import triton_version

INTERFACE = 2  # of the operators, in csrc/bindings.cpp as well: to be raised there and here when a schema changes
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_extension(version: str = torch.__version__) -> tuple[ModuleType | None, str]:
    """Import the compiled update that fits a torch, which registers its operators.

    An extension carries the torch it was built for in its name: there is no stable interface between torch's releases,
    so one built for another is never loaded.

    Returns:
        The module, or None; and, if None, why.
    """
    wanted = "_C_torch" + "_".join(version.split(".")[:2])
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps lwas_fast"
    try:
        module = importlib.import_module(f"lwas_fast.{wanted}")
        if module.build_info().get("interface") != INTERFACE:  # an editable installation whose sources went on
            return None, f"it is of another state of the sources; build it anew: {rebuild}"
        return module, ""
    except ImportError as error:
        found = sorted(path.name.split(".")[0] for path in Path(__file__).parent.glob("_C_torch*"))
        if wanted in found:
            return None, f"it cannot be loaded ({error}); build it anew: {rebuild}"
        if found:
            built = ", ".join(name.removeprefix("_C_torch").replace("_", ".") for name in found)
            return None, f"it was built for torch {built}, and this is torch {version}; build it anew: {rebuild}"
        return None, "it was not built (no C++ compiler then, or LWAS_FAST_BUILD=none)"


EXTENSION, MISSING = load_extension()
BUILD: dict[str, Any] = EXTENSION.build_info() if EXTENSION is not None else {}  # asked for at every step


def check_fused(group: dict[str, Any]) -> None:
    """Refuse ``fused=True`` where no compiled update is there.

    Raises:
        RuntimeError: The group asks for an implementation that this installation lacks; says why it lacks it.
    """
    if group.get("fused") and EXTENSION is None:
        raise RuntimeError(
            f"fused=True, but this installation of lwas_fast has no compiled update: {MISSING}. Or leave fused out: "
            "the best implementation there is gets picked, and the results are the same."
        )


def _why_not_fused(bucket: Bucket) -> str | None:
    """Why the compiled update does not serve a bucket; None where it does."""
    if EXTENSION is None:
        return MISSING
    device = bucket.table.device.type
    if device != "cpu" and not (device == "cuda" and BUILD["cuda"]):
        return f"it was not built for {device}"
    half = device == "cpu" and not BUILD["float16_on_cpu"]
    for param in bucket.params:
        if half and param.dtype == torch.float16:
            return "the compiler that built it knows no float16"
        if param.dtype not in FUSED_DTYPES or bucket.table.dtype != torch.float32:
            return f"the group has {param.dtype} parameters, and it takes float32, bfloat16 and float16"
        if param.grad is not None and param.grad.dtype != param.dtype:
            return f"the gradient of a {param.dtype} parameter is {param.grad.dtype}"
    return None


def update_implementation(group: dict[str, Any], bucket: Bucket) -> str:
    """Name the implementation that updates a bucket.

    Returns:
        ``"fused"`` (compiled), ``"foreach"`` (all layers at once) or ``"single"`` (one after the other).

    Raises:
        RuntimeError: The group insists on the compiled one, and that cannot be; says why.
    """
    if group.get("foreach") is not None or group.get("fused") is False:
        return "single" if group.get("foreach") is False else "foreach"
    if (reason := _why_not_fused(bucket)) is None:
        return "fused"
    if group.get("fused"):
        raise RuntimeError(f"fused=True, but the compiled update cannot serve it: {reason}. Leave fused out.")
    return "foreach"


def _why_not_triton(device: torch.device) -> str | None:
    """Why the single launch does not serve a device; None where it does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    return _triton_fails(device)


@cache
def _triton_fails(device: torch.device) -> str | None:
    """Try it once: Triton is there without being of use where the C compiler is missing that it needs."""
    if triton_version() is None:
        return "Triton is not installed"
    from lwas_fast.fused_rates import trial

    try:
        trial(device)
    except Exception as error:  # whatever it is, training goes on without
        return f"Triton does not work here ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def rates_implementation(group: dict[str, Any], bucket: Bucket) -> str:
    """Name the implementation that takes a measurement into a bucket's rates: ``"triton"`` or ``"torch"``."""
    if group.get("foreach") is not None or group.get("fused") is False:
        return "torch"
    float32 = bucket.table.dtype == torch.float32 and all(p.dtype in FUSED_DTYPES for p in bucket.params)
    return "triton" if float32 and _why_not_triton(bucket.table.device) is None else "torch"


def rates_of() -> str:
    """Say what takes measurements into rates here."""
    why = "no GPU was found" if not torch.cuda.is_available() else _why_not_triton(torch.device("cuda", 0))
    return "one Triton launch for all layers on CUDA; torch on the CPU" if why is None else f"torch; no Triton: {why}"


def describe() -> list[tuple[str, str]]:
    """What is installed and active, as rows of (what, which)."""
    import lwas_fast

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "CPU" if cuda is None else f"CPU (torch has CUDA {cuda}, but no GPU was found)"
    if EXTENSION is None:
        update = f"torch foreach; no compiled update: {MISSING}"
    else:
        where = f"CPU and CUDA ({BUILD['cuda']})" if BUILD["cuda"] else "CPU"
        update = f"compiled, for {where}; torch {BUILD['torch']}, compiler {BUILD['compiler']}"
    return [
        ("lwas_fast", lwas_fast.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("device", device),
        ("threads", str(torch.get_num_threads())),
        ("triton", triton_version() or "not installed (not needed)"),
        ("update", update),
        ("rates", rates_of()),
    ]
