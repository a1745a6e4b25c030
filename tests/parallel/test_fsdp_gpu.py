"""FSDP2 on one GPU: the message between the two parts of a compiled step, over NCCL.

Catches: a stream that does not wait for the other's sums; a step in two parts that is not the step in one.
"""

from __future__ import annotations

import tempfile
from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from shard_cases import shard
from torch.distributed.fsdp import MixedPrecisionPolicy

pytestmark = pytest.mark.gpu


def trained(kind: str, spread: bool, **policy: torch.dtype) -> tuple[list[torch.Tensor], dict[str, float]]:
    model = small_net(torch.float32).cuda()
    if spread:
        shard(model, mp_policy=MixedPrecisionPolicy(**policy))
    opt = OPTIMIZERS[kind](model, update_every=3)
    opt._now.following.replays = True
    for x, y in batches(20, torch.float32):
        loss_of(model, (x.cuda(), y.cuda())).backward()
        opt.step()
        opt.zero_grad()
    assert opt.measured_by == "replay"
    weights = [(p.full_tensor() if spread else p).detach().cpu() for p in model.parameters()]
    return weights, opt.rates()


def in_a_group(kind: str, policy: dict[str, torch.dtype], out: str, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=1)
        torch.save((trained(kind, True, **policy), trained(kind, False)), out)
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("policy", [{}, {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}])
def test_one_rank_takes_the_steps_of_an_ordinary_model(kind, policy, tmp_path):
    torch.multiprocessing.spawn(_start, (partial(in_a_group, kind, policy, str(tmp_path / "found")),), nprocs=1)
    (weights, rates), (alone, same) = torch.load(tmp_path / "found")
    assert all(w.isfinite().all() for w in weights)
    if not policy:
        torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-5)
        assert rates.keys() == same.keys()


def _start(rank: int, run) -> None:
    run(rank)
