"""Ten steps with each optimizer of an installed lwas_fast: what a wheel must be able to do. Run by `.ci/package`."""

import sys
from pathlib import Path

import torch
from torch import nn

import lwas_fast
import lwas_fast.triton_kernels

for module in (lwas_fast, lwas_fast.triton_kernels):
    assert Path(str(module.__file__)).is_relative_to(sys.prefix), f"{module.__file__} is not what was installed"

torch.manual_seed(0)
x = torch.randn(256, 20)
y = (x.sum(1) > 0).long()
for kind in (lwas_fast.AdamWLW, lwas_fast.SGDLW):
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    opt = kind(model.named_parameters(), ramp_steps=0)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        opt.backward(losses[-1])
        opt.step()
    assert losses[-1] < losses[0], losses
    print(f"{kind.__name__}: loss {losses[0]:.3f} to {losses[-1]:.3f} in ten steps")
