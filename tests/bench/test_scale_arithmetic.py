"""`python -m bench.scale`: what it says of a step is what a step takes.

Catches: state that is not sharded, or that takes memory on the meta device; arithmetic that a real step does not keep;
a schedule of its own.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from bench.scale.__main__ import main
from bench.scale.cost import LOGITS, Machine, measured_steps
from bench.scale.model import SHAPES, Llama, Shape, fake_ranks, on_meta, shard
from bench.scale.recorded import Memory, Message, here, layers_of, nbytes, record, state_bytes
from lwas_fast import SGDLW, AdamWLW
from lwas_fast.layers import layer_names, module_of
from lwas_fast.table import Column

SMALL = Shape(2, 64, 176, 64, 100)


def state_of(opt, name):
    return [opt._layout.state_of(bucket, i)[name] for bucket in opt._layout.buckets for i in range(len(bucket.params))]


@pytest.mark.parametrize("ranks", [8, 64])
def test_state_of_a_large_model(ranks):
    """Two tensors like the shard, in float32, for each parameter, and 16 numbers a layer: without memory."""
    with fake_ranks(ranks) as mesh:
        model = shard(on_meta(SHAPES["7B"]), mesh)
        opt = AdamWLW(model)
        names = layer_names(list(model.parameters()), [name for name, _ in model.named_parameters()], None)
        assert names == [module_of(name) for name, _ in model.named_parameters()]
        assert layers_of(opt) == len(set(names)) == 9 * 32 + 3
        params = list(model.parameters())
        assert nbytes(params) == pytest.approx(4 * 6_738_415_616 / ranks, rel=1e-3)
        (bucket,) = opt._layout.buckets
        for name in AdamWLW.rule.buffers_schedule_free:
            for state, param in zip(here(state_of(opt, name)), here(bucket.params), strict=True):
                assert state.shape == param.shape and state.dtype == torch.float32 and state.is_meta
        assert bucket.table.shape == (len(set(names)), len(Column)) and bucket.table.is_meta
        own = 4 * len(Column) * len(set(names)) + 4 * len(params)  # the second: how often each was updated
        assert state_bytes(opt) == 2 * nbytes(params) + own


@pytest.mark.parametrize("plain", [False, True])
def test_messages_on_the_meta_device(plain):
    """Those that tests/parallel/test_messages.py counts; of HSDP those of layers' sums go over one dimension."""
    for replicas in (1, 2):
        with fake_ranks(8, replicas) as mesh:
            opt = AdamWLW(shard(on_meta(SMALL), mesh))
            n = layers_of(opt)
            first, ordinary, measuring = (record(opt, measures, plain=plain) for measures in (True, False, True))
            assert ordinary.messages == [Message(4 * n, 32 * n)]
            sent = [Message(1, 4), Message(1, 4), Message(2 * n, 8 * n), Message(3 * n, 12 * n), Message(n, 4 * n)]
            assert first.messages == measuring.messages == [*sent, *ordinary.messages]


class WithLoss(nn.Module):
    """Returns the loss, and the logits if it is told to."""

    def __init__(self, model, both):
        super().__init__()
        self.model, self.both = model, both

    def forward(self, tokens):
        logits = self.model(tokens)
        return loss_of_logits(logits, tokens), logits if self.both else None


def loss_of_logits(logits, tokens):
    return F.cross_entropy(logits[0].float(), tokens[0])


def peaks_of(shape, half, tokens, returns="logits", ranks=1, batches=1):
    """Bytes alive at most, in an ordinary step and in one that measures, and parameters, of a rank that is there."""
    found, x = [], torch.randint(0, shape.vocabulary, (1, tokens))
    with fake_ranks(ranks) as mesh:
        model = shard(Llama(shape), mesh, half)
        if returns != "logits":
            model = fully_shard(WithLoss(model, returns == "both"), mesh=mesh)
        opt, params = AdamWLW(model), list(model.parameters())
        for measures in (True, False, True):
            opt._now.outcome = None  # no second try: other ranks' shards are whatever lay in memory, NaN perhaps
            for group in opt.param_groups:
                group["next_refresh"] = group["steps"] + (0 if measures else 1)
            opt.zero_grad()
            with Memory((params, [opt.state[p] for p in params]), emptied=True) as memory:
                for _ in range(batches):
                    loss = loss_of_logits(model(x), x) if returns == "logits" else model(x)[0]
                    loss.backward()
                    del loss
                opt.step()
            found.append(memory.peak)
        assert opt.measured_by == "replay"
        return found[1:], sum(part.numel() for part in here(params))


def test_memory_while_the_model_is_called_once_more():
    """On several ranks gathered weights and whole gradients are most of it; a measurement keeps three more vectors."""
    (ordinary, measuring), count = peaks_of(Shape(2, 256, 704, 256, 1000), True, 2, ranks=4)
    assert (measuring - ordinary) / count == pytest.approx(4 * 3, abs=0.3)


@pytest.mark.parametrize("half", [False, True])
def test_memory_of_a_step_that_measures(half):
    """Weights, state and gradient; what keeps both, the directions, the second gradient, and the difference.

    With accumulation, besides: the gradient of the last micro-batch alone.
    """
    shape = Shape(2, 256, 704, 256, 1000)
    (ordinary, measuring), count = peaks_of(shape, half, 2)
    assert measuring / count == pytest.approx(4 * 8, abs=0.1)
    assert 4 * 4 <= ordinary / count < 4 * 5 + 0.1  # plain torch on a CPU needs one more
    (_, accumulated), count = peaks_of(shape, half, 2, batches=2)
    assert accumulated / count == pytest.approx(4 * 9, abs=0.1)
    with fake_ranks(8) as mesh:
        model = shard(on_meta(shape), mesh, half)
        opt, local = AdamWLW(model), sum(part.numel() for part in here(list(model.parameters())))
        cases = ((True,), (False,), (True,), (True, True))
        _, *recorded = (record(opt, *case).peak / local for case in cases)
    assert recorded == pytest.approx([4 * 4, 4 * 8, 4 * 9], abs=0.1)


@pytest.mark.parametrize(
    ("half", "returns", "more"),
    [(True, "logits", LOGITS), (False, "logits", LOGITS + 1), (True, "loss", 0), (True, "both", 1)],
)
def test_memory_of_logits(half, returns, more):
    """A model that returns its loss is spared what a second derivative from its logits on takes."""
    vocabulary, tokens = 8000, 1000
    (ordinary, measuring), count = peaks_of(Shape(1, 16, 16, 16, vocabulary), half, tokens, returns)
    assert (measuring - ordinary - 4 * 4 * count) / (4 * vocabulary * tokens) == pytest.approx(more, abs=0.2)


def test_schedule_is_the_optimizers():
    model = torch.nn.Linear(2, 2)
    opt = SGDLW(model)
    due = []
    for step in range(130):
        if opt.curvature_due:
            due.append(step)
        opt.zero_grad()
        model(torch.randn(8, 2)).square().mean().backward()
        opt.step()
    assert due == list(measured_steps(opt.param_groups[0], 130))
    assert len(measured_steps(opt.param_groups[0], 500)) == 28  # docs/costs.md


def test_seconds():
    machine = Machine(1e12, 0.5, 1e12, 1e-5, 8, 4e11, 1e10)
    assert machine.all_reduce(Message(1, 0), 64) == pytest.approx(6e-5)
    assert machine.bandwidth(8) == 4e11 and machine.bandwidth(16) == 8e10
    assert machine.model_pass(10**9, 100, 8) == pytest.approx(1.2)  # computing
    assert machine.model_pass(10**9, 1, 16) == pytest.approx(8e9 * 15 / 16 / 8e10)  # sending


def test_command(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    monkeypatch.setattr(sys, "argv", ["scale", "--models", "tiny", "--ranks", "8,16", "--steps", "500"])
    main()
    said = capsys.readouterr().out
    assert "| tiny | 0.00 B | 21 | 21 | 1, 672 B | 6, 1.18 kB |" in said
    assert said.count("| tiny | 16 |") == 2 and "28 of the first 500 steps measure" in said
