"""What a benchmark's JSON says: of the machine the device and versions, and not its name; no round by itself."""

from __future__ import annotations

import os

import pytest
import torch

from lwas_fast.installed import describe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add what matters to us and drop what tells of the owner."""
    for key in ("node", "release"):
        machine_info.pop(key, None)
    machine_info["lwas_fast"] = dict(describe())
    machine_info["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Drop each round's time: the medians stay, and the committed files small."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


@pytest.fixture
def device() -> str:
    """The GPU where there is one."""
    return DEVICE
