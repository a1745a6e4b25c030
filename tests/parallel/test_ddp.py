"""Two replicas under DistributedDataParallel.

Catches: replicas that drift apart or differ from one process on the joint batch; a mode that would let them.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import ALL, batches, closing, loss_of, small_net, usual
from processes import results_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lwas_fast import AdamWLW, CurvatureError


def train_with(how, opt, model, batch):
    """One step: PyTorch's closure; autograd; or autograd on the second half after accumulating the first."""
    if how.startswith("closure"):
        opt.step(usual(opt, model, batch))
        return
    ddp = model if isinstance(model, DistributedDataParallel) else None
    x, y = batch
    parts = [(x[0::2], y[0::2]), (x[1::2], y[1::2])] if how == "accumulated" else [batch]
    opt.zero_grad()
    for part in parts:
        last = part is parts[-1]
        with nullcontext() if last or ddp is None else ddp.no_sync():
            opt.backward(loss_of(model, part) / len(parts), last=last, ddp=ddp)
    opt.step()


def replica(how: str, rank: int):
    model = small_net()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view="views" in how)
    opt = AdamWLW(model.named_parameters(), update_every=2)
    for x, y in batches(6):
        half = slice(8 * rank, 8 * rank + 8)
        train_with(how, opt, parallel, (x[half], y[half]))
    return model.state_dict(), opt.rates()


def alike(kind: str, rank: int | None):
    """Both accumulate over the same data, which one process might as well."""
    model = small_net()
    parallel = DistributedDataParallel(model) if rank is not None else model
    opt = ALL[kind](model.named_parameters(), update_every=2)
    for batch in batches(6):
        train_with("accumulated", opt, parallel, batch)
    return [p.detach() for p in model.parameters()], opt.rates()


def followed(made_with: str, rank: int):
    """Plain ``loss.backward()``, with the optimizer made before or after the model was wrapped."""
    model = small_net()
    opt = AdamWLW(model, update_every=2, weight_decay_on="all") if made_with == "model" else None
    parallel = DistributedDataParallel(model)
    opt = opt or AdamWLW(parallel, update_every=2, weight_decay_on="all")
    for x, y in batches(6):
        half = slice(8 * rank, 8 * rank + 8)
        loss_of(parallel, (x[half], y[half])).backward()
        opt.step()
        opt.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, opt.rates()


def hooked(rank: int):
    """What cannot be measured leaves the user's gradients as they are; so does a graph that is kept."""
    found = []
    for case in ("hook", "kept", "none"):
        model = small_net()
        parallel = DistributedDataParallel(model)
        if case == "hook":
            model[0].weight.register_hook(lambda grad: grad * 1.0)
        opt = AdamWLW(model)
        x, y = batches(1)[0]
        half = slice(8 * rank, 8 * rank + 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss_of(parallel, (x[half], y[half])).backward(retain_graph=case == "kept")
        found.append([p.grad.clone() for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        loss_of(parallel, (x[half], y[half])).backward()
        opt.step()
        found.append([row["refreshes"] for row in opt.diagnostics().values()])
    return found


def alone(rank: int):
    """Evaluation and saving on one rank alone."""
    model = small_net(torch.bfloat16)
    opt = AdamWLW(model)
    parallel = DistributedDataParallel(model)
    for k, (x, y) in enumerate(batches(12, torch.bfloat16)):
        half = slice(8 * rank, 8 * rank + 8)
        loss_of(parallel, (x[half], y[half])).backward()
        opt.step()
        opt.zero_grad()
        if rank == 0 and k % 3 == 2:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            opt.state_dict()
            opt.state_dict()
    parallel(x)
    return [p.detach().clone() for p in model.parameters()]


def scaled(rank: int):
    """The weights after training on the loss and on a multiple of it, by either route."""
    found = []
    for factor in (1.0, 2.0**27):
        for how in ("closure", "autograd"):
            model = small_net()
            parallel = DistributedDataParallel(model)
            opt = AdamWLW(model.named_parameters(), update_every=2, eps=1e-30)
            for x, y in batches(6):
                half = x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]

                def loss(parallel=parallel, half=half, factor=factor):
                    return factor * loss_of(parallel, half)

                if how == "closure":
                    opt.step(closing(opt, loss))
                else:
                    opt.zero_grad()
                    opt.backward(loss(), ddp=parallel)
                    opt.step()
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return found


class Branches(nn.Module):
    """Two branches, of which each replica takes its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4, dtype=torch.float64)
        self.branches = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, x, which):
        return self.branches[which](torch.tanh(self.body(x))).square().mean()


def branches(rank: int):
    model = Branches()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    opt = AdamWLW(model.named_parameters(), update_every=1)
    torch.manual_seed(rank)
    for _ in range(4):
        opt.zero_grad()
        opt.backward(parallel(torch.randn(5, 3, dtype=torch.float64), rank), ddp=parallel)
        opt.step()
    return model.state_dict(), opt.diagnostics()


def refusals(rank: int):
    model, (batch,) = small_net(), batches(1)
    said = []

    def refused(opt, loss, **keywords):
        with pytest.raises(CurvatureError) as error:
            opt.backward(loss, **keywords)
        said.append(str(error.value))

    parallel = DistributedDataParallel(model, static_graph=True)
    opt = AdamWLW(model.named_parameters())
    refused(opt, loss_of(model, batch))
    refused(opt, loss_of(model, batch), ddp=parallel)
    with pytest.raises(TypeError, match="DistributedDataParallel module"):
        opt.backward(loss_of(model, batch), ddp=model)
    assert all(p.grad is None for p in model.parameters())
    differences = AdamWLW(model.named_parameters(), hvp="finite_difference")
    differences.backward(lambda: loss_of(model, batch), last=False)
    refused(differences, lambda: loss_of(model, batch))
    other = small_net()
    other[0].weight.register_hook(lambda grad: 2 * grad)
    parallel = DistributedDataParallel(other)
    refused(AdamWLW(other.named_parameters()), loss_of(parallel, batch), ddp=parallel)
    assert all(p.grad is None for p in other.parameters())
    return said


WAYS = ["closure", "closure, bucket views", "autograd", "autograd, bucket views"]
SCENARIOS = {how: partial(replica, how) for how in (*WAYS, "accumulated")}
FOLLOWED = {f"followed, {made_with}": partial(followed, made_with) for made_with in ("model", "wrapper")}
SCENARIOS |= {f"alike, {kind}": partial(alike, kind) for kind in ALL}
SCENARIOS |= FOLLOWED | {"hooked": hooked, "alone": alone, "branches": branches, "refusals": refusals, "scaled": scaled}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    return results_of("test_ddp", tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize("how", [*WAYS, *FOLLOWED])
def test_two_replicas_equal_one_process_on_the_joint_batch(of_both, how):
    (one, rates), (two, same) = of_both(how)
    assert rates == same
    model: nn.Module = small_net()
    opt = AdamWLW(model.named_parameters(), update_every=2)
    for batch in batches(6):
        train_with("autograd" if how in FOLLOWED else how, opt, model, batch)
    for name, value in model.named_parameters():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-8)
    for name, rate in opt.rates().items():
        assert rates[name] == pytest.approx(rate, rel=1e-5)


def test_what_cannot_be_measured_leaves_gradients_as_they_are(of_both):
    for of_hook, first, of_kept, second, plain, measured in of_both("hooked"):
        for gradients in (of_hook, of_kept):
            torch.testing.assert_close(gradients, plain)
        assert first == [1, 1, 1]  # by a second call
        assert second == measured == [1, 1, 1]


def test_evaluation_and_saving_on_one_rank_change_nothing(of_both):
    one, two = of_both("alone")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_replicas_that_accumulate_stay_alike(of_both):
    """They measure along the whole window's gradient, not, as in one process, along its last part's."""
    (one, rates), (two, same) = of_both("accumulated")
    assert rates == same and all(rate > 0 for rate in rates.values())
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ALL)
def test_replicas_with_the_same_data_accumulate_as_one_process(of_both, kind):
    """Also in the factors of a window's gradients, which Adam's directions hide."""
    weights, rates = alike(kind, None)
    for mine, same in of_both(f"alike, {kind}"):
        torch.testing.assert_close(mine, weights, rtol=1e-6, atol=1e-8)
        assert same == pytest.approx(rates, rel=1e-5)


def test_the_scale_of_the_loss_changes_nothing_and_replicas_agree_on_it(of_both):
    one, two = of_both("scaled")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(one[0], one[2]) and torch.equal(one[1], one[3])


def test_a_parameter_that_one_replica_does_not_use(of_both):
    (one, found), (two, same) = of_both("branches")
    assert found == same and len(found) == 3
    assert all(row["refreshes"] == 4 and row["curvature"] != 0 for row in found.values())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_would_let_replicas_drift_apart_is_refused(of_both):
    said, _ = of_both("refusals")
    for message, words in zip(said, ("ddp=model", "static_graph", "autograd", "register_hook"), strict=True):
        assert words in message and "opt.step(closure)" in message
