"""What the package takes from outside, and what it does there: nothing but torch, numpy, and what it is asked for.

Catches: a network call, a file, a folder or a process at import or in training, code in a checkpoint, a dependency that
nobody declared, an action of CI that may change overnight.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trust.resume_cases import KINDS, MODES, Run

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "lwas_fast").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
NEEDED = {"torch", "numpy"}
# Imported where they are asked for alone: a function, a module that nothing of the package imports, a build.
OPTIONAL = {"triton", "lightning", "transformers", "matplotlib", "setuptools"}
NETWORK = {"socket", "ssl", "http", "urllib", "requests", "ftplib", "smtplib", "xmlrpc", "asyncio", "httpx", "aiohttp"}
BUILDS = {"toolchain.py", "first_use.py"}  # of the package; these may start processes, and write into their cache


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Each package that a file imports, and whether that happens when the file is imported itself."""

    def look(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield (child.module or "").partition(".")[0], eager
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from look(child, eager and not inside)

    yield from look(ast.parse(file.read_text(encoding="utf-8")), True)


def test_what_is_imported(tally):
    """At import the standard library, torch and numpy; the rest is optional, and nothing reaches the network."""
    alone = ("integrations", "triton_kernels")  # imported where somebody uses them
    known = set(sys.stdlib_module_names) | NEEDED | {"lwas_fast"}
    with tally("runtime needs torch and numpy, and imports nothing that reaches the network") as row:
        for file in SOURCES:
            for name, eager in imports(file):
                optional = name in OPTIONAL and (not eager or any(part in file.parts for part in alone))
                row.held((name in known or optional) and name not in NETWORK, f"{file.relative_to(ROOT)}: {name}")
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        declared = json.loads(re.search(r"^dependencies = (\[.*\])$", text, re.MULTILINE)[1])
        row.held({re.split(r"[^\w]", one)[0] for one in declared} == NEEDED, f"declared: {declared}")


def test_the_build_downloads_nothing(tally):
    """What setup.py and the build at first use import and run: compilers, named in toolchain.py."""
    files = [ROOT / "setup.py", *(ROOT / "lwas_fast" / "update" / name for name in BUILDS)]
    with tally("no download in a build; nothing else starts processes") as row:
        for file in files:
            text = file.read_text(encoding="utf-8")
            row.held(not {name for name, _ in imports(file)} & NETWORK, f"{file.name} imports what downloads")
            row.held(not re.search(r"https?://|['\"]pip['\"]|\bcurl\b|\bwget\b", code_of(text)), file.name)
        for file in (ROOT / "csrc").iterdir():
            row.held(not re.search(r"socket|curl|\bsystem\(", file.read_text(encoding="utf-8")), file.name)
        for file in SOURCES:
            starts = {"subprocess", "multiprocessing", "pty"} & {name for name, _ in imports(file)}
            row.held(not starts or file.name in BUILDS, f"{file.name} starts processes")


def code_of(text: str) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


# Run after torch has trained the same model, so that what torch itself sets up at first use is over.
WATCHED = """
import copy, gc, json, os, sys
import torch

def train(make):
    for kind in kinds:
        for options in ({}, {"schedule_free": False}, {"hvp": "finite_difference"}, {"foreach": True}):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            opt = make(kind, model, options)
            for step in range(12):
                def closure():
                    opt.zero_grad()
                    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
                    loss.backward()
                    return loss
                if step % 2 or options.get("hvp"):
                    opt.step(closure)
                else:
                    closure()
                    opt.step()
            model.eval()
            model.train()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            copy.deepcopy((model, opt))

kinds = ["AdamW"]
train(lambda kind, model, options: torch.optim.AdamW(model.parameters()))
seen, before = [], set(sys.modules)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PREFIXES = ("socket.", "subprocess.", "shutil.", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link",
            "os.symlink", "os.truncate", "os.chmod", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork",
            "urllib.", "http.", "ftplib.", "smtplib.", "tempfile.", "pickle.find_class")

def hook(event, args):
    writes = event == "open" and (args[2] or 0) & WRITING
    if writes or event.startswith(PREFIXES):
        seen.append(f"{event} {args!r}"[:300])
        if event.startswith("socket."):
            raise OSError("the network is off")

sys.addaudithook(hook)
import lwas_fast
kinds = ["AdamWLW", "SGDLW"]
train(lambda kind, model, options: getattr(lwas_fast, kind)(model, **options))
found, new = list(seen), {name.partition(".")[0] for name in set(sys.modules) - before}
open(sys.argv[1], "w").write(json.dumps({"seen": found, "works": len(seen) > len(found), "new": sorted(new)}))
"""


def test_nothing_happens_outside(tally, tmp_path):
    """No socket, file, folder or process at import and in training; where a build is refused, none is tried."""
    (tmp_path / "away").mkdir()
    env = os.environ | {"LWAS_FAST_BUILD": "none", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path / "home")}
    env |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", WATCHED.replace("sys.argv[1]", repr(str(tmp_path / "found")))]
    done = subprocess.run(command, cwd=tmp_path / "away", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    with tally("at import and in training: no network, no file, no process") as row:
        row.held(found["works"] and not found["seen"], "\n".join(found["seen"]))
        left = sorted(path.name for path in tmp_path.rglob("*") if path.name not in ("away", "found"))
        row.held(not left, left)
        row.held("lwas_fast" in found["new"] and not set(found["new"]) & OPTIONAL - {"triton"}, found["new"])


def plain(value: object) -> bool:
    """Whether a value is data alone."""
    if isinstance(value, dict):
        return all(plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_checkpoints_are_data(tally):
    """Nothing in a state is of a class of ours, or of anybody's; and nothing of ours reads pickled files."""
    with tally("checkpoints hold data alone, and nothing reads code from a file") as row:
        for kind, free, follows in itertools.product(KINDS, MODES, (True, False)):
            run = Run(kind, torch.bfloat16, follows, {"schedule_free": free})
            run.train(0, 4)
            row.held(plain(run.opt.state_dict()), (kind, free, follows))
        for file in SOURCES:
            code = code_of(file.read_text(encoding="utf-8"))
            row.held(not re.search(r"\b(torch|pickle|marshal|joblib)\.load|\beval\(['\"]|\bexec\(", code), file.name)


def test_ci_is_pinned(tally):
    """Actions by commit, with the release beside it; linters by release."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not files:
        pytest.skip("no workflows here")
    with tally("actions of CI are pinned by commit, linters by release") as row:
        for file in files:
            for used in re.findall(r"uses: *(.+)", file.read_text(encoding="utf-8")):
                row.held(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), f"{file.name}: {used}")
        lint = re.search(r"^lint = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
        for one in json.loads(lint):
            row.held("==" in one, one)
