"""The build at first use with a real compiler, in processes of their own.

Catches: sources or flags that only setup.py knows, two processes that both build, compilers that go on after the user
interrupted, a first step that needs another import than `import lwas_fast`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lwas_fast.update import toolchain

ROOT = Path(__file__).parents[2]
FIRST_STEP = """
import torch, lwas_fast
from lwas_fast.update import extension
assert extension.EXTENSION is None
p = torch.ones(5).requires_grad_()
opt = lwas_fast.AdamWLW([p])
p.grad = torch.ones(5)
opt.step()
print(extension.EXTENSION.__file__, extension.BUILD["interface"])
"""


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """The environment of processes that see an installation without an extension, and an empty cache."""
    shutil.copytree(ROOT / "lwas_fast", tmp_path / "lwas_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("csrc", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / "lwas_fast" / name)
    env = {name: value for name, value in os.environ.items() if name != "LWAS_FAST_BUILD"}
    own = {"PYTHONPATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return env | own


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_interrupted_in_earnest_leaves_no_compiler(tmp_path, elsewhere):
    slow = tmp_path / "slow-compiler"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ >> {tmp_path}/pids; exec sleep 100;; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    # What runs in the background inherits that it ignores the signal.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", listens + FIRST_STEP]
    process = subprocess.Popen(command, env=elsewhere | {"CXX": str(slow)}, cwd=tmp_path)
    pids, start = tmp_path / "pids", time.monotonic()
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert process.poll() is None and time.monotonic() - start < 100
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) != 0
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() - start < 100
        time.sleep(0.1)
    assert not list((tmp_path / "cache").rglob("building-*"))


@pytest.mark.slow
def test_build_in_earnest(tmp_path, elsewhere):
    """Two fresh processes at a time on an installation without an extension: one builds, both use it."""
    command = [sys.executable, "-c", FIRST_STEP]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    done = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert {out.split()[1] for out, _ in done} == {str(toolchain.INTERFACE)}
    assert len({out.split()[0] for out, _ in done}) == 1
    lines = "".join(err for _, err in done)
    assert lines.count("building its compiled update") == 1 and lines.count("built in") == 1
