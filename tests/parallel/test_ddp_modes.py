"""DistributedDataParallel in every mode, with a plain ``loss.backward(); opt.step()``.

Catches: a mode in which nothing is measured or replicas drift apart; a replica that waits for another that failed;
messages to processes that train something else.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import batches, loss_of, small_net, usual
from processes import results_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lwas_fast import AdamWLW
from lwas_fast.measure import replay, routes

# DDP's options, and by what it comes to be measured.
MODES = {
    "plain": ({}, "loss.backward"),
    "static graph": ({"static_graph": True}, "replay"),
    "unused": ({"find_unused_parameters": True}, "loss.backward"),
    "bucket views": ({"gradient_as_bucket_view": True}, "loss.backward"),
    "hook": ({}, "replay"),
    "accumulated": ({}, "loss.backward"),
    "hook, accumulated, bucket views": ({"gradient_as_bucket_view": True}, "replay"),
    "uneven": ({}, "loss.backward"),
    "compressed": ({}, "loss.backward"),
}
STEPS = 8


def train(opt, model, data, rank=None, accumulates=False, skip=2):
    """The halves of a batch: of one rank its own, of one process both."""
    for x, y in data:
        opt.zero_grad()
        parts = [(x[k::2], y[k::2]) for k in range(2)] if accumulates else [(x, y)]
        for k, (a, b) in enumerate(parts):
            held_back = rank is not None and accumulates and k == 0
            mine = (a[rank::2], b[rank::2]) if rank is not None else (a, b)
            with model.no_sync() if held_back else nullcontext():
                (loss_of(model, mine) / len(parts)).backward()
        opt.step()


def unlike(x, y, rank):
    """A batch of which the second rank has a quarter only."""
    return (x[:12], y[:12]) if rank == 0 else (x[12:], y[12:])


def mode(name, made_with, rank):
    model = small_net()
    if "hook" in name:
        model[2].weight.register_hook(lambda grad: grad * 1.0)
    opt = AdamWLW(model, update_every=2) if made_with == "model" else None
    parallel = DistributedDataParallel(model, **MODES[name][0])
    if name == "compressed":
        parallel.register_comm_hook(None, fp16_compress_hook)
    opt = opt or AdamWLW(parallel, update_every=2)
    if name == "uneven":
        for x, y in batches(STEPS):
            opt.zero_grad()
            loss_of(parallel, unlike(x, y, rank)).backward()
            opt.step()
    else:
        train(opt, parallel, batches(STEPS), rank, "accumulated" in name)
    return [p.detach() for p in model.parameters()], opt.rates(), opt.measured_by, opt.diagnostics()


class Branches(nn.Module):
    """Two branches, of which each replica may take its own, and a layer that nobody uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.idle = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
        self.branches = nn.ModuleList(nn.Linear(4, 2).double() for _ in range(2))

    def forward(self, x, which=0):
        return self.branches[which](torch.tanh(self.body(x)))


def branches(rank):
    model = Branches()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    opt = AdamWLW(parallel, update_every=1)
    for x, y in batches(6):
        opt.zero_grad()
        nn.functional.cross_entropy(parallel(x[rank::2], rank), y[rank::2]).backward()
        opt.step()
    return [p.detach() for p in model.parameters()], opt.diagnostics()


def bad_batch(rank):
    """A rank whose loss is NaN in a step that measures."""
    model = small_net()
    opt = AdamWLW(model, update_every=2)
    parallel = DistributedDataParallel(model)
    rates = []
    for k, (x, y) in enumerate(batches(6)):
        opt.zero_grad()
        loss_of(parallel, (x * (torch.nan if k == 2 and rank == 1 else 1.0), y)).backward()
        opt.step()
        rates.append(opt.rates())
    return rates, opt.diagnostics(), [p.detach() for p in model.parameters()]


def fails(who, how, rank):
    """One rank's, or all ranks', measurement fails in the third step."""
    model = small_net()
    options = {"static_graph": True} if how == "replay" else {}
    parallel = DistributedDataParallel(model, **options)
    opt = AdamWLW(parallel, update_every=1)
    rates, said = [], []
    # By autograd in the middle of it, by a second call before that.
    of, name = (routes, "by_autograd") if how == "autograd" else (replay.Call, "check")
    works = getattr(of, name)
    for k, (x, y) in enumerate(batches(6)):
        opt.zero_grad()

        def measure(*arguments, k=k):
            if k == 2 and rank in who:
                raise torch.OutOfMemoryError("no more")
            return works(*arguments)

        setattr(of, name, measure)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_of(parallel, (x[rank::2], y[rank::2])).backward()
            opt.step()
        said += [str(one.message) for one in caught if "could not measure" in str(one.message)]
        rates.append(opt.rates())
    setattr(of, name, works)
    return rates, said, [p.detach() for p in model.parameters()], opt.measured_by


def fails_once_in_a_window(rank):
    """One rank's measurement of the first of two micro-batches fails; the second is measured by both, or by none."""
    model = small_net()
    opt = AdamWLW(model, update_every=5)
    parallel, works, calls = DistributedDataParallel(model), routes.by_autograd, []

    def measure(*arguments):
        calls.append(1)
        if rank == 0 and len(calls) == 1:
            raise torch.OutOfMemoryError("no more")
        return works(*arguments)

    routes.by_autograd = measure
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x, y in batches(3):
                opt.zero_grad()
                for half in (slice(0, 8), slice(8, 16)):
                    loss_of(parallel, (x[half], y[half])).backward()
                opt.step()
    finally:
        routes.by_autograd = works
    return opt.rates(), [p.detach() for p in model.parameters()]


def own_groups(rank):
    """Each process trains a model of its own, and only one of them takes more steps."""
    groups = [torch.distributed.new_group([k]) for k in range(2)]
    found = []
    for how in ("backward", "closure"):
        model = small_net(seed=rank)
        opt = AdamWLW(model, update_every=2, hvp="autograd" if how == "backward" else "finite_difference")
        parallel = DistributedDataParallel(model, process_group=groups[rank])
        for batch in batches(4 + 2 * rank):
            opt.zero_grad()
            if how == "backward":
                loss_of(parallel, batch).backward()
                opt.step()
            else:

                def closure(batch=batch, parallel=parallel, opt=opt):
                    opt.zero_grad()
                    loss = loss_of(parallel, batch)
                    loss.backward()
                    return loss

                opt.step(closure)
        found.append(([p.detach() for p in model.parameters()], opt.measured_by))
    return found


def apart(rank):
    """One process trains a model of its own, which nothing averages, while the other does something else."""
    if rank == 1:
        return []
    model = small_net()
    opt = AdamWLW(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(4):
            opt.zero_grad()
            loss_of(model, batch).backward()
            opt.step()
    return [str(one.message) for one in caught]


def joined(rank):
    """Ranks with unlike numbers of batches, in DDP's own context for that."""
    model = small_net()
    opt = AdamWLW(model)
    parallel = DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as caught, parallel.join():
        warnings.simplefilter("always")
        for batch in batches(2 + rank):
            opt.zero_grad()
            loss_of(parallel, batch).backward()
            opt.step()
    return [str(one.message) for one in caught], [p.detach() for p in model.parameters()]


MADE_WITH = ("model", "wrapper")
MADE = [(name, made) for name in MODES for made in MADE_WITH]
SCENARIOS = {f"{name}, {made}": partial(mode, name, made) for name, made in MADE}
SCENARIOS |= {"branches": branches, "bad batch": bad_batch, "own groups": own_groups, "joined": joined, "apart": apart}
FAILS = [(who, how) for who in ((0,), (1,), (0, 1)) for how in ("autograd", "replay")]
SCENARIOS |= {"fails once in a window": fails_once_in_a_window}
SCENARIOS |= {f"fails {who} {how}": partial(fails, who, how) for who, how in FAILS}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    return results_of("test_ddp_modes", tmp_path_factory.mktemp("modes"))


@pytest.mark.parametrize(("name", "made"), MADE)
def test_each_mode_measures_and_equals_one_process(of_both, name, made):
    (one, rates, by, _), (two, same, _, _) = of_both(f"{name}, {made}")
    assert rates == same
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert by == MODES[name][1]
    if name in ("uneven", "compressed"):
        return
    model = small_net()
    opt = AdamWLW(model, update_every=2, weight_decay_on="matrices")
    data = batches(STEPS)
    replays = MODES[name][1] == "replay"
    opt._now.following.replays = replays
    if "hook" in name or (made == "model" and name in ("unused", "static graph")):
        # The first try tells that the model is to be called again, or where DDP returns what it returned.
        opt.unfollow()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(opt, model, data[:1])
        opt.follow(model)
        opt._now.following.replays = replays
        data = data[1:]
    train(opt, model, data, accumulates="accumulated" in name)
    torch.testing.assert_close(one, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)
    for layer, rate in opt.rates().items():
        assert rates[layer] == pytest.approx(rate, rel=1e-4)


def test_a_parameter_that_one_replica_or_none_uses(of_both):
    (one, found), (two, same) = of_both("branches")
    assert found == same
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert found.pop("idle")["refreshes"] == 0
    assert all(row["refreshes"] == 6 and row["curvature"] != 0 for row in found.values()), found


def test_a_bad_batch_of_one_rank_costs_that_measurement_alone(of_both):
    (rates, found, one), (same, also, two) = of_both("bad batch")
    assert rates == same and found == also
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert rates[2] == rates[1] and rates[3] != rates[2]
    assert all(row["nonfinite"] == 1 for row in found.values())


@pytest.mark.parametrize(("who", "how"), FAILS)
def test_a_rank_that_cannot_measure_keeps_nobody_waiting(of_both, who, how):
    results = of_both(f"fails {who} {how}")
    (rates, _, one, by), (same, _, two, _) = results
    assert rates == same
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert by == ("replay" if how == "replay" or len(who) == 2 else "loss.backward")
    assert rates[2] == rates[1] and rates[1] != rates[0] and rates[3] != rates[2]
    for rank, (_, said, _, _) in enumerate(results):
        # Where all failed by autograd, the model is called once more from then on, which need not be said.
        told = rank in who and (len(who) == 1 or how == "replay")
        if how == "replay" and not told:
            assert len(said) == 1 and "another process could not measure" in said[0]
        else:
            assert len(said) == told and all("no more" in message for message in said), said


def test_a_rank_that_lacks_memory_once_goes_on_measuring_with_the_others(of_both):
    (rates, one), (same, two) = of_both("fails once in a window")
    assert rates == same
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_processes_that_train_apart_do_not_talk(of_both):
    for rank, found in enumerate(of_both("own groups")):
        for how, (weights, by) in zip(("backward", "closure"), found, strict=True):
            assert by == ("loss.backward" if how == "backward" else "opt.step")
            model = small_net(seed=rank)
            opt = AdamWLW(model, update_every=2, hvp="autograd" if how == "backward" else "finite_difference")
            for batch in batches(4 + 2 * rank):
                if how == "backward":
                    opt.zero_grad()
                    loss_of(model, batch).backward()
                    opt.step()
                else:
                    opt.step(usual(opt, model, batch))
            torch.testing.assert_close(weights, [p.detach() for p in model.parameters()], rtol=1e-6, atol=1e-9)


def test_a_process_that_trains_alone_waits_for_nobody(of_both):
    said, _ = of_both("apart")
    assert len(said) == 1 and "must know what averages the gradients" in said[0]


def test_ranks_that_run_out_of_batches_are_not_waited_for(of_both):
    (said, one), (also, two) = of_both("joined")
    assert len([message for message in said if "join()" in message]) == 1
    assert any("join()" in message for message in also)
    assert all(p.isfinite().all() for p in one + two)
