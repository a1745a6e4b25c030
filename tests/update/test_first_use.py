"""The compiled update built at first use: what is decided, what is said, and that a failure costs nothing but speed.

Catches: a build that `import`, a query or plain torch set off; an extension of another torch, of other sources or
flags taken from the cache; a CUDA part tried where it cannot work, or no extension at all in its place; a build that
fails without a word, twice, or with a reason that is not its own; processes that build the same thing side by side, or
that wait forever for one that was interrupted. The compiler is a fake in all tests but one.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import NO_COMPILED_STEP

from lwas_fast import AdamWLW
from lwas_fast.__main__ import main
from lwas_fast.installed import describe
from lwas_fast.update import extension, first_use, toolchain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a process in which nothing was loaded or tried."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LWAS_FAST_BUILD")
    monkeypatch.setattr(first_use, "FAILED", {})
    fresh = {"EXTENSION": None, "MISSING": "none was compiled at installation", "BUILD": {}, "TRIED": {}}
    for name, value in (fresh | {"WITHOUT_CUDA": ""}).items():
        monkeypatch.setattr(extension, name, value)
    return tmp_path / "cache"


class Compiler:
    """In place of the real one: what it was asked for, and what becomes of it."""

    def __init__(self, monkeypatch):
        self.plans: list[first_use.Plan] = []
        self.fails: dict[bool, str] = {}  # with CUDA or not
        monkeypatch.setattr(first_use, "_compile", self)
        monkeypatch.setattr(extension, "_load", lambda library: (self, ""))

    def __call__(self, plan: first_use.Plan) -> str | None:
        self.plans.append(plan)
        if (reason := self.fails.get(plan.cuda is not None)) is None:
            plan.library.write_text("built")
        return reason

    def build_info(self) -> dict:
        return {
            "cuda": self.plans[-1].cuda if self.plans else None,
            "torch": "9",
            "compiler": "x",
            "float16_on_cpu": True,
        }


@pytest.fixture
def compiler(cache, monkeypatch) -> Compiler:
    monkeypatch.setattr(toolchain, "why_no_compiler", lambda: None)
    return Compiler(monkeypatch)


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A torch with CUDA, a GPU and a toolkit, all pretended."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(toolchain, "architectures", lambda _: "9.0+PTX")
    monkeypatch.setattr(toolchain, "why_no_cuda", lambda _: None)


def serves(dtype: torch.dtype = torch.float32, **options: object) -> bool:
    opt = AdamWLW([torch.zeros(3, dtype=dtype).requires_grad_()], **options)
    return extension.serves(opt.rule, opt.param_groups[0], opt._layout.buckets[0])


def table() -> str:
    return dict(describe())["update"]


def test_built_once_when_it_is_first_needed(compiler, caplog):
    assert "will be compiled at first use, for the CPU" in table()
    opt = AdamWLW([torch.zeros(3).requires_grad_()])
    opt.zero_grad()
    plain = (serves(foreach=True), serves(foreach=False), serves(fused=False), serves(torch.float64))
    assert not any(plain)
    assert compiler.plans == []  # nothing of this needed it
    assert serves() and serves() and serves(fused=True)
    assert len(compiler.plans) == 1
    assert "compiled, for CPU" in table()


@pytest.mark.parametrize("fails", [False, True])
def test_command_builds_now(compiler, monkeypatch, capsys, fails):
    compiler.fails = {False: "the build failed"} if fails else {}
    monkeypatch.setattr(sys, "argv", ["lwas_fast", "--build"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == fails
    assert len(compiler.plans) == 1
    assert ("the build failed" if fails else "compiled, for CPU") in capsys.readouterr().out


def test_fused_builds_when_the_optimizer_is_made(compiler):
    AdamWLW([("weight", torch.zeros(3).requires_grad_())], fused=True)
    assert len(compiler.plans) == 1


def test_what_an_earlier_process_built_is_taken_without_a_compiler(compiler, monkeypatch):
    first_use.build(first_use.plan())
    monkeypatch.setattr(toolchain, "why_no_compiler", lambda: "there is no C++ compiler")
    assert "compiled, for CPU" in table()
    assert serves()
    assert len(compiler.plans) == 1


@pytest.mark.parametrize("again", [False, True])
def test_what_cannot_be_loaded_is_built_anew(compiler, monkeypatch, caplog, again):
    """By another machine's system in a shared home, or cut short."""
    first_use.build(first_use.plan())
    library = first_use.plan().library
    library.write_text("of another machine")

    def load(path):
        bad = again or path.read_text() != "built"
        return (None, f"{path} cannot be loaded (file too short)") if bad else (compiler, "")

    monkeypatch.setattr(extension, "_load", load)
    assert serves() is not again
    assert "cannot be loaded" in caplog.text if again else library.read_text() == "built"


def test_cache_is_for_this_torch_python_sources_and_flags(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "why_no_compiler", lambda: None)

    def library() -> Path:
        return first_use.plan().library

    before = library()
    assert before == library()
    assert before.is_relative_to(cache)
    assert torch.__version__ in str(before) and sysconfig.get_config_var("SOABI") in str(before)
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.99.0")
        assert library() != before
    with monkeypatch.context() as other:
        other.setattr(toolchain, "CXX_FLAGS", ["-O1"])
        assert library() != before
    with monkeypatch.context() as other:
        csrc = tmp_path / "csrc"
        csrc.mkdir()
        for file in (ROOT / "csrc").iterdir():
            (csrc / file.name).write_bytes(file.read_bytes())
        other.setattr(first_use, "sources", lambda: csrc)
        assert library() == before
        (csrc / "update.h").write_text("// another")
        assert library() != before


@pytest.mark.parametrize(
    ("value", "missing", "words"),
    [
        ("none", None, "LWAS_FAST_BUILD=none"),
        ("gpu", None, "LWAS_FAST_BUILD=gpu: it must be"),
        ("cuda", None, "LWAS_FAST_BUILD=cuda, but this torch has no CUDA"),
        ("cpu", "there is no C++ compiler (g++)", "LWAS_FAST_BUILD=cpu, but there is no C++ compiler"),
        ("auto", "there is no C++ compiler (g++)", "there is no C++ compiler"),
    ],
)
def test_true_reason_is_named(compiler, monkeypatch, caplog, value, missing, words):
    monkeypatch.setenv("LWAS_FAST_BUILD", value)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(toolchain, "why_no_compiler", lambda: missing)
    assert table().startswith("torch foreach; no compiled update: none was compiled at installation")
    assert words in table()
    assert not serves()
    assert (words in caplog.text) == (value in ("gpu", "cuda", "cpu"))  # who insists is told
    with pytest.raises(RuntimeError, match=f"fused=True.*no compiled update.*{re.escape(words)}"):
        serves(fused=True)
    assert compiler.plans == []


def test_failed_build_says_why_once_and_plain_torch_serves(compiler, caplog):
    compiler.fails[False] = "its build failed after 3 s: a.cpp:1: error: no such thing"
    p = torch.ones(3).requires_grad_()
    opt = AdamWLW([p])
    for _ in range(3):
        p.grad = torch.ones(3)
        opt.step()
    assert p[0] < 1
    assert len(compiler.plans) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "error: no such thing. Plain torch serves" in line
    assert "error: no such thing" in table()
    with pytest.raises(RuntimeError, match="error: no such thing"):
        AdamWLW([p], fused=True)


@NO_COMPILED_STEP
def test_torch_compile_does_not_trace_the_build(compiler, recwarn):
    compiler.fails[False] = "its build failed"
    torch.compiler.reset()  # what other tests compiled is reused, and traced differently
    p = torch.ones(3).requires_grad_()
    p.grad = torch.ones(3)
    torch.compile(AdamWLW([p]).step, backend="eager")()
    assert p[0] < 1
    assert len(compiler.plans) == 1
    assert not [str(w.message) for w in recwarn if "Dynamo does not know" in str(w.message)]


def test_gpu_gets_both_parts(compiler, gpu):
    assert extension.missing("cuda") is None and extension.missing("cpu") is None
    assert [plan.cuda for plan in compiler.plans] == ["9.0+PTX"]


def test_nothing_is_built_in_vain_for_a_gpu(compiler, gpu, monkeypatch):
    monkeypatch.setattr(toolchain, "why_no_cuda", lambda _: "nvcc is of CUDA 12, this torch of 13.0")
    assert "nvcc is of CUDA 12" in extension.missing("cuda")
    assert compiler.plans == []
    assert extension.missing("cpu") is None
    assert extension.missing("cuda") == "it was not built for cuda (nvcc is of CUDA 12, this torch of 13.0)"
    assert extension.missing("mps") == "it was not built for mps"


def test_where_the_cuda_part_does_not_build_the_cpus_does(compiler, gpu, caplog):
    compiler.fails[True] = "its build failed after 1 s: error: cannot find -lcudart"
    assert extension.missing("cpu") is None
    assert [plan.cuda for plan in compiler.plans] == ["9.0+PTX", None]
    assert "cannot find -lcudart" in caplog.text
    assert "cannot find -lcudart" in extension.missing("cuda")


def test_cuda_is_insisted_on(compiler, gpu, monkeypatch):
    monkeypatch.setenv("LWAS_FAST_BUILD", "cuda")
    compiler.fails[True] = "its build failed"
    assert "LWAS_FAST_BUILD=cuda, but its build failed" in extension.missing("cpu")
    assert len(compiler.plans) == 1


def test_no_folder_for_the_cache_is_said(compiler, cache, caplog):
    cache.write_text("a file where the folder should be")
    assert not serves()
    assert "TORCH_EXTENSIONS_DIR names another folder" in caplog.text


def in_thread(plan: first_use.Plan) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(first_use.build(plan)))
    thread.start()
    return thread, found


@pytest.mark.parametrize("fails", [False, True])
def test_others_wait_and_build_nothing(compiler, caplog, fails):
    compiler.fails = {False: "its build failed"} if fails else {}
    plan = first_use.plan()
    plan.library.parent.mkdir(parents=True)
    with first_use._alone(plan.library.parent / "lock"):
        thread, found = in_thread(plan)
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        if fails:
            (plan.library.parent / "failure.txt").write_text("the other's reason")
        else:
            plan.library.write_text("the other's")
    thread.join(10)
    assert found == ["the other's reason" if fails else None]
    assert compiler.plans == []


def test_lock_left_by_an_interrupted_process_holds_nobody_up(compiler):
    plan = first_use.plan()
    plan.library.parent.mkdir(parents=True)
    lock = plan.library.parent / "lock"
    code = "import fcntl, os, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, lock], timeout=60)
    assert lock.exists()
    assert first_use.build(plan) is None


def test_waiting_ends(compiler, monkeypatch):
    plan = first_use.plan()
    plan.library.parent.mkdir(parents=True)
    monkeypatch.setattr(first_use, "LIMIT", 0.3)
    with first_use._alone(plan.library.parent / "lock"):
        thread, found = in_thread(plan)
        thread.join(10)
    assert "another process has been building it" in found[0]


def test_a_build_that_fails_in_earnest_names_the_compilers_error(cache, monkeypatch, tmp_path, caplog):
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "bindings.cpp").write_text("#error nothing to see here\nint f() { return missing; }\n")
    (csrc / "update_cpu.cpp").write_text("")
    monkeypatch.setattr(first_use, "sources", lambda: csrc)
    reason = first_use.build(first_use.plan())
    assert "#error nothing to see here" in reason
    report = Path(reason.partition("all of it: ")[2].rstrip(")"))
    assert "missing" in report.read_text()
    assert [path for path in report.parent.iterdir() if path.is_dir()] == []
    assert "building its compiled update for torch" in caplog.text and "Plain torch serves" in caplog.text
