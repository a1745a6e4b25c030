"""Which extension a machine can build: what is found of compilers and toolkits, and what is said of what is missing.

Catches: a CUDA toolkit that is taken for whole because something called nvcc is on the PATH; a reason that is not the
true one; a name under which an extension of another torch or of other operators would be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lwas_fast.update import extension, toolchain

TORCH = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(is_available=lambda: False))


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine with nothing on its PATH, and where to put something."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def cuda_toolkit(home: Path, release: str = "13.0", headers: bool = True) -> Path:
    said = f"[ $1 = --dryrun ] && echo '#$ TOP={home}' >&2\necho 'release {release}, V{release}.1'"
    script(home / "bin" / "nvcc", said)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


def test_compiler_is_looked_for(bare, monkeypatch):
    assert toolchain.why_no_compiler() == "there is no C++ compiler (g++)"
    monkeypatch.setenv("CXX", "clang++-99 -pthread")
    assert "clang++-99" in toolchain.why_no_compiler()
    script(bare / "bin" / "clang++-99", "")
    assert toolchain.why_no_compiler() is None
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda *_: str(bare))
    assert "Python's headers are missing" in toolchain.why_no_compiler()


def test_script_on_the_path_leads_to_the_toolkit_that_it_calls(bare):
    home = cuda_toolkit(bare / "cuda-13")
    script(bare / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert toolchain.toolkit() == home
    assert toolchain.why_no_cuda(TORCH) is None


def test_link_on_the_path_leads_to_its_toolkit(bare):
    script(bare / "cuda" / "bin" / "nvcc", "exit 1")
    (bare / "bin" / "nvcc").symlink_to(bare / "cuda" / "bin" / "nvcc")
    assert toolchain.toolkit() == bare / "cuda"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": False}, "has no runtime headers"),
        ({"release": "12.8"}, "nvcc is of CUDA 12, this torch of 13.0"),
        ({"release": "x"}, "nvcc is of CUDA ?, this torch of 13.0"),
    ],
)
def test_toolkit_that_does_not_do_is_named(bare, monkeypatch, options, words):
    monkeypatch.setenv("CUDA_HOME", str(cuda_toolkit(bare / "cuda", **options)))
    assert words in toolchain.why_no_cuda(TORCH)


def test_no_toolkit_is_named(bare, monkeypatch):
    assert toolchain.why_no_cuda(SimpleNamespace(version=SimpleNamespace(cuda=None))) == "this torch has no CUDA"
    monkeypatch.setenv("CUDA_HOME", str(bare))
    assert "there is no CUDA toolkit with nvcc" in toolchain.why_no_cuda(TORCH)


def test_architectures(bare, monkeypatch):
    assert toolchain.architectures(TORCH) == "8.0;9.0+PTX"
    here = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 3, get_device_capability=[(9, 0), (8, 0), (8, 0)].__getitem__
    )
    assert toolchain.architectures(SimpleNamespace(cuda=here)) == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert toolchain.architectures(TORCH) == "7.5"


def test_name_is_for_one_torch_and_one_state_of_the_operators(monkeypatch):
    name = toolchain.module_name("2.13.1+cu130")
    assert name == toolchain.module_name("2.13.0") != toolchain.module_name("2.14.0")
    monkeypatch.setattr(toolchain, "INTERFACE", toolchain.INTERFACE + 1)
    assert name != toolchain.module_name("2.13.0")


def test_sources_say_the_same_interface():
    text = (Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text(encoding="utf-8")
    assert f'info["interface"] = {toolchain.INTERFACE};' in text
    assert extension.BUILD.get("interface", toolchain.INTERFACE) == toolchain.INTERFACE


def test_choice(monkeypatch):
    for value, choice in {"": "auto", "CPU": "cpu", "none": "none"}.items():
        monkeypatch.setenv("LWAS_FAST_BUILD", value)
        assert toolchain.wanted() == choice
    monkeypatch.setenv("LWAS_FAST_BUILD", "gpu")
    with pytest.raises(ValueError, match="LWAS_FAST_BUILD=gpu: it must be auto, cuda, cpu or none"):
        toolchain.wanted()
    monkeypatch.delenv("LWAS_FAST_BUILD")
    assert toolchain.wanted() == "auto"
    assert os.environ.get("LWAS_FAST_BUILD") is None
