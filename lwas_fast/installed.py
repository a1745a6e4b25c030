"""What is installed and active: the table that ``python -m lwas_fast`` prints."""

from __future__ import annotations

import platform

import torch

from lwas_fast.rates import launch
from lwas_fast.update.extension import BUILD, EXTENSION, MISSING


def describe() -> list[tuple[str, str]]:
    """What is installed and active, as rows of (what, which)."""
    import lwas_fast

    cuda = torch.version.cuda
    no_launch: str | None = "no GPU was found"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        no_launch = launch.why_not(torch.device("cuda", 0))
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
        ("triton", launch.triton_version() or "not installed (not needed)"),
        ("update", update),
        ("rates", f"torch; no Triton: {no_launch}" if no_launch else "one Triton launch on CUDA; torch on the CPU"),
    ]
