"""What can be proved of the CUDA kernels where no GPU is: they compile as torch would compile them, and well.

Catches: code that only compiles without torch's flags, spilled registers, loads and stores that fell back to single
numbers, arguments over a launch's limit, a binding that no longer fits torch's CUDA headers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
# One here: nothing but the assembler differs. `.ci/run` compiles for all of them.
ARCHITECTURES = ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100"))]
PASSES = 16  # two passes, four rules, two sizes of the table
OTHERS = 4  # sums of layers and totals in their place, two sizes of the table

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def toolkit() -> Path:
    """The toolkit's folder, which nvcc on the PATH may be a wrapper of."""
    text = subprocess.run([NVCC, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=100).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)[1]).resolve()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_and_with_wide_accesses(architecture, tmp_path):
    flags = [flag for flag in cpp_extension.COMMON_NVCC_FLAGS if flag.startswith("-D") or "relaxed" in flag]
    assert len(flags) >= 4
    report = run(
        NVCC, "-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", *flags,
        "--keep", "--keep-dir", tmp_path, CSRC / "update_cuda.cu", "-o", tmp_path / "update.cubin",
    )  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    print(f"{architecture}: {registers} registers")
    assert len(spills) == len(registers) == PASSES + OTHERS
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 65536 // (256 * 3)  # three blocks of 256 threads share a multiprocessor
    # Full vectors are moved in one instruction.
    kernels = re.split(r"\.entry ", (tmp_path / "update_cuda.ptx").read_text())[1:]
    passes = [kernel for kernel in kernels if "_pass" in kernel.split("(")[0]]
    assert (len(kernels), len(passes)) == (PASSES + OTHERS, PASSES)
    for kernel in passes:
        for access in ("ld", "st"):
            assert re.search(rf"\b{access}\.global(\.nc)?\.v4\.[bfu]32", kernel), (access, kernel.split("(")[0])


def test_binding_fits_the_cuda_headers_of_this_torch(tmp_path):
    # The one header that a torch without CUDA leaves out; it names build options that this file does not use.
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n")
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include"), toolkit() / "include", tmp_path]
    if not (toolkit() / "include" / "cuda_runtime_api.h").exists():
        pytest.skip("the toolkit has no runtime headers")
    run(
        "g++", "-std=c++20", "-fsyntax-only", "-fopenmp", "-DLWAS_CUDA=\"x\"", "-DTORCH_EXTENSION_NAME=_C",
        *(f"-I{folder}" for folder in folders), CSRC / "bindings.cpp",
    )  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_build_says_which_architectures_it_has():
    from lwas_fast.update import extension

    if extension.EXTENSION is None or not extension.EXTENSION.build_info()["cuda"]:
        pytest.skip("built without CUDA")
    assert re.search(r"\d\.\d|GPUs", extension.EXTENSION.build_info()["cuda"])
