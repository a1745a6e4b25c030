"""Saved states that do not belong to the optimizer, or are not whole: refused by name, and nothing has changed.

Catches: a state of torch's optimizers or of the other one here that loads without a word, one cut short or damaged that
fails or misleads many steps later, a refused one that is half loaded.
"""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from cases import OPTIMIZERS, batches, small_net, usual
from torch import nn
from trust.resume_cases import KINDS, MODES, Run, same

from lwas_fast.state import VERSION


def group(**values):
    return lambda saved: saved["param_groups"][0].update(values)


def without(*names):
    return lambda saved: [saved["param_groups"][0].pop(name) for name in names]


def entry(name, change):
    """Change a tensor of the second parameter's state (a bias of 5)."""
    return lambda saved: saved["state"][1].update({name: change(saved["state"][1].get(name))})


def of_each(spoil):
    """Of whichever buffer the state has."""

    def spoil_buffers(saved):
        for name, value in saved["state"][1].items():
            if name not in ("step", "layer", "rounded_at", "rounded_to"):
                saved["state"][1][name] = spoil(value)

    return spoil_buffers


def put(value):
    """Write a number into one element."""
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor(2), value)


# What was done to a state -> how, and what the message says.
MISFITS = {
    "newer version": (group(state_version=VERSION + 1), f"version {VERSION + 1}, .* up to {VERSION}.*newer lwas_fast"),
    "version is a word": (group(state_version="new"), "version new"),
    **{f"no {name}": (without(name), f"group 0 of the saved state lacks '{name}'.*another checkpoint")
       for name in ("steps", "next_refresh")},
    "lr is NaN": (group(lr=float("nan")), "lr=nan in parameter group 0 of the saved state is not valid"),
    "cap is a word": (group(cap="wide"), "cap='wide' in parameter group 0 of the saved state is not valid"),
    "no columns": (without("state_columns"), "layer of parameter .* has shape .*must have"),
    "no layer names": (without("layer_names"), "is not of .*no layers.*Load the model's weights"),
    "too few layer names": (lambda s: s["param_groups"][0]["layer_names"].pop(), "5 layer_names, but must have 6"),
    "layer names are numbers": (group(layer_names=[0, 0, 2, 2, 4, 4]), "layer_names=.*must have a list of names"),
    "other layers": (group(layer_names=["0", "0", "2", "2", "2", "4"]), "other layers in group 0: layer '[24]'"),
    "steps below 0": (group(steps=-1), "steps=-1, but must have an integer"),
    "next refresh is None": (group(next_refresh=None), "next_refresh=None, but must have an integer"),
    "share of 2": (group(share=2.0), "share=2.0, but must have"),
    "train mode is a word": (group(train_mode="no"), "train_mode='no', but must have True or False"),
    "samples cut short": (group(samples="[[1.0, 2.0], [3."), "samples that cannot be read"),
    "samples not in pairs": (group(samples=[[1.0, 2.0, 3.0]]), "samples that cannot be read"),
    "a column twice": (group(state_columns=["rate"] * 16), "a column twice"),
    "another row length": (entry("layer", lambda row: row[:-1].clone()), r"layer .*\(15,\), but must have \(16,\)"),
    "step of shape 3": (entry("step", lambda step: step.repeat(3)), r"saved step .*\(3,\), but must have \(\)"),
    "step is a number": (entry("step", float), "saved step .* is float, but must be a tensor of floating-point"),
    "step below 0": (entry("step", torch.neg), "saved step .* count below 0"),
    "step of integers": (entry("step", torch.Tensor.int), "saved step .* is torch.int32, but must be"),
    "no step": (lambda s: s["state"][1].pop("step"), "of parameter .* lacks 'step'"),
    "no row": (lambda s: s["state"][1].pop("layer"), "of parameter .* lacks 'layer'"),
    "no buffer": (lambda s: s["state"][1].pop(list(s["state"][1])[1]), "of parameter .* lacks '"),
    "entry is a tensor": (lambda s: s["state"].update({1: torch.zeros(5)}), "of parameter .* lacks '"),
    "buffers of integers": (of_each(torch.Tensor.int), "is torch.int32, but must be a tensor of floating-point"),
    "complex buffers": (of_each(lambda t: t + 1j), "is torch.complex64, but must be"),
    "transposed": (lambda s: s["state"].update({0: {k: v.mT if v.dim() == 2 else v for k, v in s["state"][0].items()}}),
                   r"has shape \(3, 5\), but must have \(5, 3\)"),
    "flat": (of_each(lambda t: t[None]), r"has shape \(1, 5\), but must have \(5,\)"),
    "NaN in buffers": (of_each(put(torch.nan)), "not finite.*spoil the weights: load an earlier checkpoint"),
    "infinity in buffers": (of_each(put(-torch.inf)), "not finite.*load an earlier checkpoint"),
    "NaN in rate": (entry("layer", lambda row: row.clone().fill_(torch.nan)), "saved layer .* not finite"),
    "rounded_at without values": (
        lambda s: (s["state"][1].update(rounded_at=torch.tensor([1])), s["state"][1].pop("rounded_to", 0)),
        "lacks 'rounded_to'",
    ),
    "more places than values": (
        lambda s: s["state"][1].update(rounded_at=torch.tensor([1, 2]), rounded_to=torch.zeros(1)),
        r"saved rounded_to .*has shape \(1,\), but must have \(2,\)",
    ),
    "rounded_at outside": (lambda s: s["state"][1].update(rounded_at=torch.tensor([5]), rounded_to=torch.zeros(1)),
                           "rounded_at .* places outside"),
    "rounded_at of floats": (lambda s: s["state"][1].update(rounded_at=torch.zeros(1), rounded_to=torch.zeros(1)),
                             "saved rounded_at .* is torch.float32, but must be a tensor of integers"),
    "a group too many": (lambda s: s["param_groups"].append(s["param_groups"][0]), "number of parameter groups"),
    "a parameter too few": (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "no groups": (lambda s: s.pop("param_groups"), "no optimizer's state.*'state' and 'param_groups'"),
    "state is a list": (lambda s: s.update(state=[]), "no optimizer's state"),
}  # fmt: skip


def fingerprint(run):
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.opt.param_groups]
    tensors = [p.detach().clone() for p in run.model.parameters()]
    tensors += [v.clone() for p in run.model.parameters() for v in run.opt.state[p].values()]
    now = run.opt._now
    return (
        repr((groups, run.opt.rates(), run.opt.defaults, now.micro_batches, now.loading)),
        tensors,
        len(run.opt.state),
    )


def unchanged(one, two):
    alike = one[0] == two[0] and one[2] == two[2] and len(one[1]) == len(two[1])
    return alike and all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def refused(opt, state, words):
    try:
        opt.load_state_dict(state)
    except ValueError as error:
        return re.search(words, str(error)) or f"says: {error}"
    return "was loaded"


@pytest.mark.parametrize("follows", (True, False))
@pytest.mark.parametrize("free", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_misfits_change_nothing(kind, free, follows, tally):
    """Not even between a measurement and its step; and afterwards the run goes on as one that was never asked."""
    run, twin = (Run(kind, torch.float32, follows, {"schedule_free": free, "update_every": 1}) for _ in range(2))
    for each in (run, twin):
        each.train(0, 20)
        each.opt.zero_grad()
        each.loss(20).backward() if follows else each.opt.backward(each.loss(20))
        assert each.opt._now.measured is not None
    whole = copy.deepcopy(run.opt.state_dict())
    before = fingerprint(run)
    with tally("misfit states refused by name, nothing changed") as row:
        for name, (spoil, words) in MISFITS.items():
            state = copy.deepcopy(whole)
            spoil(state)
            found = refused(run.opt, state, words)
            row.held(isinstance(found, re.Match) and unchanged(before, fingerprint(run)), f"{kind}: {name}: {found}")
        for each in (run, twin):
            each.opt.step()
            each.train(21, 35)
        row.held(same(run, twin), f"{kind}: goes on as before")


def torchs():
    """torch's optimizers that a script may have used before."""
    yield "Adam or AdamW", lambda params: torch.optim.AdamW(params, lr=1e-3)
    yield "Adam or AdamW", lambda params: torch.optim.Adam(params, lr=1e-3)
    yield "SGD", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
    yield "", lambda params: torch.optim.SGD(params, lr=0.1)
    yield "RMSprop", lambda params: torch.optim.RMSprop(params)
    yield "Adagrad", lambda params: torch.optim.Adagrad(params)


def others(kind, free):
    """States that are whole, of other optimizers and models: (what, state, words of the message)."""
    for torchs_name, make in torchs():
        model = small_net(torch.float32)
        opt = make(model.parameters())
        for batch in batches(3, torch.float32):
            opt.step(usual(opt, model, batch))
        known = f"torch's {torchs_name}.*" if torchs_name else ""
        yield type(opt).__name__, opt.state_dict(), f"not of .*LW: its groups have no layers.*{known}Load the model's"
    (other,) = set(KINDS) - {kind}
    run = Run(other, torch.float32, False, {"schedule_free": free})
    run.train(0, 12)
    own = {"sgd": "momentum", "adamw": "betas"}[kind]
    yield other, run.opt.state_dict(), f"not of {OPTIMIZERS[kind].__name__}: its groups have no {own}"
    for what, net, words in (
        ("wider", nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), "has shape"),
        ("deeper", nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)]), "match the size"),
        ("shallower", nn.Sequential(nn.Linear(3, 3)), "match the size"),
    ):
        opt = OPTIMIZERS[kind](net.named_parameters(), schedule_free=free)
        opt.backward(net(torch.randn(8, 3)).square().mean())
        opt.step()
        yield what, opt.state_dict(), words
    yield "the model's", small_net(torch.float32).state_dict(), "no optimizer's state"
    yield "a checkpoint", {"model": {}, "optimizer": run.opt.state_dict()}, "no optimizer's state"


@pytest.mark.parametrize(("kind", "free"), [*itertools.product(KINDS, MODES)])
def test_other_optimizers_and_models(kind, free, tally):
    run = Run(kind, torch.float32, True, {"schedule_free": free})
    run.train(0, 12)
    before = fingerprint(run)
    with tally("states of other optimizers and models refused by name, nothing changed") as row:
        for what, state, words in others(kind, free):
            found = refused(run.opt, state, words)
            row.held(isinstance(found, re.Match) and unchanged(before, fingerprint(run)), f"{kind}: {what}: {found}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_loads(kind, tally):
    """The checks refuse nothing that is whole: frozen parameters, an infinite norm, a group of a user's own keys."""
    with tally("whole states load") as row:
        for free, dtype in itertools.product(MODES, (torch.float32, torch.bfloat16, torch.float64)):
            run = Run(kind, dtype, False, {"schedule_free": free})
            run.model[0].bias.requires_grad_(False)
            run.train(0, 12)
            run.opt.param_groups[0]["name"] = "mine"
            state = copy.deepcopy(run.opt.state_dict())
            state["state"][0]["layer"][-4] = torch.inf  # length of directions that overflowed
            new = Run(kind, dtype, False, {"schedule_free": free})
            new.opt.load_state_dict(state)
            row.held(new.opt.param_groups[0]["name"] == "mine", f"{kind}, {free}, {dtype}")


def trained(kind, seed, dtype=torch.float32, follows=False):
    run = Run(kind, dtype, follows, {}, seed)
    run.train(0, 20)
    return run


@pytest.mark.parametrize("follows", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_run_is_told(kind, follows, tally):
    """Shapes cannot tell these apart; the weights that are saved with the state can, whatever is loaded first."""
    one, two = trained(kind, 0, follows=follows), trained(kind, 1, follows=follows)
    with tally("the model of another run is told, and the average starts anew") as row:
        for model_first in (True, False):
            new = Run(kind, torch.float32, follows, {})
            loads = [lambda: new.model.load_state_dict(two.model.state_dict()),  # noqa: B023
                     lambda: new.opt.load_state_dict(copy.deepcopy(one.opt.state_dict()))]  # fmt: skip  # noqa: B023
            for load in loads if model_first else loads[::-1]:
                load()
            with pytest.warns(UserWarning, match="not those that the loaded state .* average starts anew") as caught:
                new.train(20, 23)
            row.held(len(caught) == 1, f"{kind}, model first: {model_first}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_not_trained_on(kind, tally):
    """The model was saved after `eval`, the optimizer before it: whatever is loaded first, nothing trains on that."""
    run = trained(kind, 0)
    state = copy.deepcopy(run.opt.state_dict())
    run.opt.eval()
    average = copy.deepcopy(run.model.state_dict())
    run.opt.train()
    run.train(20, 30)
    with tally("an average that was loaded is recognised, whatever was loaded first") as row:
        for model_first in (True, False):
            new = Run(kind, torch.float32, False, {})
            if model_first:
                new.model.load_state_dict(average)
            new.opt.load_state_dict(state)
            if not model_first:
                new.model.load_state_dict(average)
                with pytest.raises(RuntimeError, match="hold the average .* call opt.train"):
                    new.train(20, 21)
                new.opt.train()
            new.train(20, 30)
            close = [torch.allclose(p, q, atol=1e-5) for p, q in zip(new.bits(), run.bits(), strict=True)]
            row.held(all(close), f"{kind}, model first: {model_first}")
