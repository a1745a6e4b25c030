"""What is MuonLW's own: its direction in a step, its state, what it refuses, and how its rates count.

Catches: a direction that elements without a finite gradient spoil, or that half precision changes; a factor for
measured rates that is not the norm of a direction's weights; a state of another optimizer that is taken for its own.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import ALL, OPTIMIZERS, REFERENCES, batches, small_net, train
from torch import nn
from torch.nn import functional as F

from lwas_fast import MuonLW

MODES = pytest.mark.parametrize("schedule_free", [True, False])
FIXED = {"warmup_steps": 10**9, "warmup_rate": 0.05, "cap": math.inf}
TIGHT = {**FIXED, "cap": 0.03}  # so that the length of directions counts
SHAPES = [(3, 4), (4,), (4, 2, 3, 3), (1, 6), (6, 1), ()]


def drawn(shapes, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


@MODES
def test_trains_without_options(schedule_free):
    torch.manual_seed(0)
    x = torch.randn(256, 1, 6, 6)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4)
    )
    opt = MuonLW(model, schedule_free=schedule_free)
    first = F.cross_entropy(model(x), y).item()
    for _ in range(40):
        at = torch.randperm(256)[:64]
        F.cross_entropy(model(x[at]), y[at]).backward()
        opt.step()
        opt.zero_grad()
    opt.eval()
    assert F.cross_entropy(model(x), y).item() < 0.3 * first
    assert all(row["refreshes"] >= 4 for row in opt.diagnostics().values())


@MODES
def test_elements_that_are_not_finite_do_not_spoil_the_others(schedule_free):
    """As the reference has it: their momentum stands for them in the direction, and neither moves."""
    weights = [w.requires_grad_() for w in drawn(SHAPES)]
    named = [(f"{'one' if i < 2 else i}.w{i}", w) for i, w in enumerate(weights)]  # the first two are one layer
    opt = MuonLW(named, schedule_free=schedule_free, weight_decay=0.3, **TIGHT)
    layers = [[0, 1], *([i] for i in range(2, len(SHAPES)))]
    ref = REFERENCES["muon"](
        [torch.cat([weights[i].detach().flatten() for i in layer]) for layer in layers],
        schedule_free=schedule_free,
        weight_decay=0.3,
        **TIGHT,
    )
    ref.shapes = [[weights[i].shape for i in layer] for layer in layers]
    for k in range(5):
        gradients = drawn(SHAPES, seed=k + 1)
        if k != 1:
            gradients[0][1, 2] = gradients[2][3, 1, 0, 0] = [math.nan, 0.0, math.inf, -math.inf, math.nan][k]
        if k == 3:
            gradients[1].fill_(math.nan)
            gradients[3].fill_(math.inf)
        before = weights[0].detach().clone()
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g.clone()
        opt.step()
        ref.step(
            lambda layers: sum(v.sum() for v in layers),
            gradient=[torch.cat([gradients[i].flatten() for i in layer]) for layer in layers],
        )
        moved = weights[0].detach() != before
        assert moved.sum() == (12 if k == 1 else 11) and moved[1, 2] == (k == 1)
        for layer, theirs, momentum in zip(layers, ref.W, ref.m, strict=True):
            mine = torch.cat([weights[i].detach().flatten() for i in layer])
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
            mine = torch.cat([opt.state[weights[i]]["momentum_buffer"].flatten() for i in layer])
            torch.testing.assert_close(mine, momentum, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_step_of_float32_rounded(dtype):
    found = []
    for one in (dtype, torch.float32):
        weights = [w.to(dtype).to(one).requires_grad_() for w in drawn(SHAPES)]
        opt = MuonLW(weights, schedule_free=False, **FIXED)
        for w, g in zip(weights, drawn(SHAPES, seed=1), strict=True):
            w.grad = g.to(dtype).to(one)
        opt.step()
        found.append([w.detach().to(dtype) for w in weights])
        assert all(state["momentum_buffer"].dtype == torch.float32 for state in opt.state.values())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@MODES
def test_state_and_what_is_no_state_of_its_own(schedule_free):
    data, saved = batches(2), {}
    for kind, cls in ALL.items():
        opt = cls(small_net().named_parameters(), schedule_free=schedule_free)
        saved[kind, "new"] = copy.deepcopy(opt.state_dict())
        model = small_net()
        opt = cls(model.named_parameters(), schedule_free=schedule_free)
        train(opt, model, data)
        saved[kind, "trained"] = opt.state_dict()
    buffers = {"offset", "momentum_buffer"} if schedule_free else {"momentum_buffer"}
    for entry in saved["muon", "trained"]["state"].values():
        assert {*entry} == {"step", "layer", "mean_square", *buffers} and entry["mean_square"].shape == ()
    for kind in OPTIMIZERS:
        for mine, other, age in (
            (*pair, age) for pair in (("muon", kind), (kind, "muon")) for age in ("new", "trained")
        ):
            opt = ALL[mine](small_net().named_parameters(), schedule_free=schedule_free)
            before = str(opt.state_dict())
            with pytest.raises(ValueError, match=f"not of {opt.rule.name}"):
                opt.load_state_dict(saved[other, age])
            assert str(opt.state_dict()) == before


@MODES
def test_there_is_no_compiled_update(schedule_free):
    w = torch.ones(2, 2, requires_grad=True)
    w.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="there is no compiled update for MuonLW"):
        MuonLW([w], schedule_free=schedule_free, fused=True)
    opt = MuonLW([w], schedule_free=schedule_free)
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match="there is none for MuonLW"):
        opt.step()
    assert (w == 1).all()
    MuonLW([w], schedule_free=schedule_free, fused=False).step()
    assert (w != 1).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [("betas", (0.9, 1.0)), ("betas", (-0.1, 0.5)), ("betas", 0.9), ("weight_decay", -1.0), ("lr", -1.0), ("cap", 0)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"^{option}="):
        MuonLW(small_net().named_parameters(), **{option: value})


def test_it_has_no_options_of_others():
    for option in ("momentum", "eps", "nesterov", "ns_steps"):
        with pytest.raises(TypeError, match=f"no keyword '{option}'"):
            MuonLW(small_net().named_parameters(), **{option: 0.5})


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_persistence_is_what_averaging_leaves_of_gradients_that_have_nothing_in_common(beta):
    made = torch.Generator().manual_seed(0)
    momentum = torch.zeros(20000)
    for _ in range(100):
        gradient = torch.randn(20000, generator=made)
        momentum = beta * momentum + (1 - beta) * gradient
    ahead = beta * momentum + (1 - beta) * gradient
    assert MuonLW.rule.persistence({"betas": (0.9, beta)}) == pytest.approx(ahead.std().item(), rel=0.02)


@MODES
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_measured_rates_are_multiplied_by_it_and_others_are_not(schedule_free, beta):
    w = torch.ones(3, 3, requires_grad=True)
    opt = MuonLW([w], betas=(0.75, beta), cap=math.inf, warmup_steps=1, warmup_rate=1e-4, schedule_free=schedule_free)
    applied = []
    for _ in range(2):
        opt.zero_grad()
        opt.backward((w**4).sum() + w.sum())
        opt.step()
        applied.append(opt.diagnostics()["param0"]["applied"])
    longer = 1 / math.sqrt(1 - 0.75 + 0.75 / 2) if schedule_free else 1.0
    factor = opt.rule.persistence(opt.param_groups[0])
    assert applied == pytest.approx([1e-4, opt.rates()["param0"] * factor * longer], rel=1e-5)


@MODES
def test_steps_shrink_with_the_gradient_and_not_with_the_scale_of_the_loss(schedule_free):
    moves = []
    for gradients in ([1.0, 1.0, 1e-3], [8.0, 8.0, 8e-3], [1.0, 1.0, 1.0]):
        w = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        opt = MuonLW([w], schedule_free=schedule_free, weight_decay=0.0, warmup_steps=9, betas=(0.0, 0.0), cap=math.inf)
        pattern = torch.arange(12, dtype=torch.float64).view(3, 4).cos()
        for size in gradients:
            w.grad, before = size * pattern, w.detach().clone()
            opt.step()
        moves.append((w.detach() - before).norm())
    assert moves[0] == moves[1] > 0  # a factor of 8 rounds nothing
    expected = 1e-3 / math.sqrt((0.01 * (1e-6 + 0.99 + 0.99**2)) / (1 - 0.99**3))
    assert moves[0] / moves[2] == pytest.approx(expected, rel=1e-6)


def test_a_step_that_is_skipped_leaves_the_mean_square_alone():
    w = torch.ones(3, 4, requires_grad=True)
    opt = MuonLW([w], warmup_steps=9)
    w.grad = torch.ones(3, 4)
    opt.step()
    before = opt.state[w]["mean_square"].clone()
    w.grad = torch.full((3, 4), math.nan)
    opt.step()
    assert opt.state[w]["mean_square"] == before > 0
    w.grad[0] = 1e3
    opt.step()
    assert before < opt.state[w]["mean_square"] < math.inf


def test_a_saved_mean_square_is_checked():
    w = torch.ones(3, 4, requires_grad=True)
    opt = MuonLW([w])
    w.grad = torch.ones(3, 4)
    opt.step()
    for bad in (torch.tensor(math.nan), torch.tensor(-1.0), torch.ones(3, 4), None):
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0]["mean_square"] = bad
        if bad is None:
            del saved["state"][0]["mean_square"]
        with pytest.raises(ValueError, match="mean_square"):
            opt.load_state_dict(saved)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_small_gradients_do_not_step_further_where_denormal_numbers_are_flushed():
    def move(size: float) -> float:
        w = torch.ones(3, 4, requires_grad=True)
        opt = MuonLW([w], weight_decay=0.0, warmup_steps=9, cap=math.inf)
        w.grad = torch.full((3, 4), size)
        opt.step()
        return (w.detach() - 1).norm().item()

    usual = move(1.0)
    assert usual > 0 and torch.set_flush_denormal(True)
    try:
        assert all(move(10.0**-k) <= 1.001 * usual for k in range(15, 38))
        assert move(1e-15) == pytest.approx(usual, rel=1e-3)
    finally:
        torch.set_flush_denormal(False)


def test_memory_that_runs_out_leaves_the_state_as_it_was(monkeypatch):
    w = torch.ones(3, 4, requires_grad=True)
    opt = MuonLW([w])
    w.grad = torch.ones(3, 4)
    opt.step()
    before = copy.deepcopy(opt.state_dict()["state"])

    def out_of_memory(tensors):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("lwas_fast.muon.orthogonalized", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    after = opt.state_dict()["state"]
    for name in ("offset", "momentum_buffer", "mean_square"):
        assert torch.equal(before[0][name], after[0][name])


def test_a_model_that_is_cast_takes_the_mean_square_along():
    model = small_net(torch.float32)
    opt = MuonLW(model.named_parameters())
    train(opt, model, batches(2, torch.float32))
    model.double()
    train(opt, model, batches(2))
    assert all(state["mean_square"].dtype == torch.float64 for state in opt.state.values())
