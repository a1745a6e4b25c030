"""Saved states of other versions: they load by the names of their numbers, or are refused by name.

Catches: a row read by position, a counter or rate that changes its meaning between versions, an option that is dropped
without a word, an optimizer half loaded when a state does not fit; a measured rate that does not get into files.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cases import ALL, batches, loss_of, small_net
from torch_table import Problem, assert_equal

from lwas_fast.state import VERSION
from lwas_fast.table import Column

EACH = pytest.mark.parametrize("kind", ALL)
# Saved by the last commit before states had a version (bccd8d5), with what six further steps lead to since rates do not
# depend on the scale of the loss.
OLD = torch.load(Path(__file__).parent / "data" / "states_of_version_1.pt", weights_only=True)


def trained(kind, steps=8, **options):
    problem = Problem(torch.float32)
    opt = ALL[kind](problem.named, update_every=3, **options)
    problem.run(opt, range(steps))
    return problem, opt


@pytest.mark.parametrize("name", OLD)
def test_version_1_goes_on(name):
    """As it did then, but for rounding."""
    kind, old = name.split("-")[0], OLD[name]
    problem = Problem(torch.float32)
    opt = ALL[kind](problem.named, foreach=True)
    opt.load_state_dict(old["state"])
    with torch.no_grad():
        torch._foreach_copy_(problem.params, old["params"])
    problem.run(opt, range(8, 14))
    torch.testing.assert_close(list(problem.params), list(old["after"]), rtol=1e-5, atol=1e-6)
    for layer, row in opt.diagnostics().items():
        assert row == pytest.approx(old["diagnostics"][layer], rel=1e-3)
    assert "noise_exponent" not in opt.param_groups[0]


@EACH
def test_groups_say_what_their_state_is(kind):
    _, opt = trained(kind)
    (saved,) = opt.state_dict()["param_groups"]
    assert saved["state_version"] == VERSION
    assert saved["state_columns"] == [column.name.lower() for column in Column]


@EACH
def test_rows_go_by_name(kind):
    """Another order, a number this version does not know, one that it misses."""
    problem, opt = trained(kind)
    saved = copy.deepcopy(opt.state_dict())
    group = saved["param_groups"][0]
    order = [*reversed(Column)]
    order.remove(Column.CAPPED)
    group["state_columns"] = ["weather", *(column.name.lower() for column in order)]
    for entry in saved["state"].values():
        entry["layer"] = torch.cat([torch.tensor([7.0]), entry["layer"][order]])
    new_problem = Problem(torch.float32)
    new = ALL[kind](new_problem.named)
    new.load_state_dict(saved)
    expected = {name: {**row, "capped": 0} for name, row in opt.diagnostics().items()}
    assert new.diagnostics() == expected
    with torch.no_grad():
        torch._foreach_copy_(new_problem.params, problem.params)
    problem.run(opt, range(8, 14))
    new_problem.run(new, range(8, 14))
    assert_equal(problem.params, new_problem.params)


MISFITS = {
    "newer": (lambda s: s["param_groups"][0].update(state_version=VERSION + 1), f"version {VERSION + 1}.*newer"),
    "short row": (lambda s: s["state"][0].update(layer=torch.zeros(3)), r"saved layer of parameter 'a.weight'.*\(3,\)"),
    "no step": (lambda s: s["state"][1].pop("step"), "parameter 'a.bias' lacks 'step'"),
}


@pytest.mark.parametrize("name", MISFITS)
@EACH
def test_what_does_not_fit_changes_nothing(kind, name):
    spoil, words = MISFITS[name]
    _, opt = trained(kind)
    saved = copy.deepcopy(opt.state_dict())
    spoil(saved)
    problem, new = trained(kind, steps=4)
    before, params = copy.deepcopy(new.state_dict()), [p.detach().clone() for p in problem.params]
    with pytest.raises(ValueError, match=words):
        new.load_state_dict(saved)
    assert_equal(problem.params, params)
    assert new.diagnostics() and str(new.state_dict()) == str(before)


@EACH
def test_an_option_that_is_gone_is_told(kind):
    problem = Problem(torch.float32)
    opt = ALL[kind]([{"params": problem.named[:2]}, {"params": problem.named[2:]}])
    opt.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inner"])
    saved = opt.state_dict()
    saved["param_groups"][0] |= {"damping": 0.1, "max_growth": 10.0, "probe": "update"}
    saved["param_groups"][1] |= {"damping": 0.0}
    with pytest.warns(UserWarning, match="probe='update' .*damping=0.1 .* gone") as caught:
        opt.load_state_dict({"inner": saved})
    assert len(caught) == 1 and "max_growth" not in str(caught[0].message) and caught[0].filename == __file__


@pytest.mark.parametrize("follows", [True, False])
@EACH
def test_a_layer_that_is_measured_and_does_not_step_keeps_its_rate_in_files(kind, follows):
    """As one whose gradients are dropped before the step for some epochs, in place of freezing it."""

    def made():
        model = small_net(torch.float32)
        return model, ALL[kind](model if follows else model.named_parameters(), update_every=2)

    model, opt = made()
    for batch in batches(4, torch.float32):
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward() if follows else opt.backward(loss)
        for param in model[4].parameters():
            param.grad = None
        opt.step()
    other_model, other = made()
    other.load_state_dict(opt.state_dict())
    for found in (other, copy.deepcopy(opt)):
        assert found.rates() == opt.rates()
        assert found.diagnostics() == opt.diagnostics()
    assert opt.diagnostics()["4"]["refreshes"] == 2
