"""The optimizers against the float64 reference, over the table of options.

Catches: any difference in formula, order of operations, sign, bias correction, guard or counter between the package
and the definition of the method; a curvature pass that measures something else than the reference's dense Hessian.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    ALL,
    OPTIMIZERS,
    STEP,
    batches,
    each_case,
    layer_vectors,
    loss_of,
    loss_of_vectors,
    reference_of,
    small_net,
    train,
)

from lwas_fast.measure.probes import draw_signs

STEPS = 20
EVENTS = {"negative": "negative", "nonfinite": "nonfinite", "nondescent": "no_descent", "growth": "growth"}
EVENTS |= {name: name for name in ("capped", "skipped", "refreshes")}


def run_reference(kind, options, data):
    model = small_net()
    ref = reference_of(kind, model, **options)
    for k, batch in enumerate(data):
        ref.step(loss_of_vectors(model, batch), z=draw_signs(0, k, len(ref.W)))
    return ref


@each_case(kinds=ALL)
def test_float64_agrees_to_rounding(kind, options):
    data = batches(STEPS)
    model = small_net()
    opt = ALL[kind](model.named_parameters(), **options)
    train(opt, model, data)
    ref = run_reference(kind, options, data)
    for mine, theirs in zip(layer_vectors(model), ref.W, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(list(opt.rates().values()), ref.rate, rtol=1e-9, atol=0)
    for shown, events, applied, last in zip(opt.diagnostics().values(), ref.events, ref.applied, ref.last, strict=True):
        assert {name: shown[mine] for name, mine in EVENTS.items()} == events
        assert shown["applied"] == pytest.approx(applied, rel=1e-9)
        if events["refreshes"]:
            assert shown["descent"] == pytest.approx(last["descent"], rel=1e-9)
            assert shown["curvature"] == pytest.approx(last["curvature"], rel=1e-8, abs=1e-12)


@each_case(*STEP, kinds=ALL)
def test_float32_agrees_to_1e_6(kind, options):
    data = batches(STEPS, torch.float32)
    model = small_net(torch.float32)
    train(ALL[kind](model.named_parameters(), **options), model, data)
    # The reference starts from the same (float32) weights and sees the same (float32) data.
    start = small_net(torch.float32).double()
    ref = reference_of(kind, start, **options)
    for k, batch in enumerate(data):
        ref.step(loss_of_vectors(start, batch), z=draw_signs(0, k, len(ref.W)))
    # Adam's division amplifies rounding where a gradient is nearly 0: 1e-5 was measured. Muon's rounds do where a
    # singular value is, as of the last layer's gradient, whose two rows are opposite: 4e-5.
    tolerance = {"sgd": 1e-6, "adamw": 2e-5, "muon": 1e-4}[kind]
    for mine, theirs in zip(layer_vectors(model), ref.W, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ALL)
def test_finite_differences_agree(kind):
    data = batches(STEPS)
    options = {"curvature": "blocks", "update_every": 2}  # signs: the draw is weighted, see test_products.py
    model = small_net()
    opt = ALL[kind](model.named_parameters(), **options)
    train(opt, model, data, how="closure")
    ref = run_reference(kind, options, data)
    # Differences of gradients at 1e-6 of the weights' size: about 1e-6 relative in the curvature.
    for mine, theirs in zip(layer_vectors(model), ref.W, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(list(opt.rates().values()), ref.rate, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)  # Muon's orth would lengthen what the gradient was rounded by
def test_bf16_parameters_follow_the_reference(kind):
    """One step from equal weights: state in float32, so only the parameters' own rounding differs."""
    data = batches(1, torch.bfloat16)
    model = small_net(torch.bfloat16)
    before = layer_vectors(model)
    opt = OPTIMIZERS[kind](model.named_parameters(), ramp_steps=0)
    train(opt, model, data)
    start = small_net(torch.bfloat16).double()
    ref = reference_of(kind, start, ramp_steps=0)
    ref.step(loss_of_vectors(start, data[0]), z=draw_signs(0, 0, len(ref.W)))
    for old, mine, theirs in zip(before, layer_vectors(model), ref.W, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=4e-3, atol=4e-3 * old.abs().max().item())
    for state in opt.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize("kind", ALL)
def test_clipping_shortens_the_step_but_not_the_rate(kind):
    data = batches(STEPS)
    model = small_net()
    opt = ALL[kind](model.named_parameters(), update_every=2)
    ref = reference_of(kind, model, update_every=2)
    for k, batch in enumerate(data):
        opt.zero_grad()
        loss = loss_of(model, batch)
        vectors = [v.requires_grad_() for v in layer_vectors(model)]
        raw = torch.autograd.grad(loss_of_vectors(model, batch)(vectors), vectors)
        opt.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        factor = min(1.0, 0.05 / (torch.cat(raw).norm().item() + 1e-6))
        ref.step(loss_of_vectors(model, batch), z=draw_signs(0, k, len(ref.W)), gradient=[g * factor for g in raw])
        opt.step()
    for mine, theirs in zip(layer_vectors(model), ref.W, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
