"""Trains in a process of its own, for runs that end there: ``python resume_process.py case.json``.

It loads a checkpoint where there is one, trains, and after each step writes one beside and puts it in place whole, as a
user's script does; whoever started it may kill it at any time.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from trust.resume_cases import Run, resume, save


def main(case: Path) -> None:
    """Train on from where the checkpoint stands; the step is a part of it."""
    given = json.loads(case.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    run = Run(given["kind"], getattr(torch, given["dtype"]), given["follows"], given["options"])
    file, start = case.with_suffix(".pt"), 0
    if file.exists():
        resume(run, file.read_bytes(), given["model_first"])
        start = run.opt.param_groups[0]["steps"]
    for k in range(start, given["steps"]):
        run.train(k, k + 1)
        if (k + 1) % given["every"] == 0 or k + 1 == given["steps"]:
            unfinished = case.with_suffix(".unfinished")
            unfinished.write_bytes(save(run, given["how"]))
            os.replace(unfinished, file)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))
