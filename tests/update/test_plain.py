"""The update in plain torch: what it costs, and what its shortcuts on a CPU must not change.

Catches: work that is done tensor by tensor in Python, at every step, in the compiled update's preparation too; a state
that somebody replaced and that is remembered all the same; gradients of the user's that are written to; elements that
the norm of a whole gradient hides.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ALL, NO_COMPILED_STEP, OPTIMIZERS
from torch.utils._python_dispatch import TorchDispatchMode

from lwas_fast import SGDLW, rule
from lwas_fast.selection import BLOCK, FEW

EACH = pytest.mark.parametrize("kind", ALL)
ELEMENTWISE = pytest.mark.parametrize("kind", OPTIMIZERS)  # without products of matrices
MODES = pytest.mark.parametrize("schedule_free", [True, False])
FIXED = {"update_every": 10**9, "warmup_steps": 10**9}


def with_gradients(shapes: list) -> list[torch.Tensor]:
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@ELEMENTWISE
@MODES
@pytest.mark.parametrize(("shape", "each"), [((FEW + 1,), 0), ((3,), 3)])  # flattened for three norms at most
def test_calls_do_not_grow_with_the_tensors(kind, schedule_free, shape, each):
    found = []
    for count in (2, 5):
        opt = ALL[kind](with_gradients([shape] * count), schedule_free=schedule_free, foreach=True, **FIXED)
        for _ in range(2):
            opt.step()
        with Count() as counted:
            opt.step()
        found.append(counted.calls)
    assert found[1] - found[0] <= 3 * each
    assert found[0] < 60


@EACH
@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_states_are_not_looked_up_one_by_one(kind, options, monkeypatch):
    params, hashed = with_gradients([(3,)] * 50), []
    opt = ALL[kind](params, **options, **FIXED)
    for _ in range(2):
        opt.step()
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda p: hashed.append(p) or id(p))
    opt.step()
    assert len(hashed) < 10


@EACH
@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_a_state_that_somebody_replaces_is_the_one_that_steps(kind, options):
    params = with_gradients([(3,), (4,)])
    opt = ALL[kind](params, **options, **FIXED)
    for _ in range(2):
        opt.step()
    name = opt.rule.buffers(opt.param_groups[0])[0]
    replaced = opt.state[params[0]] = copy.deepcopy(opt.state[params[0]])
    opt.state[params[1]].clear()  # starts anew
    before = replaced[name].clone()
    opt.step()
    assert opt.state[params[0]] is replaced
    assert not torch.equal(replaced[name], before)
    assert [opt.state[p]["step"].item() for p in params] == [3, 1]
    opt.state.clear()
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [1, 1]


@EACH
@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_a_state_in_the_place_of_another_steps_from_its_own_numbers(kind, options):
    """Its buffers and its count: as after loading both, which lays all out anew."""
    found = []
    for loads in (False, True):
        torch.manual_seed(0)
        params = with_gradients([(3,), (4,)])
        opt = ALL[kind](params, schedule_free=False, **options, **FIXED)
        for _ in range(2):
            opt.step()
        changed = copy.deepcopy(opt.state[params[0]])
        changed["step"].fill_(40.0)
        changed[opt.rule.buffers(opt.param_groups[0])[0]].fill_(0.5)
        opt.state[params[0]] = changed
        if loads:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
        assert [opt.state[p]["step"].item() for p in params] == [41, 3]
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@NO_COMPILED_STEP
@EACH
@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_under_torch_compile(kind, options):
    found = []
    for compile in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        torch.manual_seed(0)
        params = with_gradients([(3,), (FEW + 1,)])
        step = compile(ALL[kind](params, **options, **FIXED).step)
        for _ in range(3):
            step()
        found.append(params)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@MODES
def test_gradients_stay_as_they_are(schedule_free):
    (p,) = with_gradients([(5,)])
    before = p.grad.clone()
    SGDLW([p], weight_decay=0.1, schedule_free=schedule_free, foreach=True, **FIXED).step()
    assert torch.equal(p.grad, before)


@EACH
@MODES
def test_tensors_that_have_had_other_numbers_of_steps(kind, schedule_free):
    """In one list, and each by itself."""
    shapes, together, alone = [(5,), (FEW + 1,), (2, 3)], [], []
    params = with_gradients(shapes)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    for found, lists in ((together, [[0, 1, 2]]), (alone, [[0], [1], [2]])):
        for members in lists:
            own = [params[i].detach().clone().requires_grad_() for i in members]
            opt = ALL[kind](own, schedule_free=schedule_free, foreach=True, **FIXED)
            for k in range(4):
                for i, p in zip(members, own, strict=True):
                    p.grad = gradients[k][i] if k != i else None
                opt.step()
            found += own
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@EACH
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_masks_as_on_other_devices(kind, schedule_free, dtype, monkeypatch):
    """Whether all elements take part is known on a CPU only; elsewhere each is masked, to the same effect."""
    found, params = [], [p.to(dtype) for p in with_gradients([(5,), (FEW + 1,), (2, 3), (0,)])]
    gradients = [[torch.randn_like(p) for p in params] for _ in range(3)]
    for known in (True, False):
        if not known:
            monkeypatch.setattr(rule, "_squares_if_all_finite", lambda *_: None)
        own = [p.detach().clone().requires_grad_() for p in params]
        opt = ALL[kind](own, schedule_free=schedule_free, weight_decay=0.1, foreach=True, **FIXED)
        for of_step in gradients:
            for p, g in zip(own, of_step, strict=True):
                p.grad = g.clone()
            opt.step()
        found.append([*own, *(value for p in own for value in opt.state[p].values())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@EACH
@pytest.mark.parametrize(("size", "moves"), [(1.8e19, True), (1.9e19, False)])  # 1.845e19 is the root of the largest
def test_squares_just_below_and_above_overflow(kind, size, moves):
    p = torch.ones(3).requires_grad_()
    opt = ALL[kind]([p], foreach=True, **FIXED)
    p.grad = torch.tensor([size, 0.0, 0.0])
    opt.step()
    assert (p[0] != 1).item() is moves
    assert opt.diagnostics()["param0"]["skipped"] == (not moves)


@pytest.mark.parametrize("sizes", [[0, 3, 0, 70, 1], [0], [0, BLOCK + 5, 0, *[1] * 99, BLOCK, 2], [FEW + 1, 0]])
def test_norms_of_tensors_strung_together(sizes):
    params = [torch.randn(n, 1).t() for n in sizes]
    selection = SGDLW(params)._layout.buckets[0].select(range(len(params)))
    expected = torch.stack([p.double().square().sum() for p in params]).float()
    torch.testing.assert_close(selection.squared_norms(params), expected, rtol=1e-5, atol=0)


@EACH
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_first_gradient_without_a_finite_element_is_no_step(kind, schedule_free, dtype):
    """No layer has taken a step then, and there is nothing to divide by."""
    p = torch.ones(2, dtype=dtype).requires_grad_()
    opt = ALL[kind]([p], schedule_free=schedule_free, foreach=True, **FIXED)
    p.grad = torch.full_like(p, torch.nan)
    opt.step()
    assert (p == 1).all()
    p.grad = torch.ones_like(p)
    opt.step()
    assert (p < 1).all()


@EACH
@pytest.mark.filterwarnings("error")
def test_norms_that_overflow_do_not_warn(kind):
    params = [torch.ones(2).requires_grad_() for _ in range(3)]
    opt = ALL[kind](params, foreach=True, **FIXED)
    for p in params:
        p.grad = torch.full_like(p, 1.5e19)
    opt.step()


@EACH
@MODES
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_what_a_scaler_sets(kind, schedule_free, found):
    """Scaled gradients take the step of unscaled ones, to the last bit, or none; rates fit what is left by clipping."""
    weights, tables = [], []
    for scaled in (False, True):
        torch.manual_seed(0)
        w = torch.randn(7, dtype=torch.float64, requires_grad=True)
        opt = ALL[kind]([w], schedule_free=schedule_free, update_every=1, foreach=True)
        for k in range(4):
            opt.zero_grad()
            opt.backward((w**4).sum() + w.sum())
            w.grad *= 0.125  # as clipping would
            if scaled and k > 0:
                w.grad *= 256
                opt.grad_scale = torch.tensor(256.0)
            if found is not None:
                opt.found_inf = torch.tensor(found if scaled and k == 3 else 0.0)
            before = w.detach().clone(), {name: value.clone() for name, value in opt.state[w].items()}
            opt.step()
        weights.append(w.detach())
        tables.append(opt.state[w])
    if found:
        assert torch.equal(weights[1], before[0])
        assert all(torch.equal(value, before[1][name]) for name, value in tables[1].items())
    else:
        assert torch.equal(*weights)
        assert all(torch.equal(value, tables[1][name]) for name, value in tables[0].items())
