"""State, hooks and copies: what torch's test suite checks of its own optimizers, over its own form of table.

Catches: a state_dict that aliases the optimizer it came from, or that changes on its way through a file;
hyperparameters that are not restored, or that an older file's lack of them breaks; hooks that are not called, in the
wrong order, or whose answer is not used; attributes lost in a copy; names lost.

`step` was always a tensor here, so torch's check that old files with a number load has nothing to check.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import MODES
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_table import EACH_INFO, Problem, assert_equal, assert_equal_states, each_row

from lwas_fast.options import WHOLE


def groups_of(problem):
    """The layers as two groups, the second with options of its own."""
    return [{"params": problem.named[:2]}, {"params": problem.named[2:], "lr": 0.25, "update_every": 3}]


@each_row()
def test_state_dict_with_groups(info, row, tmp_path):
    """A copy goes on alike, from memory and from a file; the original does not notice; nor does the saved state."""
    problem = Problem()
    opt = info.optim_cls(groups_of(problem), **row.kwargs)
    problem.run(opt, range(5))
    saved = opt.state_dict()
    torch.save(saved, tmp_path / "saved.pt")
    frozen, other = copy.deepcopy(saved), copy.deepcopy(problem)
    weights = [p.detach().clone() for p in problem.params]
    whole = {name: value for name, value in row.kwargs.items() if name in WHOLE}
    new = info.optim_cls(groups_of(other), **whole)  # without the groups' options: they come with the state
    new.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert_equal_states(new.state_dict(), frozen)
    new.load_state_dict(saved)
    assert_equal_states(new.state_dict(), frozen)
    other.run(new, range(5, 10))
    assert_equal(problem.params, weights)
    assert_equal_states(opt.state_dict(), frozen)
    assert_equal_states(saved, frozen)
    problem.run(opt, range(5, 10))
    assert_equal(problem.params, other.params)
    assert_equal_states(opt.state_dict(), new.state_dict())


@EACH_INFO
def test_loading_adds_nothing_to_groups(info):
    problem = Problem()
    opt = info.optim_cls(problem.named)
    problem.run(opt, range(2))
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"][0].keys() == saved["param_groups"][0].keys()


@each_row(*MODES)
def test_older_states_load(info, row):
    """A file from before an option existed: the default is taken, whatever the new optimizer was given."""
    problem = Problem()
    opt = info.optim_cls(problem.named, **row.kwargs)
    problem.run(opt, range(3))
    later = [*info.not_og_supported_flags, "cap", "ramp_steps"]
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for name in later:
            del group[name]
    new = info.optim_cls(problem.named, **row.kwargs)
    new.load_state_dict(saved)
    for name in later:
        assert new.param_groups[0][name] == new.defaults[name]
    problem.run(new, range(3, 6))
    assert all(torch.isfinite(p).all() for p in problem.params)


@EACH_INFO
def test_load_state_dict_hooks(info):
    problem, seen = Problem(), []
    opt = info.optim_cls(problem.named)
    problem.run(opt, range(2))
    saved = opt.state_dict()

    def half_rate(_, state):
        seen.append("pre")
        return {**state, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]}

    new = info.optim_cls(problem.named)
    new.register_load_state_dict_pre_hook(half_rate)
    new.register_load_state_dict_pre_hook(lambda *_: seen.append("pre first"), prepend=True)
    new.register_load_state_dict_post_hook(lambda o: seen.append(("post", o.param_groups[0]["lr"])))
    new.register_load_state_dict_post_hook(lambda _: seen.append("post first"), prepend=True)
    new.load_state_dict(saved)
    assert seen == ["pre first", "pre", "post first", ("post", 0.5)]
    assert saved["param_groups"][0]["lr"] == 1.0
    new.load_state_dict(new.state_dict())  # our own check, a hook too, went with the first call
    assert new.param_groups[0]["lr"] == 0.25
    assert len(new._optimizer_load_state_dict_pre_hooks) == 2


@EACH_INFO
def test_a_load_hook_may_mend_what_does_not_fit(info):
    """What is checked is what will be loaded: after all hooks, not before."""
    problem, other = Problem(), Problem()
    opt, new = info.optim_cls(problem.named), info.optim_cls(other.named)
    problem.run(opt, range(2))
    broken = copy.deepcopy(opt.state_dict())
    names = broken["param_groups"][0].pop("layer_names")
    with pytest.raises(ValueError, match="no layers"):
        new.load_state_dict(broken)
    new.register_load_state_dict_pre_hook(lambda _, state: state["param_groups"][0].update(layer_names=names))
    new.load_state_dict(broken)
    assert_equal_states(new.state_dict(), opt.state_dict())


@EACH_INFO
def test_state_dict_hooks(info):
    problem, seen = Problem(), []
    opt = info.optim_cls(problem.named)
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre first"), prepend=True)
    opt.register_state_dict_post_hook(lambda _, state: {**state, "seen": list(seen)})
    opt.register_state_dict_post_hook(lambda *_: seen.append("post first"), prepend=True)
    assert opt.state_dict()["seen"] == ["pre first", "pre", "post first"]


@EACH_INFO
@pytest.mark.parametrize("closure", [False, True])
def test_step_hooks(info, closure):
    """Own and global ones, around every step, in torch's order; once a step, also when a refresh evaluates twice."""
    problem, seen = Problem(), []
    opt = info.optim_cls(problem.named, update_every=1)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        opt.register_step_pre_hook(lambda *_: seen.append("pre")),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        problem.run(opt, [1 if closure else 0])
        assert seen == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    problem.run(opt, [1 if closure else 0])
    assert len(seen) == 4


@EACH_INFO
def test_a_step_hook_may_replace_the_closure(info):
    problem, calls = Problem(), []
    opt = info.optim_cls(problem.named)

    def other():
        calls.append(None)
        opt.zero_grad()
        loss = problem.loss(0)
        loss.backward()
        return loss

    def refuse():
        raise AssertionError("the closure was to be replaced")

    opt.register_step_pre_hook(lambda _, args, kwargs: ((opt, other), {}))
    opt.step(refuse)
    assert len(calls) == 3  # the first measurement finds out whether it repeats


@EACH_INFO
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deep", "pickle"])
def test_copies_keep_all_attributes_and_go_on_alike(info, clone):
    problem = Problem()
    opt = info.optim_cls(problem.named, seed=7, hvp="autograd", curvature="blocks")
    problem.run(opt, range(3))
    other, new = clone((problem, opt))
    assert type(new) is type(opt)
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (opt, new)]
    assert public[0] == public[1]
    assert new._how == opt._how
    assert {k: v for k, v in new.defaults.items() if k != "differentiable"} == opt.defaults  # torch adds that one
    assert_equal_states(new.state_dict(), opt.state_dict())
    assert new.diagnostics() == opt.diagnostics()
    assert not {p.data_ptr() for p in new.param_groups[0]["params"]} & {p.data_ptr() for p in problem.params}
    problem.run(opt, range(3, 8))
    other.run(new, range(3, 8))
    assert_equal(problem.params, other.params)


@EACH_INFO
def test_names_are_saved_and_may_be_dropped(info):
    """Named and bare optimizers read each other's states where the layers are the same."""
    problem, other = Problem(), Problem()
    opt = info.optim_cls(problem.named, layers=lambda name: name)
    problem.run(opt, range(4))
    names = [name for name, _ in problem.named]
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    bare = info.optim_cls(other.params)
    bare.load_state_dict(opt.state_dict())
    other.run(bare, range(2))
    named = info.optim_cls(problem.named, layers=lambda name: name)
    named.load_state_dict(bare.state_dict())
    assert named.param_groups[0]["param_names"] == names
    assert list(named.rates()) == names


@EACH_INFO
def test_groups_added_late_are_saved_too(info):
    problem, other = Problem(), Problem()
    opt = info.optim_cls(problem.named[:2])
    problem.run(opt, range(4))
    opt.add_param_group({"params": problem.named[2:], "lr": 0.5})
    problem.run(opt, range(4, 8))
    new = info.optim_cls(groups_of(other))
    new.load_state_dict(opt.state_dict())
    assert [g["lr"] for g in new.param_groups] == [1.0, 0.5]
    for p, q in zip(problem.params, other.params, strict=True):
        q.data.copy_(p.data)
    problem.run(opt, range(8, 20))
    other.run(new, range(8, 20))
    assert_equal(problem.params, other.params)
