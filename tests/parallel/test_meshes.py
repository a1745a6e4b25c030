"""Four processes: FSDP2 with empty shards, HSDP, tensor parallelism, and both.

Catches: a mesh over which sums are added up twice or not at all; ranks that disagree by a bit.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, train
from processes import results_of
from shard_cases import shard, sharded, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WAYS = ("closure", "followed")
TENSORS = {"0": ColwiseParallel(), "2": RowwiseParallel()}  # the last layer stays an ordinary one
MESHES = {
    "fsdp": ((4,), ("data",)),
    "hsdp": ((2, 2), ("copies", "shards")),
    "tensor": ((4,), ("tensor",)),
    "fsdp and tensor": ((2, 2), ("data", "tensor")),
}
STEPS = 8


def net(name):
    if "tensor" not in name:
        return small_net()
    torch.manual_seed(0)  # a width that can be halved twice, which torch asks for
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def spread(name):
    """The net on a mesh; and of how many ranks with other data, this is which."""
    mesh = init_device_mesh("cpu", MESHES[name][0], mesh_dim_names=MESHES[name][1])
    model, rank = net(name), torch.distributed.get_rank()
    if name == "tensor":
        return parallelize_module(model, mesh, TENSORS), 0, 1
    if name == "fsdp and tensor":
        parallelize_module(model, mesh["tensor"], TENSORS)
        return shard(model, mesh=mesh["data"]), rank // 2, 2
    return shard(model, mesh=mesh), rank, 4


def made(kind, way, model):
    options = {"update_every": 3, "weight_decay": 0.1, "weight_decay_on": "matrices", "seed": 3}
    return OPTIMIZERS[kind](model.named_parameters() if way == "closure" else model, **options)


def scenario(name, kind, way, rank):
    model, number, count = spread(name)
    opt = made(kind, way, model)
    train(opt, model, [(x[number::count], y[number::count]) for x, y in batches(STEPS)], way)
    state = opt.state_dict()["state"]
    return {
        "weights": [whole(p) for p in model.parameters()],
        "rates": opt.rates(),
        "layers": torch.stack([of_param["layer"] for of_param in state.values()]),
        "states": [{n: whole(v) for n, v in of_param.items() if n != "layer"} for of_param in state.values()],
        "by": opt.measured_by,
    }


def long(rank):
    model = sharded(torch.float32)
    opt = OPTIMIZERS["adamw"](model)
    rates = []
    for x, y in batches(200, torch.float32):
        loss_of(model, (x[rank::4], y[rank::4])).backward()
        opt.step()
        opt.zero_grad()
        rates.append(list(opt.rates().values()))
    return torch.tensor(rates, dtype=torch.float64)


def held_back(rank):
    """Gradients of the first of two micro-batches that are not reduced over the copies yet; and without us."""
    found = []
    for ours in (True, False):
        model, _, _ = spread("hsdp")
        opt = OPTIMIZERS["adamw"](model, update_every=1) if ours else None
        for k, (x, y) in enumerate(batches(2)):
            model.set_requires_all_reduce(k == 1)
            (loss_of(model, (x[rank::4], y[rank::4])) / 2).backward()
        found.append([whole(p.grad) for p in model.parameters()])
        if opt is not None:
            opt.step()
            found.append(opt.diagnostics())
    return found


CASES = [(name, kind, way) for name in MESHES for kind in OPTIMIZERS for way in WAYS]
SCENARIOS = {f"{name}, {kind}, {way}": partial(scenario, name, kind, way) for name, kind, way in CASES} | {
    "long": long,
    "held back": held_back,
}


@pytest.fixture(scope="module")
def of_all(tmp_path_factory):
    return results_of("test_meshes", tmp_path_factory.mktemp("meshes"), world=4)


@pytest.mark.parametrize(("name", "kind", "way"), CASES)
def test_a_mesh_takes_the_steps_of_one_process(of_all, name, kind, way):
    found = of_all(f"{name}, {kind}, {way}")
    for other in found[1:]:
        assert other["rates"] == found[0]["rates"]
        assert torch.equal(other["layers"], found[0]["layers"])
        torch.testing.assert_close(other["weights"], found[0]["weights"], rtol=0, atol=0)
    model = net(name)
    opt = made(kind, way, model)
    if way == "followed":
        assert found[0]["by"] == "replay"
        opt._now.following.replays = True
    train(opt, model, batches(STEPS), way)
    torch.testing.assert_close(found[0]["weights"], [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-7)
    for layer, rate in opt.rates().items():
        assert found[0]["rates"][layer] == pytest.approx(rate, rel=1e-3)
    for mine, theirs in zip(found[0]["states"], opt.state_dict()["state"].values(), strict=True):
        for key, value in mine.items():
            if key == "trained":  # of an ordinary tensor in a distributed run
                continue
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-7)


def test_gradients_that_are_not_reduced_over_copies_yet_are_left_alone(of_all):
    for ours, found, theirs in of_all("held back"):
        torch.testing.assert_close(ours, theirs)
        assert all(row["refreshes"] == 1 for row in found.values())


def test_ranks_agree_to_the_bit_over_200_steps(of_all):
    first, *others = of_all("long")
    assert all(torch.equal(first, other) for other in others)
