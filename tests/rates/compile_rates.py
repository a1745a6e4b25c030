"""Compile the rates' kernel ahead of time, for a list of GPU architectures; print what came out as JSON lines.

In a process of its own, because Triton is either a compiler or an interpreter, decided when it is imported:

    python -m tests.rates.compile_rates 80 90 100
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwas_fast.triton_kernels import layer_rates as kernels

ASSEMBLERS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(fn, pointers, constants, target, warps):
    """The kernel as PTX; pointers start at multiples of 16, as tensors do. What else is handed over is an int32."""
    signature = {**dict.fromkeys(fn.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    at = {name: i for i, name in enumerate(fn.arg_names)}
    attributes = {(at[name],): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn, signature, {(at[name],): value for name, value in constants.items()}, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]


def used(ptx, capability):
    """Registers and bytes spilled, by the assembler that comes with Triton."""
    assembler = ASSEMBLERS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    arch = re.search(r"^\.target (\S+?)(,|$)", ptx, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "-arch", arch, file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return {"registers": int(re.search(r"Used (\d+) registers", told).group(1)), "spilled": spilled}


def main():
    handed = {"tensors": "*i64", "chunks": "*i64", "layers": "*i64", "numbers": "*fp32"}
    handed |= {"partials": "*fp32", "arrivals": "*i32", "sums": "*fp32", "out": "*fp32"}
    sizes = {"chunk": kernels.CHUNK, "block": kernels.BLOCK, "at_once": kernels.AT_ONCE}
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        for choice in itertools.product([True, False], repeat=2):
            flags = dict(zip(("with_gradient", "finish"), choice, strict=True))
            ptx = compiled(kernels.layer_rates, handed, flags | sizes, target, kernels.WARPS)
            found = {
                "vector_loads": len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32", ptx)),
                # Arrivals are counted, and partial sums read, where all programs see them.
                "published": "atom.global.gpu.acq_rel.add" in ptx,
                "fresh": len(re.findall(r"ld\.global\.cg", ptx)) >= 2,
            }
            print(json.dumps({"kernel": "layer_rates", "sm": capability, **flags, **found, **used(ptx, capability)}))


if __name__ == "__main__":
    main()
