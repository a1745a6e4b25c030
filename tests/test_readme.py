"""Runs the README's own Python, in order, in one namespace. Catches: an example that does not work as printed."""

from __future__ import annotations

import math
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_code_runs_and_trains():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    space: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), space)
    assert space["loss"].item() < 0.5 * math.log(2)
    assert list(space["opt"].rates()) == ["0", "2"]


def test_pictures_exist():
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).stat().st_size > 10_000
