"""Which implementation serves which tensors, and what this installation has."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lwas_fast.triton_kernels import triton_version


def check_fused(group: dict[str, Any]) -> None:
    """Refuse ``fused=True`` where no compiled update is there.

    Raises:
        RuntimeError: The group asks for an implementation that this installation lacks.
    """
    if group.get("fused"):
        raise RuntimeError(
            "fused=True, but this installation of lwas_fast has no compiled update. Leave fused out: "
            "the best implementation there is gets picked, and the results are the same."
        )


def update_implementation(group: dict[str, Any]) -> str:
    """Name the implementation that updates a group: ``"foreach"`` (all layers at once) or ``"single"``."""
    return "single" if group.get("foreach") is False else "foreach"


def describe() -> list[tuple[str, str]]:
    """What is installed and active, as rows of (what, which)."""
    import lwas_fast

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "CPU" if cuda is None else f"CPU (torch has CUDA {cuda}, but no GPU was found)"
    return [
        ("lwas_fast", lwas_fast.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("device", device),
        ("threads", str(torch.get_num_threads())),
        ("triton", triton_version() or "not installed (not needed)"),
        ("update", "torch foreach (no compiled kernel in this version)"),
        ("rates", "torch (no Triton kernel in this version)"),
    ]
