"""The compiled update built at first use, where the installation has none that fits: once a machine, into a cache.

What is built and why it may not be is decided in `toolchain.py`, as for an installation. The build runs in a process of
its own: it changes neither the environment nor the modules of the one that trains.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lwas_fast.update import toolchain

LIMIT = 600.0  # seconds that a build may take, and that others wait for it
FAILED: dict[Path, str] = {}  # what could not be built, and why: not tried again by this process
REFUSED = "LWAS_FAST_BUILD=none"
log = logging.getLogger("lwas_fast")


class Plan(NamedTuple):
    """What is to be built, or was before.

    Attributes:
        library: Where it lies when it is built.
        cuda: The architectures of its CUDA part, or None.
        without: Why it has no CUDA part.
    """

    library: Path
    cuda: str | None
    without: str

    def __str__(self) -> str:
        """For what it is, and in short why not for more."""
        return f"CPU and CUDA ({self.cuda})" if self.cuda else f"the CPU ({self.without.partition(':')[0]})"


def sources() -> Path | None:
    """The folder of the C++ code: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    return next((f for f in (package / "csrc", package.parent / "csrc") if (f / "bindings.cpp").exists()), None)


def _library(csrc: Path, cuda: str | None) -> Path:
    """Where a library of these sources for this torch and Python lies: in the folder that torch's own builds use."""
    digest = hashlib.sha256(repr([toolchain.CXX_FLAGS, toolchain.NVCC_FLAGS, cuda]).encode())
    for file in sorted(csrc.glob("*.[ch]*")):
        digest.update(file.name.encode() + file.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(home, "torch_extensions"))
    kind = f"{'cpu' if cuda is None else 'cuda'}-{digest.hexdigest()[:12]}"
    folder = f"lwas_fast-torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}-{kind}"
    return root / folder / (toolchain.module_name(torch.__version__) + str(sysconfig.get_config_var("EXT_SUFFIX")))


def plan() -> Plan | str:
    """What is built at first use here, or was before; or why nothing can be."""
    try:
        choice = toolchain.wanted()
    except ValueError as error:
        return str(error)
    if choice == "none":
        return REFUSED
    csrc = sources()
    if csrc is None or os.name != "posix":
        return "its sources are not there" if csrc is None else f"that is not written for {sys.platform}"
    cuda = toolchain.architectures(torch) if torch.version.cuda is not None and choice != "cpu" else None
    with_cuda = _library(csrc, cuda)
    if choice == "cpu":
        without: str | None = "LWAS_FAST_BUILD=cpu"
    elif choice == "auto" and cuda is not None and not torch.cuda.is_available():
        without = "no GPU was found"
    elif cuda is not None and with_cuda.exists():
        without = None  # then no compiler needs to be here
    else:
        without = FAILED.get(with_cuda) if cuda is not None else None
        without = without or toolchain.why_no_cuda(torch)
    found = Plan(with_cuda, cuda, "") if without is None else Plan(_library(csrc, None), None, without)
    reason = without if choice == "cuda" else None
    if reason is None and not found.library.exists():
        reason = toolchain.why_no_compiler()
    if reason is not None:
        return reason if choice == "auto" else f"LWAS_FAST_BUILD={choice}, but {reason}"
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[float | None]:
    """Hold a lock that the system drops with its process; yields since when another's was waited for, or None."""
    import fcntl

    start, waited = time.time(), False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    log.warning("lwas_fast: another process builds the compiled update; waiting for it")
                waited = True
            except OSError:  # a file system without locks. Two builds do each other no harm: the last one stands
                break
            if time.time() - start > LIMIT:
                raise TimeoutError(f"another process has been building it for {LIMIT:.0f} s; it holds {path}")
            time.sleep(0.2)
        yield start if waited else None


def build(wanted: Plan) -> str | None:
    """Build it, unless it is there or another process builds it just now; None, or why it is not there.

    One line is logged before, and one after.
    """
    folder = wanted.library.parent
    failure = folder / "failure.txt"  # of the last build: for those that waited for it
    if wanted.library.exists() or wanted.library in FAILED:
        return FAILED.get(wanted.library)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock") as since:
            if wanted.library.exists():
                return None
            if since is not None and failure.exists() and failure.stat().st_mtime >= since:
                reason: str | None = failure.read_text(encoding="utf-8")
            else:
                reason = _compile(wanted)
                if reason is not None:
                    failure.write_text(reason, encoding="utf-8")
    except OSError as error:  # no space, no permission, waited too long
        reason = f"{error} (TORCH_EXTENSIONS_DIR names another folder)"
    if reason is not None:
        FAILED[wanted.library] = reason
        say(reason, "CUDA tensors are updated in plain torch" if wanted.cuda else "Plain torch serves")
    return reason


def say(reason: str, what_follows: str) -> None:
    """Log why there is no compiled update."""
    log.warning(
        "lwas_fast: no compiled update: %s. %s, with the same results but slower; LWAS_FAST_BUILD=none stops trying",
        reason,
        what_follows,
    )


def _compile(wanted: Plan) -> str | None:
    log.warning(
        "lwas_fast: building its compiled update for torch %s, for %s. This takes about a minute, once; "
        "LWAS_FAST_BUILD=none refuses",
        torch.__version__,
        wanted,
    )
    start, folder = time.monotonic(), wanted.library.parent
    name, report = toolchain.module_name(torch.__version__), folder / "build.log"
    # Not by -m: that would import this package, in a process that only compiles.
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, toolchain.__file__, name, wanted.cuda or ""]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # ninja may be installed beside a Python whose environment is not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder, ignore_cleanup_errors=True) as work:
        shutil.copytree(sources() or "", Path(work, "csrc"))
        with report.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                command, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
            try:
                process.wait(LIMIT)
            except BaseException as error:  # the user interrupts: then no compiler goes on
                os.killpg(process.pid, signal.SIGTERM)  # ninja hands it on; not by a signal that it could not catch
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                out.write(f"\nerror: not ready after {LIMIT:.0f} s\n")
        built = Path(work, wanted.library.name)
        if process.returncode != 0 or not built.exists():
            taken = f"{time.monotonic() - start:.0f} s"
            return f"the build for {wanted} failed after {taken}: {_cause(report)} (all of it: {report})"
        os.replace(built, wanted.library)  # whole, or not at all
    log.warning("lwas_fast: built in %.0f s, into %s", time.monotonic() - start, folder)
    return None


def _cause(report: Path) -> str:
    """The line of a build's output that says best why it failed: the first error, for others follow from it."""
    lines = [line.strip() for line in report.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(error|fatal)\s*:|\bcannot find\b", line, re.IGNORECASE)]
    return (errors or lines[-1:] or ["it said nothing"])[0][:300]
