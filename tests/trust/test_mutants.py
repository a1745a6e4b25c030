"""Faults planted in the package, of which `make test`'s own files must find each.

Catches: tests that pass whatever the package computes. Every fault of `planted/` would be silent in training: no
crash, but wrong numbers.

Those in C++ are all in one program, that of the update's own tests, and a variable of its environment picks one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fuzz_build
import pytest
import test_fuzz_cuda
import torch
from planted import BINDINGS, CPP, PYTHON, Fault

from lwas_fast.rates import launch
from lwas_fast.update import extension, toolchain

ROOT = Path(__file__).parents[2]
COPIED = ("lwas_fast", "triton_kernels", "tests", "pyproject.toml")


def path_of(fault: Fault) -> Path:
    return Path("lwas_fast", fault.file) if not fault.file.startswith("../") else Path(fault.file[3:])


def test_every_fault_has_its_place_and_its_tests() -> None:
    for name, fault in PYTHON.items():
        there = (ROOT / path_of(fault)).read_text(encoding="utf-8").count(fault.right)
        assert there == 1, f"{name}: what it replaces stands {there} times in {fault.file}"
        assert fault.right != fault.wrong, name
        assert fault.tests, name
        for test in fault.tests:
            file, _, node = test.partition("::")
            assert (ROOT / "tests" / file).is_file(), f"{name}: no {file}"
            function = node.partition("[")[0]
            assert f"def {function}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{name}: no {test}"
    of_cpp = {**CPP, **{f"bindings: {name}": ("bindings.cpp", right, "") for name, (right, *_) in BINDINGS.items()}}
    for name, (file, right, _) in of_cpp.items():
        there = (ROOT / "csrc" / file).read_text(encoding="utf-8").count(right)
        assert there == 1, f"{name}: what it replaces stands {there} times in {file}"


def copied(folder: Path) -> Path:
    """Copy the package and its tests into a folder, to plant faults in."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "planted", "test_mutants.py")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    # Says whose package was tested.
    (folder / "whose.py").write_text(
        "def pytest_sessionfinish():\n    import lwas_fast\n    print('\\ntested', lwas_fast.__file__)\n"
    )
    return folder


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("planted"))


def run(folder: Path, *tests: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy, up to the first that fails, in a process of its own with `more` in its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # where there is a GPU, its tests take long, and find no more
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "whose"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
    return subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def ended(done: subprocess.CompletedProcess[str], folder: Path) -> int:
    """How pytest ended, once it is clear that it tested the copy."""
    assert f"tested {folder}{os.sep}lwas_fast{os.sep}__init__.py" in done.stdout, done.stdout[-2000:] + done.stderr
    return done.returncode


@pytest.mark.slow
def test_without_a_fault_all_of_them_pass(copy: Path) -> None:
    done = run(copy, *dict.fromkeys(test for fault in PYTHON.values() for test in fault.tests))
    assert ended(done, copy) == 0, done.stdout[-4000:]


def lacks(needs: str | None) -> bool:
    missing = {"extension": extension.EXTENSION is None, "triton": launch.triton_version() is None}
    return needs is not None and missing[needs]


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHON)
def test_a_fault_is_found(name: str, copy: Path, tally: Callable[[str], Any]) -> None:
    fault = PYTHON[name]
    if lacks(fault.needs):
        pytest.skip(f"needs {fault.needs}")
    place = copy / path_of(fault)
    source = place.read_text(encoding="utf-8")
    place.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        done = run(copy, *fault.tests)
    finally:
        place.write_text(source, encoding="utf-8")
    with tally("planted faults, Python") as row:
        row.held(ended(done, copy) == 1, f"{name}: {done.stdout[-1500:]}")


def survivors(program: Path, count: int, lists: int, seed: int, row: Any, names: Iterable[str]) -> None:
    """Run a program with each of its faults; it must agree without."""
    fuzz_build.agree(program, count, seed, FAULT="0")
    for number, name in enumerate(names, start=1):
        done = fuzz_build.run(program, lists, seed, FAULT=str(number))
        row.held(done.returncode != 0, f"{name}: {done.stdout}")


@pytest.mark.slow
@pytest.mark.skipif(fuzz_build.missing() is not None, reason=fuzz_build.missing() or "")
def test_faults_of_the_compiled_update_are_found(tmp_path: Path, tally: Callable[[str], Any]) -> None:
    """By the lists that `test_fuzz_update.py` draws."""
    sources = {file: (ROOT / "csrc" / file).read_text(encoding="utf-8") for file, _, _ in CPP.values()}
    sources["update.h"] = (ROOT / "csrc" / "update.h").read_text(encoding="utf-8")  # includes what lies beside it
    fuzz_build.plant(tmp_path, sources, {name: (right, wrong) for name, (_, right, wrong) in CPP.items()})
    flags = (*fuzz_build.SANITIZERS, "-fopenmp-simd", f"-I{tmp_path}")
    program = fuzz_build.build(tmp_path / "fuzz", "cpu", *flags, tmp_path / "update_cpu.cpp")
    with tally("planted faults, C++") as row:
        survivors(program, 1000, 1000, 1, row, CPP)


@pytest.mark.slow
@pytest.mark.skipif(extension.EXTENSION is None, reason=f"no compiled update: {extension.MISSING}")
def test_faults_of_the_bindings_are_found(tmp_path: Path, tally: Callable[[str], Any]) -> None:
    """By the tests of the compiled update, with an extension that has them all."""
    folder, building = tmp_path / "copy", tmp_path / "building"
    folder.mkdir()
    copied(folder)
    name = toolchain.module_name(torch.__version__)
    shutil.copytree(ROOT / "csrc", building / "csrc")
    source = (ROOT / "csrc" / "bindings.cpp").read_text(encoding="utf-8")
    faults = {fault: (right, wrong) for fault, (right, wrong, _) in BINDINGS.items()}
    fuzz_build.plant(building / "csrc", {"bindings.cpp": source}, faults)
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, toolchain.__file__, name, ""]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    built = subprocess.run(command, cwd=building, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    (library,) = building.glob(f"{name}.*")
    (old,) = (folder / "lwas_fast").glob(f"{name}.*")
    library.replace(old)
    done = run(folder, *dict.fromkeys(test for *_, test in BINDINGS.values()), FAULT="0")
    assert ended(done, folder) == 0, done.stdout[-4000:]
    with tally("planted faults, C++") as row:
        for number, (fault, (*_, test)) in enumerate(BINDINGS.items(), start=1):
            done = run(folder, test, FAULT=str(number))
            row.held(ended(done, folder) == 1, f"{fault}: {done.stdout[-1500:]}")


@pytest.mark.slow
@pytest.mark.skipif(test_fuzz_cuda.WHY_NOT is not None, reason=test_fuzz_cuda.WHY_NOT or "")
def test_faults_of_the_cuda_kernels_are_found(tmp_path: Path, tally: Callable[[str], Any]) -> None:
    """By the lists that `test_fuzz_cuda.py` draws, on its emulator."""
    flags = (*fuzz_build.SANITIZERS, test_fuzz_cuda.SMALL_TABLES)
    program = test_fuzz_cuda.emulated(tmp_path, *flags, faults=True)
    with tally("planted faults, CUDA on an emulator") as row:
        survivors(program, 150, 300, 7, row, test_fuzz_cuda.FAULTS)
