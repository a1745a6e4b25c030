"""What the compiled update is built from and with: one place for setup.py and for the build at first use.

It imports neither torch nor this package when it is loaded: setup.py runs this file where neither can be imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

INTERFACE = 7  # of the operators, in csrc/bindings.cpp as well: to be raised there and here when a schema changes
SOURCES = ["csrc/bindings.cpp", "csrc/update_cpu.cpp"]
CUDA_SOURCES = ["csrc/update_cuda.cu"]
# No C++ code of ours reads errno or floating-point exceptions; with them GCC vectorises neither root nor selection.
# Unrolling made AdamW's loop a fifth faster.
# Apple's compiler has no OpenMP of its own; there one thread does the work.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-funroll-loops"]
CXX_FLAGS += ["-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"]
NVCC_FLAGS = ["-std=c++20", "-O3"]


def wanted() -> str:
    """Read ``LWAS_FAST_BUILD``.

    Raises:
        ValueError: It is none of the four.
    """
    choice = os.environ.get("LWAS_FAST_BUILD", "").lower() or "auto"
    if choice not in ("auto", "cuda", "cpu", "none"):
        raise ValueError(f"LWAS_FAST_BUILD={choice}: it must be auto, cuda, cpu or none")
    return choice


def module_name(version: str) -> str:
    """What an extension for this torch and these operators is called.

    There is no stable interface between torch's releases, so one that was built for another is never loaded.
    """
    return f"_C{INTERFACE}_torch" + "_".join(version.split(".")[:2])


def why_no_compiler() -> str | None:
    """Say why no C++ can be compiled for this Python; None where it can."""
    compiler = os.environ.get("CXX") or ("c++" if shutil.which("c++") else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include", "nt" if os.name == "nt" else "posix_prefix"), "Python.h")
    if not header.exists():
        return f"Python's headers are missing ({header}; Debian has them in python3-dev)"
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def toolkit() -> Path | None:
    """Find the CUDA toolkit's folder. nvcc on the PATH may be a link, or a script that calls one elsewhere."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "none.cu"), re.MULTILINE)
        return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]
    usual = Path("/usr/local/cuda")
    return usual if usual.exists() else None


def why_no_cuda(torch: ModuleType) -> str | None:
    """Say why the CUDA part cannot be built; None where it can."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    home = toolkit()
    if home is None or not (home / "bin" / "nvcc").exists():
        return f"there is no CUDA toolkit with nvcc{f' in {home}' if home else ''} (set CUDA_HOME)"
    found = re.search(r"release (\d+)\.", _output(str(home / "bin" / "nvcc"), "--version"))
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {found[1] if found else '?'}, this torch of {torch.version.cuda}"
    if not any((folder / "cuda_runtime.h").exists() for folder in (home / "include", *home.glob("targets/*/include"))):
        return f"the CUDA toolkit in {home} has no runtime headers (set CUDA_HOME to a whole one)"
    return None


def architectures(torch: ModuleType) -> str:
    """Which GPUs a build would be for: those that are asked for, those that are here, or common ones."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    if not torch.cuda.is_available():
        return "8.0;9.0+PTX"
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(here)) + "+PTX"


def extension(name: str, cuda: str | None) -> Any:
    """What setuptools is to build, in a folder that holds csrc/.

    Args:
        name: The module's, with its package where it gets one.
        cuda: The architectures to build for; None for the CPU alone.
    """
    if cuda is not None:
        os.environ["CUDA_HOME"] = str(toolkit())  # torch's own guess takes a script on the PATH for the toolkit's nvcc
    import torch
    from torch.utils import cpp_extension

    if cuda is not None and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda  # torch would ask the GPUs that are not there
    kind = cpp_extension.CppExtension if cuda is None else cpp_extension.CUDAExtension
    return kind(  # type: ignore[no-untyped-call]
        name,
        SOURCES + ([] if cuda is None else CUDA_SOURCES),
        define_macros=[] if cuda is None else [("LWAS_CUDA", f'"{cuda}"')],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        depends=[str(path) for path in Path("csrc").glob("*.*h")],
    )


def main(name: str, cuda: str) -> None:
    """Build in the present folder, which holds csrc/ and gets the library: what `first_use.py` runs."""
    from setuptools import setup

    module = extension(name, cuda or None)
    from torch.utils.cpp_extension import BuildExtension  # after CUDA_HOME is set

    setup(
        name="lwas_fast",
        script_args=["build_ext", "--build-lib", ".", "--build-temp", "objects"],
        ext_modules=[module],
        cmdclass={"build_ext": BuildExtension},
    )


if __name__ == "__main__":
    main(*sys.argv[-2:])
