"""Build of lwas_fast: what must be computed, above all which extension this machine can build.

``LWAS_FAST_BUILD`` says what to build: ``auto`` (default) what the machine can, ``cuda``, ``cpu`` or ``none``; without
an extension the package works in plain torch. torch must be there already: build with ``--no-build-isolation``. All
metadata is in pyproject.toml.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = ["csrc/bindings.cpp", "csrc/update_cpu.cpp"]
CUDA_SOURCES = ["csrc/update_cuda.cu"]
# No C++ code of ours reads errno or floating-point exceptions; with them GCC vectorises neither root nor selection.
# Unrolling gives the sums more than one chain of additions.
CXX_FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-funroll-loops"]


def say(text: str) -> None:
    """Print a line that pip shows with -v, and that a build log keeps."""
    print(f"lwas_fast: {text}", file=sys.stderr)


def wanted() -> str:
    """Read LWAS_FAST_BUILD."""
    choice = os.environ.get("LWAS_FAST_BUILD", "auto").lower()
    if choice not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"LWAS_FAST_BUILD={choice}: it must be auto, cuda, cpu or none")
    return choice


def extension() -> dict:
    """What setup() needs to build the extension that fits, or nothing.

    Raises:
        SystemExit: LWAS_FAST_BUILD asks for what cannot be had; says what is missing.
    """
    choice = wanted()
    if choice == "none":
        say("no compiled update, as LWAS_FAST_BUILD=none says")
        return {}

    def without(reason: str, needed_for: tuple[str, ...]) -> dict:
        if choice in needed_for:
            raise SystemExit(f"LWAS_FAST_BUILD={choice}, but {reason}")
        say(f"no compiled update: {reason}. The package works without, in plain torch")
        return {}

    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return without(
            f"torch cannot be imported here ({error}); install torch first and build with --no-build-isolation",
            ("cpu", "cuda"),
        )
    compiler = os.environ.get("CXX") or ("c++" if shutil.which("c++") else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return without("there is no C++ compiler", ("cpu", "cuda"))

    cuda_missing = None
    if torch.version.cuda is None:
        cuda_missing = "this torch has no CUDA"
    elif cpp_extension.CUDA_HOME is None or not (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists():
        cuda_missing = "there is no CUDA toolkit with nvcc (set CUDA_HOME)"
    if cuda_missing and choice == "cuda":
        return without(cuda_missing, ("cuda",))
    with_cuda = choice != "cpu" and cuda_missing is None
    say(f"compiled update for {'CPU and CUDA' if with_cuda else f'the CPU ({cuda_missing or choice})'}")

    # The name carries torch's version: there is no stable interface between its releases, so an extension is looked up
    # for the torch that runs, and one built for another is never loaded.
    name = "lwas_fast._C_torch" + "_".join(torch.__version__.split(".")[:2])
    macros = []
    flags = {"cxx": CXX_FLAGS}
    if with_cuda:
        arches = os.environ.get("TORCH_CUDA_ARCH_LIST") or "of the GPUs at build time"
        macros = [("LWAS_CUDA", f'"{arches}"')]
        flags["nvcc"] = ["-std=c++20", "-O3"]
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    module = kind(
        name,
        SOURCES + (CUDA_SOURCES if with_cuda else []),
        define_macros=macros,
        extra_compile_args=flags,
        depends=[str(path) for path in Path("csrc").glob("*.*h")],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    # By hand, not by discovery, which does not follow links: lwas_fast/triton_kernels is a link to the folder
    # at the top. Naming both packages makes wheels and editable installs alike find it.
    packages=["lwas_fast", "lwas_fast.triton_kernels"],
    package_data={"lwas_fast": ["py.typed"]},
    **extension(),
)
