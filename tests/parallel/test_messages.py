"""How many messages a step sends, and how long they are: FSDP2 and DistributedDataParallel on two processes.

Catches: a message that docs/scale.md does not count; numbers of tensors in the place of layers'; a measurement that
evaluates the model more often than it has to.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from processes import results_of
from shard_cases import sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, ELEMENTS = 3, 54  # of `small_net`
STEP = 4 * LAYERS  # numbers in an ordinary step's message
# FSDP2 gathers its two groups for the forward pass and the one that is not the model itself for the backward pass
# anew, and each is reduced once.
PASS = {"gather": 3, "scatter": 2}
NAMES = {"allreduce_": "reduce", "_allgather_base_": "gather", "_reduce_scatter_base_": "scatter"}


class Messages(TorchDispatchMode):
    """What is sent inside: a name, and how many numbers."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            numbers = sum(leaf.numel() for leaf in pytree.tree_leaves(args[0]) if isinstance(leaf, torch.Tensor))
            self.sent.append((NAMES.get(name, name), numbers))
        return func(*args, **(kwargs or {}))


def fsdp(rank):
    return sharded(torch.float32)


def ddp(rank):
    return DistributedDataParallel(small_net(torch.float32))


def steps(make, kind, way, rank):
    """What was sent in four steps, of which the first and the third measure."""
    model = make(rank)
    opt = OPTIMIZERS[kind](model, update_every=2)
    if way == "replay":
        opt._now.following.replays = True
    found = []
    for x, y in batches(4, torch.float32):
        with Messages() as messages:
            count = 2 if way == "accumulated" else 1
            for part in zip(x[rank::2].chunk(count), y[rank::2].chunk(count), strict=True):
                (loss_of(model, part) / count).backward()
            if way == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            opt.step()
            opt.zero_grad()
        found.append(messages.sent)
    return found


CASES = {
    **{f"{kind} fsdp {way}": (fsdp, kind, way) for kind in OPTIMIZERS for way in ("plain", "accumulated")},
    **{f"{kind} ddp {way}": (ddp, kind, way) for kind in OPTIMIZERS for way in ("plain", "clipped", "replay")},
}
SCENARIOS = {name: partial(steps, *case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def of_all(tmp_path_factory):
    return results_of("test_messages", tmp_path_factory.mktemp("messages"))


def reduced(sent):
    return [numbers for name, numbers in sent if name == "reduce"]


def passes(sent):
    """The messages of FSDP2's own."""
    return {name: sum(one == name for one, _ in sent) for name in PASS}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sharded(of_all, kind):
    clipping = [LAYERS] * (kind == "adamw")  # whether gradients were clipped is not to be seen of DTensors
    for found in of_all(f"{kind} fsdp plain"):
        for sent in found[1::2]:
            assert reduced(sent) == [STEP]
            assert passes(sent) == PASS
        for sent in found[::2]:
            assert reduced(sent) == [1, 1, 2 * LAYERS, 3 * LAYERS, *clipping, STEP]
            assert passes(sent) == {name: 2 * count for name, count in PASS.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sharded_with_accumulation(of_all, kind):
    """The last micro-batch is evaluated twice more: by itself, and at displaced weights."""
    for found in of_all(f"{kind} fsdp accumulated"):
        assert passes(found[1]) == passes(found[3]) == {name: 2 * count for name, count in PASS.items()}
        assert passes(found[2]) == {name: 4 * count for name, count in PASS.items()}
        assert reduced(found[1]) == [STEP]
        assert len(reduced(found[2])) == 6 - (kind == "sgd")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replicas(of_all, kind):
    """All gradients go in one bucket; what is measured goes with the loss and whether a replica failed."""
    for way in ("plain", "clipped"):
        for found in of_all(f"{kind} ddp {way}"):
            for sent in found[1::2]:
                assert reduced(sent) == [ELEMENTS]
            for sent in found[::2]:
                assert reduced(sent) == [ELEMENTS, 3 * LAYERS + 2]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replicas_without_a_second_derivative(of_all, kind):
    for found in of_all(f"{kind} ddp replay"):
        assert reduced(found[2]) == [1, ELEMENTS, 1, ELEMENTS]
        assert reduced(found[3]) == [ELEMENTS]
