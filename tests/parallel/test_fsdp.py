"""Sharded parameters: FSDP2 on two processes.

Catches: shards that take other steps than the whole would; ranks that disagree by a bit; weights that FSDP gathered
before they were changed.
"""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, usual
from processes import results_of
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from lwas_fast import CurvatureError

STEPS = 12
# How it is trained: by its closure, or by a plain backward; and what else.
WAYS = {
    "closure": {},
    "followed": {},
    "momentum": {"schedule_free": False, "cap": 0.05},
    "blocks": {"curvature": "blocks"},
    "decay": {"weight_decay": 0.3},
    "clipped": {},
    "accumulated": {},
    "accumulated without messages": {},
    "accumulated without messages, nothing in the root": {},
    "closure that adds": {},
    "scaled": {},
    "two groups": {},
    "offloaded": {},
}


def sharded(dtype=torch.float64, parts=(0,), **how):
    """Rows of 5, 4 and 2 on two ranks; the first layer in a group of its own."""
    model = small_net(dtype)
    for part in parts:
        fully_shard(model[part], **how)
    return fully_shard(model, **how)


def made(kind, way, model):
    options = {"update_every": 3, "weight_decay_on": "matrices", **WAYS.get(way, {})}
    if way == "two groups":
        named = list(model.named_parameters())
        groups = [{"params": [x for x in named if (x[1].ndim > 1) == matrix], "cap": 0.1 + matrix} for matrix in (0, 1)]
        opt = OPTIMIZERS[kind](groups, **options)
        opt.follow(model)
        return opt
    return OPTIMIZERS[kind](model.named_parameters() if "closure" in way else model, **options)


def train(opt, model, way, data):
    losses, scaler = [], torch.amp.GradScaler("cpu", enabled=way == "scaled", init_scale=64.0)
    for x, y in data:
        count = 2 if way.startswith("accumulated") else 1
        value = 0.0
        opt.zero_grad()
        if way == "closure":
            losses.append(opt.step(usual(opt, model, (x, y))).item())
            continue
        if way == "closure that adds":
            loss_of(model, (x[: len(x) // 4], y[: len(x) // 4])).backward()

            def closure(x=x, y=y):
                loss = loss_of(model, (x[len(x) // 4 :], y[len(x) // 4 :]))
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
            continue
        for k, part in enumerate(zip(x.chunk(count), y.chunk(count), strict=True)):
            if "without" in way and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(k == count - 1)
            loss = loss_of(model, part) / count
            scaler.scale(loss).backward()
            value += loss.item()
        if way == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(opt)
        scaler.update()
        losses.append(value)
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def result_of(opt, model, losses):
    state = opt.state_dict()["state"]
    return {
        "losses": torch.tensor(losses),
        "weights": [whole(p) for p in model.parameters()],
        "states": {k: {n: whole(v) for n, v in of_param.items()} for k, of_param in state.items()},
        "rates": opt.rates(),
        "by": opt.measured_by,
    }


def shard(kind, way, rank):
    model = sharded(
        parts=(0, 2, 4) if "root" in way else (0,),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=False)} if way == "offloaded" else {}),
    )
    opt = made(kind, way, model)
    data = [(x[rank::2], y[rank::2]) for x, y in batches(STEPS)]
    losses = train(opt, model, way, data)
    return result_of(opt, model, losses)


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
        losses = train(opt, model, "followed", data)
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
            fully_shard(model[0])
            fully_shard(model)
            opt.param_groups[0]["params"] = list(model.parameters())
        losses = train(opt, model, "followed", [(x[rank::2], y[rank::2]) for x, y in batches(9)])
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


CASES = [(kind, way) for kind in OPTIMIZERS for way in WAYS]
SCENARIOS = {f"{kind} {way}": partial(shard, kind, way) for kind, way in CASES}
SCENARIOS |= {"not finite": not_finite, "bad batch": bad_batch, "evaluated": evaluated, "told": told, "half": half}
SCENARIOS |= {"refused": refused, "sharded later": sharded_later, "beside": beside, "long": long, "copied": copied}


@pytest.fixture(scope="module")
def of_all(tmp_path_factory):
    return results_of("test_fsdp", tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_shards_take_the_steps_of_the_whole(of_all, kind, way):
    one, two = of_all(f"{kind} {way}")
    assert one["rates"] == two["rates"]
    model: nn.Module = small_net()
    opt = made(kind, way, model)
    if "closure" not in way:
        opt._now.following.replays = True
        assert one["by"] == "replay"
    alone = result_of(opt, model, train(opt, model, way, batches(STEPS)))
    torch.testing.assert_close((one["losses"] + two["losses"]) / 2, alone["losses"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(one["weights"], alone["weights"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=0)
    for mine, theirs in zip(one["states"].values(), alone["states"].values(), strict=True):
        for name in mine.keys() - {"layer"}:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(mine["layer"], theirs["layer"], rtol=1e-3, atol=1e-7)


def test_elements_that_are_not_finite_are_left_alone_and_counted_on_all_ranks(of_all):
    one, two = of_all("not finite")
    torch.testing.assert_close(one["states"], two["states"], rtol=0, atol=0)
    assert all(p.isfinite().all() for p in one["weights"])
    steps = [int(state["step"]) for state in one["states"].values()]
    assert steps == [6] * 6  # the bias of that layer moves always


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
