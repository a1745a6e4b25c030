"""Steps: what torch's test suite checks of its own optimizers, over its own form of table.

Catches: an option that breaks a plain descent; a step without gradients, with zero or empty ones that changes or breaks
something; memory layout, mixed dtypes or torch's default dtype changing the numbers; `lr` as a tensor or a scheduler
not doing what they do for torch's own optimizers; an error that is missing or of another kind than torch's.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import FEW, MODES
from torch import nn
from torch.nn import functional as F
from torch_table import EACH_INFO, INFOS, Problem, assert_equal, assert_equal_states, common, each_row

ERRORS = [(i, e) for i in INFOS.values() for e in i.optim_error_inputs_func("cpu", torch.float32)]
ERROR_IDS = [f"{i.name}-{e.optimizer_error_input.desc}" for i, e in ERRORS]


@pytest.mark.parametrize(("info", "case"), ERRORS, ids=ERROR_IDS)
def test_errors(info, case):
    given = case.optimizer_error_input
    with pytest.raises(case.error_type, match=case.error_regex):
        info.optim_cls(given.params, **given.kwargs)


def torchs_errors():
    """torch's own table; duplicates in one group are left out: ours are tied weights, which count once."""
    rows = common.get_error_inputs_for_all_optims("cpu", torch.float32)
    return [row for row in rows if row.error_type is not UserWarning]


@EACH_INFO
@pytest.mark.parametrize("case", torchs_errors(), ids=lambda case: case.optimizer_error_input.desc)
def test_torchs_own_table_of_errors(info, case):
    given = case.optimizer_error_input
    params = [nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
    # What an option may be is said in our words; all else is torch's own check.
    message = "^lr=" if given.params is None else case.error_regex
    with pytest.raises(case.error_type, match=message):
        info.optim_cls(params, **given.kwargs)


@each_row(*MODES, "maximize")
def test_goes_in_the_right_direction(info, row):
    problem = Problem()
    opt = info.optim_cls(problem.named, **row.kwargs)
    sign = -1 if row.kwargs.get("maximize") else 1

    def total():
        with torch.no_grad():
            return sign * sum(problem.loss(k).item() for k in range(16))

    before = total()
    problem.run(opt, range(40))
    assert total() < before


@each_row(*FEW, "momentum_decay", "weight_decay")
def test_maximizing_is_minimizing_the_negative(info, row):
    problem, negative = Problem(), Problem()
    negative.loss = lambda k: -Problem.loss(negative, k)
    flipped = {**row.kwargs, "maximize": not row.kwargs.get("maximize", False)}
    problem.run(info.optim_cls(problem.named, **row.kwargs), range(8))
    negative.run(info.optim_cls(negative.named, **flipped), range(8))
    assert_equal(problem.params, negative.params)


@each_row(*MODES)
def test_no_gradients_no_step(info, row):
    problem = Problem()
    opt = info.optim_cls(problem.named, **row.kwargs)
    before, saved = copy.deepcopy(problem.params), copy.deepcopy(opt.state_dict())
    assert opt.step() is None
    opt.zero_grad()
    opt.step()
    assert_equal(problem.params, before)
    assert_equal_states(opt.state_dict(), saved)
    assert not opt.state


@pytest.mark.filterwarnings("ignore:.*could not use three measurements")
@each_row(*FEW)
def test_zero_gradients_move_nothing(info, row):
    problem = Problem()
    opt = info.optim_cls(problem.named, **{**row.kwargs, "weight_decay": 0.0})
    before = copy.deepcopy(problem.params)
    for k in range(4):
        opt.zero_grad()
        opt.backward(problem.loss(k) * 0)
        opt.step()
    assert_equal(problem.params, before)
    assert all(
        s[name].count_nonzero() == 0 for s in opt.state.values() for name in opt.rule.buffers(opt.param_groups[0])
    )
    assert all(row["nonfinite"] == 0 for row in opt.diagnostics().values())
    opt.load_state_dict(opt.state_dict())
    problem.run(opt, range(20))
    assert all(torch.isfinite(p).all() for p in problem.params)
    assert all(row["refreshes"] >= 1 for row in opt.diagnostics().values())


@each_row(*FEW)
def test_empty_parameters(info, row):
    """Alone, in a layer with others, and in a layer of their own; the others go as if they were not there."""
    problem, other = Problem(), Problem()
    empties = [("a.extra", nn.Parameter(torch.empty(0, 3, dtype=torch.float64)))]
    empties.append(("c.weight", nn.Parameter(torch.empty(5, 0, dtype=torch.float64))))
    # Another number of layers draws other signs, so compare without them.
    exact = row.kwargs | {"curvature": row.kwargs.get("curvature", "blocks")}
    opt = info.optim_cls(problem.named, **exact)
    new = info.optim_cls([*other.named, *empties], **exact)
    other.loss = lambda k: Problem.loss(other, k) + sum(p.sin().sum() for _, p in empties)
    problem.run(opt, range(6))
    other.run(new, range(6))
    assert_equal(problem.params, other.params)
    assert all(math.isfinite(value) for row in new.diagnostics().values() for value in row.values())
    alone = info.optim_cls([empties[0][1]], **row.kwargs)
    for _ in range(2):
        alone.backward(empties[0][1].square().sum())
        alone.step()
        alone.zero_grad()
    assert all(math.isfinite(value) for row in alone.diagnostics().values() for value in row.values())


@EACH_INFO
def test_a_parameter_without_gradient_is_left_alone(info):
    problem = Problem()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = info.optim_cls([*problem.named, ("a.unused", unused)])
    problem.run(opt, range(4))
    assert torch.equal(unused.detach(), torch.ones(3, dtype=torch.float64))
    assert unused not in opt.state
    assert all(opt.state[p] for p in problem.params)


@each_row(*FEW, "tight_cap")
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
def test_memory_layout_changes_nothing(info, row, layout):
    def run(lay_out):
        made = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 3, 2, 2, generator=made, dtype=torch.float64)
        x = torch.randn(8, 3, 5, 5, generator=made, dtype=torch.float64)
        param = nn.Parameter(lay_out(weight))
        opt = info.optim_cls([param], **row.kwargs)
        for k in range(6):
            opt.zero_grad()
            opt.backward(F.conv2d(x, param.contiguous()).tanh().add(k * 0.1).square().mean())
            opt.step()
        return param

    layouts = {
        "transposed": lambda w: w.transpose(0, 3).contiguous().transpose(0, 3),
        "channels_last": lambda w: w.to(memory_format=torch.channels_last),
        "strided": lambda w: torch.stack([w, torch.zeros_like(w)], -1)[..., 0],
    }
    found = run(layouts[layout])
    assert not found.is_contiguous()
    # Sums over a layer run in another order: equal up to rounding.
    torch.testing.assert_close(found.detach(), run(torch.Tensor.contiguous).detach(), rtol=1e-10, atol=1e-12)


@each_row(*MODES, "tight_cap")
@pytest.mark.parametrize("rule", [None, lambda name: "all"], ids=["layers", "one layer"])
def test_mixed_dtypes_in_one_group(info, row, rule):
    """Every parameter and state keeps its dtype, and every one moves."""
    dtypes = {"a.weight": torch.float32, "a.bias": torch.bfloat16, "b.weight": torch.float64, "b.bias": torch.float16}
    problem = Problem()
    problem.named = [(name, nn.Parameter(p.detach().to(dtypes[name]))) for name, p in problem.named]
    start = [p.detach().clone() for p in problem.params]
    opt = info.optim_cls(problem.named, layers=rule, **row.kwargs)
    for k in range(8):
        opt.zero_grad()
        w, b, v, c = (p.double() for p in problem.params)
        opt.backward((v.mv(torch.tanh(w.mv(problem.x[k]) + b)) + c).square().sum())
        opt.step()
    for p, dtype, old in zip(problem.params, dtypes.values(), start, strict=True):
        assert p.dtype == dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        assert all(opt.state[p][name].dtype == wide for name in opt.rule.buffers(opt.param_groups[0]))
        assert not torch.equal(p, old)


@each_row(*FEW, "tensor_lr")
def test_torchs_default_dtype_changes_nothing(info, row):
    def run():
        problem = Problem(torch.float32)
        opt = info.optim_cls(problem.named, **row.kwargs)
        problem.run(opt, range(6))
        return problem.params, opt.state_dict()

    params, state = run()
    torch.set_default_dtype(torch.float64)
    try:
        other, other_state = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(params, other)
    assert_equal_states(state, other_state)


@EACH_INFO
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(info, shape):
    """It acts as the number does, and may be changed in place, as a compiled training loop would."""
    found = []
    for lr in (0.5, torch.full(shape, 0.5)):
        problem = Problem()
        opt = info.optim_cls(problem.named, lr=lr)
        problem.run(opt, range(5))
        if isinstance(lr, torch.Tensor):
            assert opt.param_groups[0]["lr"] is lr
            lr.fill_(0.125)
        else:
            opt.param_groups[0]["lr"] = 0.125
        problem.run(opt, range(5, 10))
        found.append(problem.params)
    assert_equal(*found)
