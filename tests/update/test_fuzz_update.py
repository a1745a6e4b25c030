"""The compiled CPU update over random lists of tensors, under the address and undefined-behaviour sanitizers.

Catches: what `fuzz_update.cpp` lists. The sanitizers' runtime does not go with a Python that was built without, so the
update is linked into a program of its own; what torch does around it (memory order, dtypes) is `test_fused.py`'s.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")
@pytest.mark.parametrize(("lists", "seed"), [(1_000, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_random_lists_agree_with_the_method_in_double(lists: int, seed: int, tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    flags = ["-std=c++20", "-O1", "-g", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [HERE / "fuzz_update.cpp", HERE.parents[1] / "csrc" / "update_cpu.cpp"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True, timeout=300)
    done = subprocess.run([program, str(lists), str(seed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip() == f"{lists} lists agree"
