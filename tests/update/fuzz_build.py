"""Builds and runs the program of `fuzz/`: random lists of tensors, and the method in double to compare with.

The sanitizers' runtime does not go with a Python that was built without, so what is tested is linked into a program of
its own; what torch does around it (memory order, dtypes) is `test_fused.py`'s.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]


def missing() -> str | None:
    """What keeps the program from being built here, None if nothing does."""
    if shutil.which("g++") is None:
        return "needs g++"
    macros = subprocess.run(["g++", "-std=c++20", "-dM", "-E", "-xc++", os.devnull], capture_output=True, text=True)
    return None if "__FLT16_MAX__" in macros.stdout else "needs a g++ with C++20 and _Float16: 12 or newer on x86-64"


def build(program: Path, implementation: str, *others: object) -> Path:
    """Links `fuzz/` with one of its implementations; `others` are flags and sources."""
    sources = [HERE / "fuzz" / f"{name}.cpp" for name in ("fuzz", "list", "method", "ranks", implementation)]
    command = ["g++", *FLAGS, *map(str, others), *map(str, sources), f"-I{CSRC}", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


PLANTED = """#pragma once
#include <cstdlib>
[[maybe_unused]] static const int planted = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;
"""


def plant(folder: Path, sources: dict[str, str], faults: Mapping[str, tuple[str, str]]) -> None:
    """Write sources with all these faults into a folder, for compiling takes the time.

    A fault is what is right, and what goes in its stead, in which FAULT is true if the variable FAULT has its number,
    from 1 on. What is right must stand in the sources once.
    """
    for number, (name, (right, wrong)) in enumerate(faults.items(), start=1):
        times = sum(text.count(right) for text in sources.values())
        assert times == 1, f"{name}: {right!r} is there {times} times"
        wrong = re.sub(r"\bFAULT\b", f"(planted == {number})", wrong)
        sources = {file: text.replace(right, wrong) for file, text in sources.items()}
    (folder / "planted.h").write_text(PLANTED)
    for file, text in sources.items():
        (folder / file).write_text(f'#include "planted.h"\n{text}')


def run(program: Path, lists: int, seed: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, str(lists), str(seed)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def agree(program: Path, lists: int, seed: int, **environment: str) -> None:
    done = run(program, lists, seed, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip() == f"{lists} lists agree"
