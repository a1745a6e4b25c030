"""Longer runs of two processes.

Catches: anything of FSDP2's that a step keeps (a DTensor's layout, say); a loss curve that leaves that of one process;
a rank that dies and is waited for, or a run that cannot go on from its last checkpoint.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZERS, batches, small_net, train
from processes import results_of
from shard_cases import sharded, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

pytestmark = pytest.mark.slow
STEPS, LEAK = 300, 2000


def curve(rank):
    model = sharded(torch.float32)
    data = [(x[rank::2], y[rank::2]) for x, y in batches(STEPS, torch.float32)]
    return torch.tensor(train(OPTIMIZERS["adamw"](model), model, data, "followed"))


def leak(rank):
    """What is alive, and the process's largest size, half way and at the end."""
    model = sharded(torch.float32)
    opt = OPTIMIZERS["adamw"](model, update_every=10)
    found = []
    for _ in range(2):
        train(opt, model, batches(10, torch.float32) * (LEAK // 20), "followed")
        gc.collect()
        found.append((len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return found


SCENARIOS = {"curve": curve, "leak": leak}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    return results_of("test_long", tmp_path_factory.mktemp("long"))


def test_the_loss_curve_is_that_of_one_process(of_both):
    one, two = of_both("curve")
    model = small_net(torch.float32)
    opt = OPTIMIZERS["adamw"](model)
    opt._now.following.replays = True
    alone = torch.tensor(train(opt, model, batches(STEPS, torch.float32), "followed"))
    torch.testing.assert_close((one + two) / 2, alone, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_over_2000_steps(of_both):
    for (objects, size), (later, largest) in of_both("leak"):
        assert later < objects + 300
        assert largest < size + 4096  # KiB


def run(folder: str, dies: bool) -> None:
    """What torchrun starts: it saves at step 4 and goes on from there; a rank may die at step 6 if it did not."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, data = torch.distributed.get_rank(), batches(12, torch.float32)
    model = sharded(torch.float32)
    opt = OPTIMIZERS["adamw"](model, update_every=3)
    start, at = 0, Path(folder, "checkpoint")
    if at.exists():
        of_model, of_opt = get_state_dict(model, opt)
        dcp.load({"model": of_model, "opt": of_opt}, checkpoint_id=at)
        set_state_dict(model, opt, model_state_dict=of_model, optim_state_dict=of_opt)
        start = 4
    for k in range(start, 12):
        if k == 4:
            of_model, of_opt = get_state_dict(model, opt)
            dcp.save({"model": of_model, "opt": of_opt}, checkpoint_id=at)
        if dies and k == 6 and start == 0 and rank == 1:
            os._exit(1)
        train(opt, model, [(data[k][0][rank::2], data[k][1][rank::2])], "followed")
    weights = [whole(p).clone() for p in model.parameters()]
    if rank == 0:
        torch.save((start, weights), Path(folder, "end"))
    torch.distributed.barrier()
    os._exit(0)


def start(folder: Path, dies: bool) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder), str(int(dies))], env=environment, timeout=100, capture_output=True)
    return done.returncode


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    assert start(unbroken, dies=False) == 0
    assert start(broken, dies=True) != 0 and not (broken / "end").exists()
    assert start(broken, dies=True) == 0
    (whole_run, weights), (resumed, again) = (torch.load(folder / "end") for folder in (unbroken, broken))
    assert (whole_run, resumed) == (0, 4)
    torch.testing.assert_close(again, weights, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    run(sys.argv[1], bool(int(sys.argv[2])))
