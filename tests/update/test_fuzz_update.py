"""The compiled CPU update over random lists of tensors, under the address and undefined-behaviour sanitizers.

Catches: what `fuzz/fuzz.cpp` lists. `test_fuzz_cuda.py` does the same with the CUDA kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_build import CSRC, SANITIZERS, agree, build, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.mark.parametrize(("lists", "seed"), [(1_000, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_random_lists_agree_with_the_method_in_double(lists: int, seed: int, tmp_path: Path) -> None:
    agree(build(tmp_path / "fuzz", "cpu", *SANITIZERS, "-fopenmp-simd", CSRC / "update_cpu.cpp"), lists, seed)
