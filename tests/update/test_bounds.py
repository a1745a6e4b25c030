"""What bounds a step where an ordinary run never comes: layers of zeros, norms that overflow, steep decay.

Catches: another floor of the weights' norm, a bound that is lost with a norm, another memory of directions' lengths,
and a multiplier on the device that counts twice; in the compiled update and in plain torch.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import OPTIMIZERS, REFERENCES

from lwas_fast.update import extension

NO_EXTENSION = pytest.mark.skipif(extension.EXTENSION is None, reason=f"no compiled update: {extension.MISSING}")
EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
WAYS = pytest.mark.parametrize("way", [pytest.param("fused", marks=NO_EXTENSION), "foreach"])
MODES = pytest.mark.parametrize("schedule_free", [True, False])
WARMING = {"update_every": 10**9, "warmup_steps": 10**9}


@EACH
@WAYS
@MODES
def test_a_layer_of_zeros_moves_as_if_its_weights_were_a_hundredth_each(kind, way, schedule_free):
    w = torch.zeros(400, requires_grad=True)
    options = {"cap": 0.1, "schedule_free": schedule_free, "weight_decay": 0.0, way: True}
    opt = OPTIMIZERS[kind]([w], warmup_rate=1e9, **options, **WARMING)
    w.grad = torch.randn(400)
    opt.step()
    assert w.norm().item() == pytest.approx(0.1 * 0.01 * math.sqrt(400), rel=1e-5)


@WAYS
@MODES
def test_decay_alone_takes_no_more_than_the_cap(way, schedule_free):
    """Of AdamWLW's weights, however long its rate; its directions are short beside these."""
    w = torch.full((9,), 100.0, requires_grad=True)
    options = {"cap": 0.1, "weight_decay": 30.0, "schedule_free": schedule_free, way: True}
    opt = OPTIMIZERS["adamw"]([w], warmup_rate=1e9, **options, **WARMING)
    for k in range(1, 3):
        w.grad = torch.full((9,), 1e-30)  # its square is 0
        opt.step()
        (row,) = opt.diagnostics().values()
        assert row["applied"] == pytest.approx(0.1 / 30, rel=1e-5)
        if not schedule_free:
            torch.testing.assert_close(w.detach(), torch.full((9,), 100 * 0.9**k), rtol=1e-5, atol=0)


@WAYS
@MODES
def test_weights_and_directions_whose_norms_overflow_stay(way, schedule_free):
    """Each square is finite and the sums are not: nothing is known of the cap, and no step is within it for sure."""
    w = torch.full((2,), 1.5e19, requires_grad=True)
    before = w.detach().clone()
    opt = OPTIMIZERS["sgd"]([w], warmup_rate=1e-3, schedule_free=schedule_free, **{way: True}, **WARMING)
    for _ in range(2):
        w.grad = torch.full((2,), 1.5e19)
        opt.step()
        assert torch.equal(w.detach(), before)


@EACH
@MODES
def test_steps_go_by_lengths_as_in_the_reference(kind, schedule_free):
    """Capped at every step, with directions that grow and shrink by more than is counted."""
    torch.manual_seed(0)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    betas = {"betas": (0.0, 0.999)} if kind == "adamw" else {"momentum": 0.0}  # whose directions follow the gradient
    options = {"cap": 0.05, "schedule_free": schedule_free, "warmup_rate": 1e9, "weight_decay": 0.0, **betas}
    opt = OPTIMIZERS[kind]([w], **options, **WARMING)
    ref = REFERENCES[kind]([w.detach()], **options, **WARMING)
    for size in (1, 1, 1, 1.4, 3, 1, 0.1, 0.01, 0.01, 0.02, 1, 1, 50, 60, 1):
        gradient = size * torch.randn(6, dtype=torch.float64)
        w.grad = gradient.clone()
        opt.step()
        ref.step(lambda layers: layers[0] @ layers[0], gradient=[gradient])
        torch.testing.assert_close(w.detach(), ref.W[0], rtol=1e-10, atol=0)
        (row,) = opt.diagnostics().values()
        assert row["applied"] == pytest.approx(ref.applied[0], rel=1e-10)
        assert row["length"] == pytest.approx(ref.length[0], rel=1e-10)


class OnDevice(torch.Tensor):
    """A number that must not be read: as one on a GPU, whose memory is the CPU's here."""

    is_cuda = True

    def __float__(self):
        raise AssertionError("it was read, which waits for the device")


@NO_EXTENSION
@EACH
@MODES
def test_a_multiplier_on_the_device_counts_once_and_is_not_read(kind, schedule_free):
    found = []
    for lr in (0.25, torch.tensor(0.25).as_subclass(OnDevice)):
        torch.manual_seed(0)
        w = torch.randn(50, requires_grad=True)
        opt = OPTIMIZERS[kind]([w], schedule_free=schedule_free, fused=True, **WARMING)
        opt.param_groups[0]["lr"] = lr
        for _ in range(3):
            w.grad = torch.randn(50)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                opt.step()
        found.append(w.detach())
    assert torch.equal(*found)
