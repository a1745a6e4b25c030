"""Followed models that are compiled, or partly, or beside compiled code.

Catches: a measurement or a mode that compiled code hides; code that stays uncompiled afterwards.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from follow_cases import EACH, STEPS, followed
from torch import nn
from torch.nn import functional as F


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net(torch.float32)

    def forward(self, x):
        return self.net(x) * 1.0


@EACH
@pytest.mark.parametrize("told", [True, False], ids=["given compiled", "compiled later"])
@pytest.mark.parametrize("make", [lambda: small_net(torch.float32), Compiled], ids=["sequential", "module"])
def test_a_compiled_model_is_measured_and_evaluated_with_the_average(kind, told, make):
    """Compiled code calls no hooks. Steps that measure run the model as it is."""
    torch.manual_seed(0)
    model = make()
    compiled = torch.compile(model, backend="aot_eager")
    opt = OPTIMIZERS[kind](compiled if told else model)
    data = batches(STEPS, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = []
        for k, (x, y) in enumerate(data):
            out = compiled(x)
            names.append(out.grad_fn.name())
            F.cross_entropy(out, y).backward()
            opt.step()
            opt.zero_grad()
            if k == 12:
                compiled.eval()
                with torch.no_grad():
                    found = compiled(x)
                with opt.averaged():
                    assert torch.equal(found, model(x).detach())
                compiled.train()
    assert all(row["refreshes"] >= 2 for row in opt.diagnostics().values())
    assert names.count("CompiledFunctionBackward") >= STEPS - 4
    torch.testing.assert_close(
        compiled.state_dict()["_orig_mod." + next(iter(model.state_dict()))].shape, next(model.parameters()).shape
    )
    with torch.compiler.set_stance("default"):
        assert compiled(data[0][0]).grad_fn.name() == "CompiledFunctionBackward"
    opt.unfollow()
    assert "train" not in model.__dict__
    assert compiled(data[0][0]).grad_fn.name() == "CompiledFunctionBackward"


@EACH
def test_two_compiled_models_leave_compiling_on(kind):
    models = [small_net(torch.float32), small_net(torch.float32, seed=1)]
    compiled = [torch.compile(model, backend="aot_eager") for model in models]
    opts = [OPTIMIZERS[kind](model, update_every=4) for model in compiled]
    for batch in batches(9, torch.float32):
        for model in compiled:
            loss_of(model, batch).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert all(row["refreshes"] == 3 for opt in opts for row in opt.diagnostics().values())
    for opt in opts:
        opt.unfollow()
    assert compiled[0](batch[0]).grad_fn.name() == "CompiledFunctionBackward"


@EACH
@pytest.mark.parametrize("what", ["criterion", "part"])
def test_compiled_parts_and_losses(kind, what):
    model = nn.Sequential(small_net(torch.float32))
    criterion = F.cross_entropy
    if what == "criterion":
        criterion = torch.compile(lambda out, y: F.cross_entropy(out, y), backend="aot_eager", fullgraph=True)
    else:
        model[0].compile(backend="aot_eager")
    opt = OPTIMIZERS[kind](model)
    for x, y in batches(12, torch.float32):
        criterion(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert all(row["refreshes"] == 2 for row in opt.diagnostics().values())


@EACH
def test_steps_without_the_model_leave_compiling_on(kind):
    model, opt = followed(kind)
    function = torch.compile(lambda x: x.sin(), backend="aot_eager")
    x = torch.ones(2, requires_grad=True)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    assert function(x).grad_fn.name() == "CompiledFunctionBackward"


@EACH
def test_an_evaluation_function_under_no_grad_of_a_compiled_model(kind):
    """As nanoGPT's: mode and evaluation without gradients, then the next step."""
    model = small_net(torch.float32)
    compiled = torch.compile(model, backend="eager")
    opt = OPTIMIZERS[kind](compiled, update_every=50)
    for k, batch in enumerate(batches(12, torch.float32)):
        loss = loss_of(compiled, batch)
        assert opt._now.following.trained
        loss.backward()
        opt.step()
        opt.zero_grad()
        if k % 3 == 2:
            with torch.no_grad():
                compiled.eval()
                compiled(batch[0])
                compiled.train()
