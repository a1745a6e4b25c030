"""What the tests of `tests/follow` share: a followed model, and one whose optimizer is told everything."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, loss_of, small_net

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


STEPS = 25


def followed(kind, model=None, **options):
    model = small_net(torch.float32) if model is None else model
    return model, OPTIMIZERS[kind](model, **options)


def explicit(kind, model, **options):
    """The same optimizer, told everything."""
    return OPTIMIZERS[kind](model.named_parameters(), weight_decay_on="matrices", **options)


def steps(opt, model, data, parts=1):
    for batch in data:
        for part, micro in enumerate(zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True)):
            loss = loss_of(model, micro) / parts
            loss.backward() if opt._now.following else opt.backward(loss, last=part == parts - 1)
        opt.step()
        opt.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
