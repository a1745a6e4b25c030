"""Hessian-vector products by both ways, apart from what the optimizers make of them.

Catches: a biased estimator; finite differences that leave parameters, gradients, running statistics or the random
stream other than they found them; a graph that is kept; gradients that reach the wrong leaves; missing errors.
"""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from cases import OPTIMIZERS, batches, layer_vectors, loss_of, loss_of_vectors, small_net, usual
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lwas_fast import SGDLW, AdamWLW, CurvatureError
from lwas_fast.measure import probes
from lwas_fast.table import Column


def blocks_of(model: nn.Module, batch) -> list[float]:
    """<g, H_ii g> of each layer from the dense Hessian."""
    vectors = layer_vectors(model)
    loss, sizes = loss_of_vectors(model, batch), [v.numel() for v in vectors]
    flat = torch.cat(vectors)
    hessian = torch.func.hessian(lambda w: loss(list(w.split(sizes))))(flat)
    gradient = torch.func.grad(lambda w: loss(list(w.split(sizes))))(flat)
    found, start = [], 0
    for size in sizes:
        part = slice(start, start := start + size)
        found.append((gradient[part] @ hessian[part, part] @ gradient[part]).item())
    return found


@pytest.mark.parametrize("how", ["autograd", "closure"])
def test_signs_average_to_the_hessian_blocks(how, monkeypatch):
    """Over all 2^L draws, exactly; the mean over random draws follows."""
    model, batch = small_net(), batches(1)[0]
    sums = torch.zeros(3, dtype=torch.float64)
    draws = list(itertools.product([1.0, -1.0], repeat=3))
    for draw in draws:
        monkeypatch.setattr(probes, "draw_signs", lambda *_, draw=draw: list(draw))
        opt = SGDLW(model.named_parameters())

        if how == "autograd":
            opt.backward(loss_of(model, batch))
        else:
            opt._evaluate(usual(opt, model, batch))
        ((*_, rows),) = opt._now.measured.parts
        sums += rows[:, Column.CURVATURE]
        opt.zero_grad()
    expected = torch.tensor(blocks_of(model, batch), dtype=torch.float64)
    torch.testing.assert_close(sums / len(draws), expected, rtol=1e-10 if how == "autograd" else 1e-4, atol=1e-12)


class Noisy(nn.Module):
    """Dropout and running statistics: what a second evaluation may disturb."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x):
        return self.body(x)


def test_a_second_evaluation_leaves_no_trace():
    """A measuring step with rate 0 equals one forward and backward pass: weights, gradients, buffers, random stream."""
    batch = batches(1, torch.float32)[0]
    found = []
    for measured in (False, True):
        torch.manual_seed(3)
        model, foreign = Noisy(), torch.zeros(2, requires_grad=True)
        opt = AdamWLW(model.named_parameters(), lr=0.0)

        def closure(model=model, foreign=foreign, opt=opt):
            opt.zero_grad()
            loss = F.cross_entropy(model(batch[0]) + foreign, batch[1])
            loss.backward()
            return loss

        opt.step(closure) if measured else closure()
        state = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), foreign.grad]
        found.append([t.clone() for t in state] + [torch.rand(4)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_closure_that_raises_loses_nothing():
    model, batch, calls = small_net(), batches(1)[0], []
    opt = AdamWLW(model.named_parameters())
    before = layer_vectors(model)

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("the second evaluation fails")
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        opt.step(closure)
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, layer_vectors(model), strict=True))
    opt.step(closure)
    assert opt.diagnostics()["0"]["refreshes"] == 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_backward_gives_every_leaf_its_gradient(kind):
    """Also leaves of another optimizer, tied and constant ones; hooks run; nothing is shared."""
    found = []
    for ours in (False, True):
        model = small_net()
        foreign = torch.ones(2, dtype=torch.float64, requires_grad=True)
        hooked = []
        model[0].weight.register_post_accumulate_grad_hook(lambda p, hooked=hooked: hooked.append(p))
        opt = OPTIMIZERS[kind](model.named_parameters())
        loss = loss_of(model, batches(1)[0]) * foreign.sum() + model[4].bias.sum()
        opt.backward(loss) if ours else loss.backward()
        assert len(hooked) == 1
        found.append([p.grad.clone() for p in model.parameters()] + [foreign.grad.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_loss_without_curvature_keeps_the_rate():
    weight = torch.ones(3, requires_grad=True)
    opt = SGDLW([weight], warmup_rate=0.25)
    opt.backward(weight.sum())
    opt.step()
    assert opt.rates() == {"param0": 0.25}
    assert opt.diagnostics()["param0"]["nonfinite"] == 1


@pytest.mark.parametrize("how", ["autograd", "closure"])
def test_memory_is_flat_over_60_refreshes(how):
    model, batch = small_net(), batches(1)[0]
    opt = AdamWLW(model.named_parameters(), update_every=1)

    closure = usual(opt, model, batch)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for k in range(70):
        if how == "closure":
            opt.step(closure)
        else:
            opt.zero_grad()
            opt.backward(loss_of(model, batch))
            opt.step()
        if k == 9:
            start = tensors()
    assert tensors() <= start


class Attention(nn.Module):
    """Fused attention, which has no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).sum(-1)


class Once(torch.autograd.Function):
    """A function that can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_operations_without_second_derivative_are_named():
    attention, linear = Attention(), nn.Linear(8, 8)
    x = torch.randn(2, 5, 8)
    cases = [
        (attention, lambda: attention(x).square().mean(), "attention.*SDPBackend.MATH"),
        (linear, lambda: Once.apply(linear(x)).square().mean(), "once_differentiable"),
        (
            linear,
            lambda: checkpoint(linear, x.requires_grad_(), use_reentrant=True).square().mean(),
            "use_reentrant=False",
        ),
    ]
    for model, loss, message in cases:
        model.zero_grad()
        opt = AdamWLW(model.named_parameters())
        with pytest.raises(CurvatureError, match=message) as caught:
            opt.backward(loss())
        assert "finite_difference" in str(caught.value)
        assert all(p.grad is None for p in model.parameters())

        def closure(opt=opt, loss=loss):
            opt.zero_grad()
            value = loss()
            value.backward()
            return value

        opt.step(closure)  # the way out that the message offers
        assert [row["refreshes"] for row in opt.diagnostics().values()] == [1] * len(opt.rates()), opt.diagnostics()


def test_math_attention_is_a_way_out_too():
    model, x = Attention(), torch.randn(2, 5, 8)
    opt = AdamWLW(model.named_parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        opt.backward(model(x).square().mean())
    opt.step()
    assert opt.diagnostics()["qkv"]["refreshes"] == 1


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    opt = AdamWLW(model.named_parameters())
    model(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(TypeError, match="weight.*sparse=False"):
        opt.step()


@pytest.mark.parametrize("how", ["flat buffer", "own buffers", "expanded", "in place"])
def test_gradients_in_memory_of_the_users_own(how):
    """A second evaluation that writes where the first has: the curvature and the gradient are the same all the same."""
    found = []
    for special in (False, True):
        model, batch = small_net(), batches(1)[0]
        params = list(model.parameters())
        flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
        views = [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
        buffers = views if how == "flat buffer" else [torch.zeros_like(p) for p in params]
        opt = SGDLW(model.named_parameters(), update_every=1, momentum=0.0)

        def closure(model=model, batch=batch, params=params, buffers=buffers, special=special, opt=opt):
            opt.zero_grad(set_to_none=not (special and how == "in place"))
            loss = loss_of(model, batch)
            if how == "expanded":
                loss = loss + 0 * sum(p.sum() for p in params)
            gradients = torch.autograd.grad(loss, params)
            for p, g, buffer in zip(params, gradients, buffers, strict=True):
                if how == "expanded" and p.dim() == 1:
                    g = g.mean().expand_as(g)
                    p.grad = g if special else g.clone()
                elif special and how == "in place" and p.grad is not None:
                    p.grad += g
                else:
                    p.grad = buffer.copy_(g) if special and "buffer" in how else g.clone()
            return loss.detach()

        for _ in range(2):
            opt.step(closure)
        found.append([*layer_vectors(model), torch.tensor([r["curvature"] for r in opt.diagnostics().values()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
