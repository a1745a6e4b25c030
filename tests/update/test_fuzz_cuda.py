"""The CUDA kernels over random lists of tensors, without a GPU: `emulator/` runs their source on a CPU.

Catches: what `fuzz/fuzz.cpp` lists, threads that read what others have not written yet, barriers and shuffles that not
all threads reach; and with the sanitizers, accesses outside an array or misaligned. That it does is tested too: faults
planted in the source must be found.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest
from fuzz_build import CSRC, HERE, SANITIZERS, agree, build, missing, plant, run

X86 = sys.platform == "linux" and platform.machine() == "x86_64"
WHY_NOT = missing() if X86 else "the emulator's switch between fibers is for x86-64 and Linux"
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

# Drivers before 12.1 take small tables of tensors only; later ones take a large one for a long list.
DRIVERS = {"12000": 3, "13000": 4}  # and a seed for each
SMALL_TABLES = "-DCUDART_VERSION=12000"  # so does an old toolkit, and it compiles half as much


def no_barrier(before: str) -> tuple[str, str]:
    """The barrier in front of these words, and in its stead none."""
    return f"__syncthreads();{before}", f"if (!FAULT) __syncthreads();{before}"


# See `plant`. Of the barriers, only the first
# of reduce_block is not here: its callers have others, and without it nothing goes wrong today.
FAULTS = {
    "partial sums at the wrong place": (
        "s.partials[table.chunk_base + chunk] =",
        "s.partials[FAULT ? chunk : table.chunk_base + chunk] =",
    ),
    "every block keeps the books": (
        "if (table.chunk_base + chunk == layer_begin) record",
        "if (FAULT || table.chunk_base + chunk == layer_begin) record",
    ),
    "the step count goes up where nothing moves": ("&& settled.moves)", "&& (FAULT || settled.moves))"),
    "the step count gets the sign of its flag": (
        "s.steps[table.place[tensor]] = fabsf(own.state)",
        "s.steps[table.place[tensor]] = FAULT ? own.state : fabsf(own.state)",
    ),
    "rows of another layer's": ("if (row != table.row[tensor]) {", "if (FAULT ? row < 0 : row != table.row[tensor]) {"),
    "whether a layer waited is asked again": (
        "own.state < 0, value.largest",
        "FAULT ? waits<Rule>(s.options, s.control, \n"
        "foreseen_rate(s.control, statistics, elements)) : own.state < 0,"
        "value.largest",
    ),
    "the rate that was foreseen is asked again": (
        "settle(s.control, statistics, own.foreseen,",
        "settle(s.control, statistics, FAULT ? foreseen_rate(s.control, statistics, elements) : own.foreseen,",
    ),
    "the limit of a layer's moves is asked again": (
        "settled.before, own.limit, settled",
        "settled.before, FAULT ? limit_of(statistics, double(table.elements[tensor]), false) : own.limit, settled",
    ),
    "a chunk is put right twice": ("blockIdx.x / gridDim.x);", "blockIdx.x / gridDim.x) - (FAULT && blockIdx.x > 0);"),
    "a layer's last chunk is left out": ("i < layer_end; i +=", "i < layer_end - FAULT; i +="),
    "the elements of the tensor for the layer's": ("= slot.elements;", "= FAULT ? slot.size : slot.elements;"),
    "a layer's sums count twice in a step of two parts": (
        "partial.skipped = partial.held = 0;",
        "partial.skipped = FAULT ? partial.skipped : partial.held = 0;",
    ),
    "totals of another launch's layers": ("call.totals + first *", "call.totals + (FAULT ? 0 : first) *"),
    "a layer that another rank held back": ("of[3] > 0 ?", "!FAULT && of[3] > 0 ?"),
    "totals of what did not happen": (
        "found_inf && *found_inf != 0 ? 0 :",
        "!FAULT && found_inf && *found_inf != 0 ? 0 :",
    ),
    "the second part makes the first pass again": ("if (!call.settles) {\n", "if (FAULT || !call.settles) {\n"),
    "no barrier behind the first pass' scalars": no_barrier("\n  const Bias bias"),
    "no barrier behind the warps' sums": no_barrier("\n  if (warp == 0)"),
    "no barrier behind what the layer's step is": no_barrier("\n    }\n    const Settled"),
    "no barrier behind the second pass' bias": no_barrier("\n    const Bias bias"),
    "no barrier behind a chunk that was put right": no_barrier("  // before bias_shared"),
    "a barrier that one warp does not reach": (
        "__syncthreads();\n  const Bias bias",
        "if (!FAULT || threadIdx.x >= 32) __syncthreads();\n  const Bias bias",
    ),
    "a lane's sum is left out": ("offset > 0; offset /= 2", "offset > FAULT; offset /= 2"),
    "a warp's sum is left out": ("lane < kThreads / 32 ?", "lane < kThreads / 32 - FAULT ?"),
    "the largest value of the first lane": (
        "largest = other.largest > largest ?",
        "largest = !FAULT && other.largest > largest ?",
    ),
    "the first element behind the vectors is left out": (
        "int i = whole + threadIdx.x;",
        "int i = whole + threadIdx.x + FAULT;",
    ),
    "an element behind the last": ("i < count; i +=", "i < count + FAULT; i +="),
    "the first pass' rounding is lost to the state": (
        "weight, m, v, sums);\n          if (sizeof(T)",
        "weight, m, v, sums);\n          if (!FAULT && sizeof(T)",
    ),
    "the second pass' rounding is lost to the state": (
        "weight, m, v);\n            if (sizeof(T)",
        "weight, m, v);\n            if (!FAULT && sizeof(T)",
    ),
    "the tensor before a chunk's": ("(first_chunk[middle] <= chunk ?", "(first_chunk[middle] + FAULT <= chunk ?"),
    "vectors at addresses that are not theirs": ("return bits % 16 == 0", "return bits % (FAULT ? 4 : 16) == 0"),
}


def rewrite(source: str) -> str:
    """The two things that no header can teach a C++ compiler."""
    source, launches = re.subn(
        r"(\w+<[^;]*>)<<<([^;]+)>>>\(([^;]*)\);", r"emulator::launch(\2, [&] { \1(\3); });", source
    )
    # One copy that all threads read. A copy for each of them would be most of the work.
    source, parameters = re.subn(r"const __grid_constant__ (\S+) ", r"const \1& ", source)
    assert (launches, parameters) == (4, 6), "the kernels are launched or declared in another way: see rewrite()"
    return source


def emulated(folder: Path, *flags: str, faults: bool = False) -> Path:
    sources = {"update_cuda.cpp": rewrite((CSRC / "update_cuda.cu").read_text())}
    if faults:
        sources |= {name: (CSRC / name).read_text() for name in ("multi_tensor.cuh", "chunks.h")}
    plant(folder, sources, FAULTS if faults else {})
    source = folder / "update_cuda.cpp"
    emulator = HERE / "emulator"
    # Fibers do not return in the order in which they were called; a processor's shadow stack would stop them.
    flags += ("-Wno-unknown-pragmas", "-fcf-protection=none", f"-I{emulator}")
    return build(folder / "fuzz", "cuda", *flags, emulator / "emulator.cpp", source)


@pytest.mark.parametrize("lists", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_lists_agree_with_the_method_in_double(lists: int, tmp_path: Path) -> None:
    program = emulated(tmp_path, "-O2")
    for driver, seed in DRIVERS.items():
        agree(program, lists, seed + lists, EMULATED_DRIVER=driver)


def test_sanitizers_find_nothing_and_planted_faults_are_found(tmp_path: Path) -> None:
    program = emulated(tmp_path, *SANITIZERS, SMALL_TABLES, faults=True)
    agree(program, 150, 5, FAULT="0")
    missed = []
    for number, name in enumerate(FAULTS, start=1):
        done = run(program, 300, 7, FAULT=str(number))
        print(f"{name}: {(done.stdout + done.stderr).strip()[:200]}")
        if done.returncode == 0:
            missed.append(name)
    assert not missed
