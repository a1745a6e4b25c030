"""Compiled modules and distributed runs, which have no autograd route.

Catches: a message that does not name the way out; the way out not working; replicas that drift apart.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from cases import batches, loss_of, small_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lwas_fast import AdamWLW, CurvatureError


def usual(opt, model, batch):
    def closure():
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def test_compiled_module():
    model, batch = small_net(torch.float32), batches(1, torch.float32)[0]
    compiled = torch.compile(model, backend="aot_eager")
    opt = AdamWLW(model.named_parameters(), update_every=1)
    with pytest.raises(CurvatureError, match="torch.compile.*_orig_mod.*finite_difference"):
        opt.backward(loss_of(compiled, batch))
    assert all(p.grad is None for p in model.parameters())
    plain = copy.deepcopy(model)
    other = AdamWLW(plain.named_parameters(), update_every=1)
    for _ in range(3):
        opt.step(usual(opt, compiled, batch))
        other.step(usual(other, plain, batch))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def train_with(how, opt, model, batch):
    """One step: PyTorch's closure; autograd; or autograd on the second half after accumulating the first."""
    if how == "closure":
        opt.step(usual(opt, model, batch))
        return
    x, y = batch
    parts = [(x[0::2], y[0::2]), (x[1::2], y[1::2])] if how == "accumulated" else [batch]
    opt.zero_grad()
    for part in parts:
        last = part is parts[-1]
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            opt.backward(loss_of(model, part) / len(parts), last=last)
    opt.step()


def _replica(rank: int, store: str, result: str, how: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_net()
    parallel = DistributedDataParallel(model)
    opt = AdamWLW(model.named_parameters(), update_every=2)
    for x, y in batches(6):
        half = slice(8 * rank, 8 * rank + 8)
        train_with(how, opt, parallel, (x[half], y[half]))
    torch.save((model.state_dict(), opt.rates()), f"{result}{rank}")
    if how == "autograd":
        opt.zero_grad()
        model[0].weight.register_hook(lambda grad: 2 * grad)
        try:
            opt.backward(loss_of(parallel, (x[half], y[half])))
        except CurvatureError as error:
            assert "opt.step(closure)" in str(error)
        else:
            raise AssertionError("backward must refuse a hook that would run twice")
        assert all(p.grad is None for p in model.parameters())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["closure", "autograd"])
def test_two_replicas_equal_one_process_on_the_joint_batch(tmp_path, how):
    torch.multiprocessing.spawn(_replica, (str(tmp_path / "store"), str(tmp_path / "result"), how), nprocs=2)
    (one, rates), (two, same) = (torch.load(tmp_path / f"result{rank}") for rank in (0, 1))
    assert rates == same
    model: nn.Module = small_net()
    opt = AdamWLW(model.named_parameters(), update_every=2)
    for batch in batches(6):
        train_with(how, opt, model, batch)
    for name, value in model.state_dict().items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-8)


def test_replicas_that_accumulate_stay_alike(tmp_path):
    """Their probe goes along the whole window's gradient, not, as in one process, along its last part's."""
    store, result = str(tmp_path / "store"), str(tmp_path / "result")
    torch.multiprocessing.spawn(_replica, (store, result, "accumulated"), nprocs=2)
    (one, rates), (two, same) = (torch.load(tmp_path / f"result{rank}") for rank in (0, 1))
    assert rates == same and all(rate > 0 for rate in rates.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
