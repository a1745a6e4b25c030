"""Tests of several processes: each scenario runs in all of them, once for all of its tests."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch


def _run(rank: int, world: int, module: str, folder: str) -> None:
    """Run a module's `SCENARIOS` in one process group, up to the first that fails: what comes after would wait."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for name, scenario in importlib.import_module(module).SCENARIOS.items():
        torch.manual_seed(0)
        try:
            torch.save(scenario(rank), f"{folder}/{name} {rank}")
        except Exception:
            Path(folder, f"failed {rank}").write_text(f"{name}: {traceback.format_exc()}")
            os._exit(0)
    torch.distributed.barrier()
    os._exit(0)  # threads of gloo's may abort a process that ends as usual: 2 of 20, with torch's AdamW


def results_of(module: str, folder: Path, world: int = 2) -> Callable[[str], list[Any]]:
    """What each process returned of a scenario; all are started once, which takes seconds."""
    torch.multiprocessing.spawn(_run, (world, module, str(folder)), nprocs=world)

    def results(name: str) -> list[Any]:
        failed = "".join(path.read_text() for path in sorted(folder.glob("failed *")))
        assert not failed, failed
        return [torch.load(folder / f"{name} {rank}") for rank in range(world)]

    return results
