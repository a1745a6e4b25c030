"""The compiled extension: found, built at first use where there is none, loaded; and which buckets it serves."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lwas_fast.interrupts import open_to_interrupts
from lwas_fast.layers import FUSED_DTYPES, Bucket
from lwas_fast.options import wants_plain
from lwas_fast.rule import Rule
from lwas_fast.update import first_use
from lwas_fast.update.toolchain import INTERFACE, module_name


def _load(library: Path) -> tuple[ModuleType | None, str]:
    spec = importlib.util.spec_from_file_location(f"lwas_fast.{library.name.partition('.')[0]}", library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{library} cannot be loaded ({error})"
    if module.build_info().get("interface") != INTERFACE:
        return None, f"{library} is of another state of the sources"
    return module, ""


def load_extension(version: str = torch.__version__) -> tuple[ModuleType | None, str]:
    """Load what was compiled at installation, if it fits a torch; that registers its operators.

    Returns the module, or None and why.
    """
    # Looked for here, for the import system may know of another clone's.
    found = {path.name.partition(".")[0]: path for path in Path(__file__).parents[1].glob("_C*_torch*")}
    if (library := found.get(module_name(version))) is not None:
        return _load(library)
    if not found:
        return None, "none was compiled at installation"
    built = ", ".join(sorted({name.partition("_torch")[2].replace("_", ".") for name in found}))
    return None, f"what was compiled at installation is for torch {built} or of other sources, and this is {version}"


EXTENSION, MISSING = load_extension()
BUILD: dict[str, Any] = EXTENSION.build_info() if EXTENSION is not None else {}  # asked for at every step
WITHOUT_CUDA = ""  # why it has no CUDA part, where that is known
TRIED: dict[str, str | None] = {}  # what became of the first use, by type of device: None, or why there is none
_TRYING = threading.Lock()


def at_first_use(device: str) -> None:
    """Load what an earlier first use built for a type of device, or build it now. `TRIED` notes what became of it."""
    global EXTENSION, BUILD, WITHOUT_CUDA
    with open_to_interrupts(), _TRYING:
        if EXTENSION is not None or device in TRIED:
            return
        useless = False
        for _ in range(3):  # again for the CPU alone where CUDA's part cannot be built; anew where it cannot be loaded
            plan, module = first_use.plan(), None
            if isinstance(plan, str):
                reason: str | None = plan
            elif device == "cuda" and plan.cuda is None:
                reason = plan.without
            elif (reason := first_use.build(plan)) is None:
                module, reason = _load(plan.library)
                useless = module is None  # of a machine with another system, say, or cut short
                if useless:
                    with contextlib.suppress(OSError):
                        plan.library.unlink()
            if module is not None and isinstance(plan, first_use.Plan):
                EXTENSION, BUILD, WITHOUT_CUDA = module, module.build_info(), plan.without
                break
        TRIED[device] = reason or None
        insisted = isinstance(plan, str) and "LWAS_FAST_BUILD" in plan and plan != first_use.REFUSED
        if reason and not first_use.FAILED and (insisted or useless):
            first_use.say(reason, "Plain torch serves")


def missing(device: str) -> str | None:
    """Why there is no compiled update for a type of device; None where there is. At first use it is built."""
    buildable = device in ("cpu", "cuda")
    if EXTENSION is None and buildable and device not in TRIED:
        if torch.compiler.is_compiling():  # there is nothing to trace; the rest of the time Dynamo is not imported
            torch.compiler.disable(at_first_use)(device)  # type: ignore[no-untyped-call]
        else:
            at_first_use(device)
    if EXTENSION is None:
        return f"{MISSING}, and at first use none can be: {TRIED[device]}" if buildable else MISSING
    if device == "cpu" or (device == "cuda" and BUILD["cuda"]):
        return None
    if device == "cuda":
        why = WITHOUT_CUDA or "install again with LWAS_FAST_BUILD=cuda and --no-build-isolation, which needs nvcc"
        return f"it was not built for cuda ({why})"
    return f"it was not built for {device}"


def check_fused(rule: Rule, group: dict[str, Any]) -> None:
    """Refuse ``fused=True``, by a RuntimeError that says why, where no compiled update is there nor can be built."""
    if not group.get("fused") or not group["params"]:
        return
    if rule.operator is None:
        raise RuntimeError(f"fused=True, but there is no compiled update for {rule.name}. Leave fused out.")
    first = group["params"][0]
    device = (first[1] if isinstance(first, tuple) else first).device.type
    if (reason := missing(device)) is not None:
        raise RuntimeError(
            f"fused=True, but this installation of lwas_fast has no compiled update: {reason}. Leave fused out: "
            "the best implementation there is gets picked, and the results are the same."
        )


def why_not(rule: Rule, bucket: Bucket) -> str | None:
    """Why compiled code does not serve a bucket; None where it does. At first use it is built, if it could serve."""
    if rule.operator is None:
        return f"there is none for {rule.name}"
    dtypes = bucket.dtypes
    if bucket.table.dtype != torch.float32 or not set(dtypes) <= set(FUSED_DTYPES):
        other = next((dtype for dtype in dtypes if dtype not in FUSED_DTYPES), torch.float64)
        return f"the group has {other} parameters, and it takes float32, bfloat16 and float16"
    # As lists: at every step a loop in Python would cost more than the update of small tensors.
    of_gradients = [d if (g := p.grad) is None else g.dtype for p, d in zip(bucket.params, dtypes, strict=True)]
    if of_gradients != dtypes:
        dtype, other = next((a, b) for a, b in zip(dtypes, of_gradients, strict=True) if a != b)
        return f"the gradient of a {dtype} parameter is {other}"
    if bucket.mixed:
        return "ranks that hold other shards of one of a layer's tensors hold the same of another (tensor parallelism)"
    device = bucket.table.device.type
    if (reason := missing(device)) is not None:
        return reason
    if device == "cpu" and not BUILD["float16_on_cpu"] and torch.float16 in dtypes:
        return "the compiler that built it knows no float16"
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
