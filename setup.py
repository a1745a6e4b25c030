"""Build of lwas_fast: what must be computed, above all which extension this machine can build.

``LWAS_FAST_BUILD`` says what to build: ``auto`` (default) what the machine can, ``cuda``, ``cpu`` or ``none``; without
an extension the package works in plain torch. torch must be there already: build with ``--no-build-isolation``. All
metadata is in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup

SOURCES = ["csrc/bindings.cpp", "csrc/update_cpu.cpp"]
CUDA_SOURCES = ["csrc/update_cuda.cu"]
# No C++ code of ours reads errno or floating-point exceptions; with them GCC vectorises neither root nor selection.
# Unrolling made AdamW's loop a fifth faster.
# Apple's compiler has no OpenMP of its own; there one thread does the work.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-funroll-loops"]
CXX_FLAGS += ["-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"]


def say(text: str) -> None:
    """Print a line that pip shows with -v, and that a build log keeps."""
    print(f"lwas_fast: {text}", file=sys.stderr)


def wanted() -> str:
    """Read LWAS_FAST_BUILD."""
    choice = os.environ.get("LWAS_FAST_BUILD", "auto").lower()
    if choice not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"LWAS_FAST_BUILD={choice}: it must be auto, cuda, cpu or none")
    return choice


def why_no_cuda(torch: ModuleType, home: str | None) -> str | None:
    """Say why the CUDA part cannot be built; None where it can."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    nvcc = Path(home or "") / "bin" / "nvcc"
    if home is None or not nvcc.exists():
        return "there is no CUDA toolkit with nvcc (set CUDA_HOME)"
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {found[1] if found else '?'}, this torch of {torch.version.cuda}"
    return None


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

    cuda_missing = why_no_cuda(torch, cpp_extension.CUDA_HOME)
    if cuda_missing and choice == "cuda":
        return without(cuda_missing, ("cuda",))
    with_cuda = choice != "cpu" and cuda_missing is None
    say(f"compiled update for {'CPU and CUDA' if with_cuda else f'the CPU ({cuda_missing or choice})'}")
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # torch would ask the GPUs that are not there

    # The name carries torch's version: there is no stable interface between its releases, so an extension is looked up
    # for the torch that runs, and one built for another is never loaded.
    name = "lwas_fast._C_torch" + "_".join(torch.__version__.split(".")[:2])
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST") or "the GPUs at build time"
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    module = kind(
        name,
        SOURCES + (CUDA_SOURCES if with_cuda else []),
        define_macros=[("LWAS_CUDA", f'"{arches}"')] if with_cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-std=c++20", "-O3"]},
        depends=[str(path) for path in Path("csrc").glob("*.*h")],
        optional=choice == "auto",
    )

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """torch's, which does not fail in earnest where the build was only tried."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # torch raises of many kinds
                if choice != "auto":
                    raise
                say(f"no compiled update: the build failed ({error}). The package works without, in plain torch")

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


# Without build isolation nobody reads what pyproject.toml asks for, and an older setuptools fails obscurely.
if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"lwas_fast is built with setuptools >= 77, and this is {setuptools_version}: pip install 'setuptools>=77'"
    )

setup(
    # The kernels stand at the top of the repository, beside csrc/, and are installed inside the package.
    packages=[*find_packages(include=["lwas_fast", "lwas_fast.*"]), "lwas_fast.triton_kernels"],
    package_dir={"lwas_fast.triton_kernels": "triton_kernels"},
    package_data={"lwas_fast": ["py.typed"]},
    **extension(),
)
