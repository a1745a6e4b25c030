"""A compiled module: autograd cannot measure it, finite differences can.

Catches: a message that does not name the way out; the way out not working.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import batches, loss_of, small_net, usual

from lwas_fast import AdamWLW, CurvatureError


def test_compiled_module():
    model, batch = small_net(torch.float32), batches(1, torch.float32)[0]
    compiled = torch.compile(model, backend="aot_eager")
    opt = AdamWLW(model.named_parameters(), update_every=1)
    with pytest.raises(CurvatureError, match="torch.compile.*_orig_mod.*finite_difference"):
        opt.backward(loss_of(compiled, batch))
    assert all(p.grad is None for p in model.parameters())
    plain = copy.deepcopy(model)
    other = AdamWLW(plain.named_parameters(), update_every=1)
    for _ in range(3):
        opt.step(usual(opt, compiled, batch))
        other.step(usual(other, plain, batch))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
