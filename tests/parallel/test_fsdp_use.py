"""FSDP2 on two processes, in use: evaluation, half precision, numbers that are none, what is refused.

Catches: ranks that disagree by a bit, or go different ways; weights that FSDP gathered before they were changed.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, train, usual
from processes import results_of
from shard_cases import result_of, shard, sharded, whole
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from lwas_fast import CurvatureError, MuonLW


def divided(rank):
    """Gradients that FSDP averages; and that it adds up, of a loss that each rank has divided itself."""
    found = []
    for adds in (False, True):
        model = sharded()
        for part in (model[0], model) if adds else ():
            part.set_gradient_divide_factor(1.0)
        opt = OPTIMIZERS["sgd"](model, update_every=2)
        for x, y in batches(4):
            (loss_of(model, (x[rank::2], y[rank::2])) / (2 if adds else 1)).backward()
            opt.step()
            opt.zero_grad()
        found.append(opt.rates())
    return found


def not_finite(rank):
    """NaN in one rank's shard of a layer, and in all of a layer; then the state of both."""
    model = sharded()
    opt = OPTIMIZERS["adamw"](model)
    for k, (x, y) in enumerate(batches(6)):
        loss_of(model, (x, y)).backward()
        if k in (2, 3):
            grad = model[2].weight.grad.to_local()
            grad[:] = torch.nan if rank == 0 or k == 3 else grad
        opt.step()
        opt.zero_grad()
    return result_of(opt, model, [])


def bad_batch(rank):
    """A rank whose loss is NaN in a step that measures."""
    model = sharded()
    opt = OPTIMIZERS["adamw"](model, update_every=2)
    rates, weights = [], []
    for k, (x, y) in enumerate(batches(6)):
        loss_of(model, (x * (torch.nan if k == 2 and rank == 1 else 1.0), y)).backward()
        opt.step()
        opt.zero_grad()
        rates.append(opt.rates())
        weights.append([whole(p).clone() for p in model.parameters()])
    return rates, weights, opt.diagnostics()


def evaluated(rank):
    """The average in evaluation mode; and what is trained on goes on as if nothing had been."""
    found = []
    for looks in (False, True):
        model = sharded(torch.float32)
        opt = OPTIMIZERS["adamw"](model, update_every=3)
        outputs = []
        for x, y in batches(8, torch.float32):
            loss_of(model, (x, y)).backward()
            opt.step()
            opt.zero_grad()
            if looks:
                model.eval()
                with torch.no_grad():
                    outputs.append(model(x))
                outputs.append([whole(p).clone() for p in model.parameters()])
                outputs.append({name: whole(p).clone() for name, p in model.state_dict().items()})
                model.train()
        found.append(([whole(p).clone() for p in model.parameters()], opt.rates()))
    return found, outputs, x


def told(rank):
    """The same without a followed model, by eval() and train()."""
    found = []
    for looks in (False, True):
        model = sharded(torch.float32)
        opt = OPTIMIZERS["adamw"](model.named_parameters(), update_every=3)
        for x, y in batches(8, torch.float32):
            opt.step(usual(opt, model, (x, y)))
            if looks:
                opt.eval()
                with torch.no_grad():
                    output = model(x)
                copied = small_net(torch.float32)
                with torch.no_grad():
                    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
                        mine.copy_(whole(theirs))
                    torch.testing.assert_close(output, copied(x))
                opt.train()
        found.append([whole(p).clone() for p in model.parameters()])
    return found


def half(rank):
    """FSDP's mixed precision, and parameters of half precision."""
    found = {}
    for name, dtype, policy in (
        ("mixed", torch.float32, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
        ("half", torch.bfloat16, MixedPrecisionPolicy()),
    ):
        model = sharded(dtype, mp_policy=policy)
        opt = OPTIMIZERS["adamw"](model, update_every=2)
        data = [(x[rank::2], y[rank::2]) for x, y in batches(60, dtype)]
        losses = train(opt, model, data, "followed")
        found[name] = losses, opt.diagnostics()
    return found


def beside(rank):
    """A layer that is not sharded, whose gradients the user averages."""
    model = small_net()
    fully_shard(model, ignored_params=set(model[4].parameters()))
    opt = OPTIMIZERS["adamw"](model, update_every=1)
    rates = []
    for x, y in batches(6):
        loss_of(model, (x[rank::2], y[rank::2])).backward()
        for p in model[4].parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2
        opt.step()
        opt.zero_grad()
        rates.append(opt.rates())
    return rates


def sharded_later(rank):
    """The optimizer is made before the model is sharded, and gets its new parameters after, as Accelerate has it."""
    found = []
    for late in (False, True):
        model = small_net() if late else sharded()
        opt = OPTIMIZERS["adamw"](model, update_every=2)
        if late:
            shard(model)
            opt.param_groups[0]["params"] = list(model.parameters())
        losses = train(opt, model, [(x[rank::2], y[rank::2]) for x, y in batches(9)], "followed")
        model.eval()
        with torch.no_grad():
            model(batches(1)[0][0])
        found.append((losses, min(row["refreshes"] for row in opt.diagnostics().values())))
    return found


def refused(rank):
    model = sharded()
    opt = OPTIMIZERS["adamw"](model.named_parameters())
    with pytest.raises(CurvatureError, match="make the optimizer with the model"):
        opt.backward(loss_of(model, batches(1)[0]))
    assert all(p.grad is None for p in model.parameters())
    for way in ({}, {"use_orig_params": True}):
        module = FullyShardedDataParallel(small_net(torch.float32), device_id=torch.device("cpu"), **way)
        for params in (module, module.parameters()):
            with pytest.raises(ValueError, match="FSDP1"):
                OPTIMIZERS["adamw"](params)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer gives each process"):
        ZeroRedundancyOptimizer(small_net().parameters(), OPTIMIZERS["adamw"])
    mixed = [("one.a", model[0].weight), ("one.b", nn.Parameter(torch.zeros(3, dtype=torch.float64)))]
    with pytest.raises(ValueError, match="'one' has tensors on cpu, distributed over .* and on cpu; give them"):
        OPTIMIZERS["adamw"](mixed).rates()


def whole_only(rank):
    """What MuonLW says of sharded parameters, before anything has changed."""
    said = []
    for follows in (True, False):
        model, batch = sharded(), batches(1)[0]
        opt = MuonLW(model if follows else model.named_parameters())
        before = [whole(p).clone() for p in model.parameters()]

        def backward(model=model, opt=opt, follows=follows, batch=batch):
            loss = loss_of(model, batch)
            loss.backward() if follows else opt.backward(loss)

        for call in (backward, opt.step):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        assert not opt.state and opt.param_groups[0]["steps"] == 0
        assert all(map(torch.equal, before, map(whole, model.parameters())))
    return said


def long(rank):
    """The rates' bits over 200 steps, and the objects that are alive."""
    model = sharded(torch.float32)
    opt = OPTIMIZERS["adamw"](model)
    rates, alive = [], []
    for x, y in batches(200, torch.float32):
        loss_of(model, (x[rank::2], y[rank::2])).backward()
        opt.step()
        opt.zero_grad()
        rates.append(list(opt.rates().values()))
        if len(rates) in (120, 200):
            gc.collect()
            alive.append(len(gc.get_objects()))
    return torch.tensor(rates, dtype=torch.float64), alive


def copied(rank):
    """A deep copy and a pickled one go on as the original."""
    model = sharded()
    opt = OPTIMIZERS["adamw"](model.named_parameters(), update_every=2)
    data = batches(6)
    for x, y in data[:3]:
        opt.step(usual(opt, model, (x, y)))
    saved = copy.deepcopy(opt.state_dict())
    weights = [whole(p).clone() for p in model.parameters()]
    found = []
    for _ in range(2):
        for x, y in data[3:]:
            opt.step(usual(opt, model, (x, y)))
        found.append([whole(p).clone() for p in model.parameters()])
        with torch.no_grad():
            for p, value in zip(model.parameters(), weights, strict=True):
                p.copy_(torch.distributed.tensor.distribute_tensor(value.detach(), p.device_mesh, p.placements))
        opt.load_state_dict(copy.deepcopy(saved))
    return found


SCENARIOS = {"not finite": not_finite, "bad batch": bad_batch, "evaluated": evaluated, "told": told, "half": half}
SCENARIOS |= {"refused": refused, "sharded later": sharded_later, "beside": beside, "long": long, "copied": copied}
SCENARIOS |= {"divided": divided, "whole only": whole_only}


@pytest.fixture(scope="module")
def of_all(tmp_path_factory):
    return results_of("test_fsdp_use", tmp_path_factory.mktemp("shards"))


def test_elements_that_are_not_finite_are_left_alone_and_counted_on_all_ranks(of_all):
    one, two = of_all("not finite")
    torch.testing.assert_close(one["states"], two["states"], rtol=0, atol=0)
    assert all(p.isfinite().all() for p in one["weights"])
    steps = [int(state["step"]) for state in one["states"].values()]
    assert steps == [6] * 6  # the bias of that layer moves always


def test_a_loss_that_ranks_divide_themselves_has_the_same_rates(of_all):
    (averaged, added), (same, again) = of_all("divided")
    assert averaged == same and added == again
    assert added == pytest.approx(averaged, rel=1e-9)


def test_a_rank_with_a_bad_batch_costs_that_measurement_alone(of_all):
    (rates, weights, found), (same, equal, also) = of_all("bad batch")
    assert rates == same and found == also
    torch.testing.assert_close(weights, equal, rtol=0, atol=0)
    assert rates[2] == rates[1] and rates[3] != rates[2]
    torch.testing.assert_close(weights[2], weights[1], rtol=0, atol=0)
    assert all(row["nonfinite"] == 1 for row in found.values())


def test_evaluation_sees_the_average_and_disturbs_nothing(of_all):
    for ((weights, rates), (same, equal)), outputs, x in of_all("evaluated"):
        assert rates == equal
        torch.testing.assert_close(weights, same, rtol=0, atol=0)
        output, average, saved = outputs[-3:]
        model = small_net(torch.float32)
        model.load_state_dict(saved)
        torch.testing.assert_close(list(model.parameters()), average, rtol=0, atol=0, check_stride=False)
        torch.testing.assert_close(model(x), output)


def test_evaluation_without_a_model_sees_the_average_too(of_all):
    for plain, looked in of_all("told"):
        torch.testing.assert_close(plain, looked, rtol=0, atol=0)


def test_half_precision_measures_and_trains(of_all):
    one, two = of_all("half")
    for name in one:
        (losses, found), (_, same) = one[name], two[name]
        assert found == same
        assert all(row["refreshes"] >= 10 and row["curvature"] != 0 for row in found.values()), found
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_layer_that_is_not_sharded_leaves_ranks_alike(of_all):
    one, two = of_all("beside")
    assert one == two


def test_a_model_that_is_sharded_after_the_optimizer_was_made(of_all):
    for (_, measured), (losses, late) in of_all("sharded later"):
        assert measured == 5 and late == 4  # the first step tells
        assert losses[-1] < losses[0]


def test_what_cannot_be_is_refused(of_all):
    of_all("refused")


def test_muon_refuses_shards(of_all):
    for said in of_all("whole only"):
        assert len(said) == 4
        assert all("'0.weight' is distributed, and MuonLW" in message for message in said)


def test_parameters_of_deepspeed_are_refused():
    param = nn.Parameter(torch.zeros(3))
    param.ds_id = 0
    with pytest.raises(ValueError, match="parameter 0 of group 0 is part of DeepSpeed's ZeRO-3: use fully_shard"):
        OPTIMIZERS["adamw"]([param])
    opt = OPTIMIZERS["adamw"](small_net().parameters())
    flat = nn.Parameter(torch.zeros(3))
    opt.param_groups[0]["params"], flat.grad = [flat], torch.ones(3)
    with pytest.raises(ValueError, match="made with 6 parameters and now has 1: .*DeepSpeed"):
        opt.step()


def test_ranks_agree_to_the_bit_and_nothing_piles_up(of_all):
    (one, alive), (two, _) = of_all("long")
    assert torch.equal(one, two)
    assert alive[1] < alive[0] + 500


def test_a_state_is_loaded_again(of_all):
    for first, second in of_all("copied"):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
