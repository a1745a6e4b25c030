"""Sharded parameters: FSDP2 on two processes.

Catches: shards that take other steps than the whole would; ranks that disagree by a bit.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, usual
from processes import results_of
from shard_cases import result_of, sharded
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

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


def run(kind, way, rank):
    model = sharded(
        parts=(0, 2, 4) if "root" in way else (0,),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=False)} if way == "offloaded" else {}),
    )
    opt = made(kind, way, model)
    data = [(x[rank::2], y[rank::2]) for x, y in batches(STEPS)]
    losses = train(opt, model, way, data)
    return result_of(opt, model, losses)


CASES = [(kind, way) for kind in OPTIMIZERS for way in WAYS]
SCENARIOS = {f"{kind} {way}": partial(run, kind, way) for kind, way in CASES}


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
