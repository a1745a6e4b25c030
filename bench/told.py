"""What a benchmark's JSON tells: pytest-benchmark's own part, and what the tests here have added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OURS = {"Muon": "MuonLW", "AdamW": "AdamWLW", "SGD-m": "SGDLW"}  # in place of torch's


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole of it, and its benchmarks that have a ratio."""
    content = json.loads(path.read_text())
    return content, [b for b in content["benchmarks"] if "ratio" in b["extra_info"]]


def where(content: dict[str, Any]) -> str:
    """What was measured on."""
    machine = content["machine_info"]
    return f"{machine['lwas_fast']['device']}, {machine['cores']} cores, torch {machine['lwas_fast']['torch']}"


def name_of(case: str, routes: dict[str, str]) -> str:
    """A case by our names: `AdamW, autograd` is AdamWLW by that route."""
    rule, _, rest = case.partition(", ")
    return ", ".join(filter(None, (OURS.get(rule, rule), routes.get(rest, rest.replace(", against fused", "")))))


def setting_of(info: dict[str, Any]) -> str:
    """What a case's name leaves open: threads, and whose time it is."""
    threads = info.get("threads")
    text = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    return text + {"launch": ", CPU time", "device": ", GPU time"}.get(info.get("measure", ""), "")
