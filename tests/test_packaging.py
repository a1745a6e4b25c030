"""What gets installed is whole: kernels and C++ code from the top of the repository, the marker of types, the version.

Catches: a wheel without ``lwas_fast.triton_kernels``, or without the sources that are built at first use; an installed
package that only imports inside the repository; a clone that runs another clone's kernels; a package that imports
Triton without need; an installation that fails, or compiles nothing, where less than all is there. `make package`
builds, installs and trains in earnest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import lwas_fast

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy(folder: Path) -> Path:
    """A second clone, as good as fresh: a build leaves its traces behind."""
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "bench", "docs")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=unwanted)
    return folder / "source"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built with this environment's own setuptools, without the extension, which takes a while to compile."""
    folder = tmp_path_factory.mktemp("wheel")
    copy(folder)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    run(*command, env=os.environ | {"LWAS_FAST_BUILD": "none"})
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"lwas_fast/py.typed"}
    expected |= {file.relative_to(ROOT).as_posix() for file in (ROOT / "lwas_fast").rglob("*.py")}
    expected |= {f"lwas_fast/triton_kernels/{file.name}" for file in (ROOT / "triton_kernels").glob("*.py")}
    expected |= {f"lwas_fast/csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    assert names == expected
    assert "lwas_fast/triton_kernels/__init__.py" in names


def test_installed_wheel_imports_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel)
    env = os.environ | {
        "PYTHONPATH": str(site),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
        "LWAS_FAST_BUILD": "cpu",
    }
    code = "import lwas_fast, lwas_fast.triton_kernels as k; print(lwas_fast.__file__, k.__file__, sep='\\n')"
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert [Path(line).is_relative_to(site) for line in done.split()] == [True, True]
    assert "will be compiled at first use" in run(sys.executable, "-m", "lwas_fast", cwd=tmp_path, env=env)
    assert not (tmp_path / "cache").exists()  # neither the import nor the question builds


def test_every_clone_runs_its_own_kernels(tmp_path: Path) -> None:
    """The environment may have an editable install of this clone, whose finder knows this clone's folder only."""
    code = "import lwas_fast, lwas_fast.triton_kernels as k; print(lwas_fast.__file__, k.__file__, sep='\\n')"
    done = run(sys.executable, "-c", code, cwd=copy(tmp_path))
    assert [Path(line).is_relative_to(tmp_path) for line in done.split()] == [True, True]


def test_source_distribution_has_what_is_needed_to_build_and_nothing_half(tmp_path: Path) -> None:
    code = "import setuptools.build_meta as b; b.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=copy(tmp_path), env=os.environ | {"LWAS_FAST_BUILD": "none"})
    (file,) = (tmp_path / "source" / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "triton_kernels/__init__.py", "lwas_fast/py.typed", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("tests")]  # they need bench, examples and docs as well


def test_old_setuptools_is_told_what_is_needed() -> None:
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    env = os.environ | {"LWAS_FAST_BUILD": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "this is 65.5.0: pip install 'setuptools>=77'" in done.stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [("gpu", "must be auto, cuda, cpu or none"), ("cuda", "LWAS_FAST_BUILD=cuda, but")],
)
def test_build_that_cannot_be_had_says_why(value: str, words: str, tmp_path: Path) -> None:
    if value == "cuda" and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"LWAS_FAST_BUILD": value},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert words in done.stderr


def test_build_without_torch_leaves_it_to_the_first_use() -> None:
    """As pip does it by itself: in an environment of its own, where torch is not."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    command, env = [sys.executable, "-c", code], os.environ | {"LWAS_FAST_BUILD": "auto"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert "torch cannot be imported here" in done.stderr and "tried again at first use" in done.stderr


# A torch with CUDA is pretended; the toolkit is one of which torch's headers know nothing. No compiler runs.
WITHOUT_CUDA = """
import runpy, sys, torch
from setuptools.command.build_ext import build_ext
torch.version.cuda, torch.cuda.is_available, torch.cuda._is_compiled = "13.0", lambda: False, lambda: True
def build(self):
    (module,) = self.extensions
    print(sorted(module.sources), module.optional)
    if module.define_macros:
        raise RuntimeError("no such header")
build_ext.build_extensions = build
sys.argv[1:] = ["build_ext", "--build-lib", "built", "--build-temp", "built"]
runpy.run_path("setup.py")
"""


def test_where_the_cuda_part_does_not_build_the_cpus_does(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0.1\n")
    nvcc.chmod(0o755)
    (tmp_path / "cuda" / "include").mkdir()
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    (tmp_path / "cuda" / "lib64").mkdir()
    env = os.environ | {"LWAS_FAST_BUILD": "auto", "CUDA_HOME": str(tmp_path / "cuda")}
    command = [sys.executable, "-c", WITHOUT_CUDA]
    done = subprocess.run(command, cwd=copy(tmp_path), env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    with_cuda, for_cpu = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert "update_cuda.cu" in with_cuda and "update_cuda.cu" not in for_cpu
    assert "the build with CUDA failed (no such header); once more, for the CPU alone" in done.stderr


def test_version_is_the_same_everywhere(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == lwas_fast.__version__
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a clone that was never installed
        assert metadata.version("lwas_fast") == lwas_fast.__version__


def test_triton_is_looked_for_only_when_asked() -> None:
    """Importing the package imports none; asked for its version, it is there or not."""
    code = """
import sys, types, torch
before = set(sys.modules)
import lwas_fast
from lwas_fast.rates import launch
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] == "triton"))
for triton in (None, types.SimpleNamespace(__version__="9.9")):
    sys.modules["triton"] = triton
    print(launch.triton_version())
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == ["[]", "None", "9.9"]
