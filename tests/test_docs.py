"""README and docs/: their code is run, their links and commands exist, their messages are those of the package.

Catches: an example that does not work as printed; a picture, page, target or module that is gone; an error message
without its heading in docs/troubleshooting.md, or a heading whose message is gone.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md")), *ROOT.glob("CONTRIBUTING.md")]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
BLOCK = re.compile(r"(?P<mark><!-- not run: .+ -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, kind: str) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text(encoding="utf-8")) if block["kind"] == kind]


@pages
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks(page, "python"):
        line = block.string.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")
        if not block["mark"]:
            exec(code, space)
    if page.name in ("README.md", "index.md"):  # they show a whole training run
        assert space["loss"].item() < 0.5 * math.log(2)


def test_quick_start_is_short():
    (block,) = blocks(README, "python")
    assert block["code"].count("\n") <= 12
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


@pages
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = "\n".join([*(block["code"] for block in blocks(page, "sh")), *re.findall(r"`([^`\n]+)`", text)])
    for target in re.findall(r"^make ([\w-]+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for module in re.findall(r"python -m ([\w.]+)", commands):
        assert (ROOT / module.replace(".", "/")).exists() or importlib.util.find_spec(module), module
    folders = "bench|csrc|docs|examples|lwas_fast|tests|triton_kernels"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+", commands):
        if not path.startswith("bench/results/"):  # where commands write what is not committed
            assert (ROOT / path).exists(), path


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), target
        if anchor and found.suffix == ".md" and not anchor.startswith("lwas_fast."):
            assert anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower().replace("…", "")) for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading.strip()) for heading in plain}


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"images/([\w.-]+)\)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in (DOCS / "images").iterdir()} == shown


def messages() -> set[str]:
    """What the package raises, warns of and logs, one string each, variable parts as '...'."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return "..."

    found = set()
    for file in (ROOT / "lwas_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if name.endswith(("Error", "warn", "log.warning")) and (words := text(call.args[0])).strip("."):
                found.add(re.sub(r"%(s|\.0f)", "...", words))
    return found


def test_troubleshooting_has_every_message():
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    known = messages()
    parts = {heading: heading.split("...") for heading in headings}

    def fits(heading: str, message: str) -> bool:
        return all(part.strip() in message for part in parts[heading])

    missing = [message for message in known if not any(fits(heading, message) for heading in headings)]
    assert not missing, "\n".join(["without a heading:", *missing])
    gone = [heading for heading in headings if not any(fits(heading, message) for message in known)]
    assert not gone, "\n".join(["raised nowhere:", *gone])
