"""What is installed and active: the table that ``python -m lwas_fast`` prints."""

from __future__ import annotations

import platform

import torch

from lwas_fast.rates import launch
from lwas_fast.update import extension, first_use


def build() -> bool:
    """Build the compiled update now, if it would be built at first use; whether there is one."""
    return extension.missing("cuda" if torch.cuda.is_available() else "cpu") is None


def _update(device: str) -> str:
    """Which update serves a type of device, or will, or why no compiled one does."""
    plan = None if extension.EXTENSION is not None or device in extension.TRIED else first_use.plan()
    if isinstance(plan, first_use.Plan) and (device == "cpu" or plan.cuda) and not plan.library.exists():
        return f"will be compiled at first use, for {plan}; or now: python -m lwas_fast --build"
    reason, built = extension.missing(device), extension.BUILD
    if extension.EXTENSION is None:
        return f"torch foreach; no compiled update: {reason}"
    where = f"CPU and CUDA ({built['cuda']})" if built["cuda"] else "CPU"
    lacks = f" ({reason})" if reason else ""
    return f"compiled, for {where}{lacks}; torch {built['torch']}, compiler {built['compiler']}"


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
    return [
        ("lwas_fast", lwas_fast.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("device", device),
        ("threads", str(torch.get_num_threads())),
        ("triton", launch.triton_version() or "not installed (not needed)"),
        ("update", _update("cuda" if torch.cuda.is_available() else "cpu")),
        ("rates", f"torch; no Triton: {no_launch}" if no_launch else "one Triton launch on CUDA; torch on the CPU"),
    ]
