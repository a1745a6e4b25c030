"""Checkpoints of a distributed run: saved by two processes, loaded by two, by four and by one.

Catches: a state that cannot be saved or loaded by torch.distributed.checkpoint; a run that goes on otherwise than it
would have.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZERS, batches, small_net, train
from processes import results_of
from shard_cases import sharded, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

KINDS = ("fsdp", "ddp", "whole", "flat", "torch.save", "momentum", "told")
DATA = batches(12, torch.float32)
FOLDER = "LWAS_TEST_CHECKPOINTS"  # in the environment of the processes
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def make(kind):
    torch.manual_seed(3)
    if kind in ("ddp", "torch.save"):
        model = DistributedDataParallel(small_net(torch.float32))
    else:
        model = sharded(torch.float32)
    options = {"update_every": 3, "weight_decay_on": "matrices", "schedule_free": kind != "momentum"}
    opt = OPTIMIZERS["adamw"](model.named_parameters() if kind == "told" else model, **options)
    return model, opt


def go_on(kind, model, opt, data):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = [(x[rank::world], y[rank::world]) for x, y in data]
    train(opt, model, own, "closure" if kind == "told" else "followed")


def weights(model):
    return [whole(p).clone() for p in model.parameters()]


def save(kind, model, opt, folder):
    options = {"whole": FULL, "flat": FLAT}.get(kind)
    if kind == "told":
        opt.eval()
    if kind == "torch.save":
        if torch.distributed.get_rank() == 0:
            torch.save((model.state_dict(), opt.state_dict()), folder / "all.pt")
        torch.distributed.barrier()
    else:
        of_model, of_opt = get_state_dict(model, opt, options=options)
        if kind == "whole" and torch.distributed.get_rank() == 0:
            torch.save((of_model, of_opt), folder / "all.pt")
        elif kind != "whole":
            dcp.save({"model": of_model, "opt": of_opt}, checkpoint_id=folder)
    if kind == "told":
        opt.train()


def load(kind, model, opt, folder):
    options = {"whole": FULL, "flat": FLAT}.get(kind)
    if kind == "torch.save":
        of_model, of_opt = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(of_model)
        opt.load_state_dict(of_opt)
        return
    if kind == "whole":
        of_model, of_opt = torch.load(folder / "all.pt", weights_only=True)
    else:
        of_model, of_opt = get_state_dict(model, opt, options=options)
        state = {"model": of_model, "opt": of_opt}
        dcp.load(state, checkpoint_id=folder)
        of_model, of_opt = state["model"], state["opt"]
    set_state_dict(model, opt, model_state_dict=of_model, optim_state_dict=of_opt, options=options)
    if kind == "told":
        opt.train()


def saving(kind):
    def scenario(rank):
        folder = Path(os.environ[FOLDER]) / kind
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        model, opt = make(kind)
        go_on(kind, model, opt, DATA[:7])
        save(kind, model, opt, folder)
        go_on(kind, model, opt, DATA[7:])
        return weights(model), opt.rates()

    return scenario


def loading(kind):
    def scenario(rank):
        model, opt = make(kind)
        go_on(kind, model, opt, DATA[9:])  # somewhere else
        load(kind, model, opt, Path(os.environ[FOLDER]) / kind)
        go_on(kind, model, opt, DATA[7:])
        return weights(model), opt.rates()

    return scenario


def misfits(rank):
    """A whole state of another run, into sharded parameters, and the way out."""
    model, opt = make("fsdp")
    of_model, of_opt = torch.load(Path(os.environ[FOLDER]) / "one.pt", weights_only=True)
    with pytest.raises(ValueError, match="is whole, and the parameter is sharded.*set_optimizer_state_dict"):
        opt.load_state_dict(of_opt)
    names = [name for name, _ in model.named_parameters()]
    named = {"state": {names[k]: v for k, v in of_opt["state"].items()}, "param_groups": of_opt["param_groups"]}
    named["param_groups"][0]["params"] = names
    set_model_state_dict(model, of_model, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(model, opt, named, options=StateDictOptions(full_state_dict=True))
    go_on("fsdp", model, opt, DATA[7:])
    return weights(model), opt.rates()


def rollback(rank):
    """A state that is loaded into the model that it was taken of, which goes on."""
    model, opt = make("ddp")
    go_on("ddp", model, opt, DATA[:5])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    go_on("ddp", model, opt, DATA[5:])
    found = [weights(model)]
    for mode in (False, True):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            model(DATA[0][0])
    return [*found, weights(model)]


if os.environ.get(FOLDER + "_WRITE"):
    SCENARIOS = {kind: saving(kind) for kind in KINDS}
else:
    SCENARIOS = {kind: loading(kind) for kind in KINDS} | {"misfits": misfits, "rollback": rollback}


def alone():
    """A run of one process, saved by torch.save; where it ends."""
    torch.manual_seed(3)
    model = small_net(torch.float32)
    opt = OPTIMIZERS["adamw"](model, update_every=3)
    opt._now.following.replays = True
    train(opt, model, DATA[:7], "followed")
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(opt, model, DATA[7:], "followed")
    return saved, ([p.detach() for p in model.parameters()], opt.rates())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        patch.setenv(FOLDER + "_WRITE", "1")
        states, end = alone()
        torch.save(states, folder / "one.pt")
        results = results_of("test_checkpoints", tmp_path_factory.mktemp("saved"))
    return folder, results, end


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def loaded(request, saved, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(saved[0]))
        return request.param, results_of("test_checkpoints", tmp_path_factory.mktemp("loaded"), request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_on_any_number_of_processes(saved, loaded, kind):
    world, results = loaded
    (weights, rates), *_ = saved[1](kind)
    exact = world == 2 and kind in ("ddp", "torch.save", "momentum")
    for mine, own in results(kind):
        torch.testing.assert_close(mine, weights, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
        for layer, rate in own.items():
            assert rate == pytest.approx(rates[layer], rel=0 if exact else 2e-2)


def test_a_state_in_the_model_that_it_is_of(loaded):
    for before, after in loaded[1]("rollback"):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_sharded_state_goes_on_in_one_process(saved):
    (ends, rates), *_ = saved[1]("whole")
    of_model, of_opt = torch.load(saved[0] / "whole" / "all.pt", weights_only=True)
    model: torch.nn.Module = small_net(torch.float32)
    opt = OPTIMIZERS["adamw"](model, update_every=3)
    opt._now.following.replays = True
    set_state_dict(model, opt, model_state_dict=of_model, optim_state_dict=of_opt)
    train(opt, model, DATA[7:], "followed")
    torch.testing.assert_close([p.detach() for p in model.parameters()], ends, rtol=1e-4, atol=1e-6)
    assert opt.rates().keys() == rates.keys()


def test_a_state_of_one_process_goes_on_sharded(saved, loaded):
    _, results = loaded
    _, _, (weights, rates) = saved
    for mine, own in results("misfits"):
        torch.testing.assert_close(mine, weights, rtol=1e-4, atol=1e-6)
        assert own.keys() == rates.keys()
