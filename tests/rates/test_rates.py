"""Layers' rates, the same function three times: plain torch, one Triton launch, and the float64 reference.

Catches: a sum, guard, average or counter that differs between them; a tensor's size, layout, dtype or alignment that
is read wrongly; partial sums added in an order that depends on scheduling, or counted twice; a layer left unfinished.

Without a GPU the kernel runs in Triton's interpreter, with small chunks so that there are many.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import OPTIMIZERS, batches, small_net, train
from reference import ReferenceAdamWLW

from lwas_fast import AdamWLW
from lwas_fast.measure import Probe, Products, Vectors
from lwas_fast.rates import launch
from lwas_fast.rates.closed_form import layer_sums, refresh
from lwas_fast.table import Column, Sums

# Of numpy, in the interpreter: a branch not taken may divide by zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, BLOCK = 64, 16
SMALL = ((7,), (4, 3), (1,), (5, 2, 2))


@dataclasses.dataclass
class Case:
    """A measurement: each layer's shapes, the dtypes of gradients and products in turn, and what is special."""

    layers: tuple[tuple[tuple[int, ...], ...], ...] = tuple((shape,) for shape in SMALL)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    options: dict = dataclasses.field(default_factory=dict)
    curvature: float = 1.0  # what products of the first layer are multiplied by
    steps: int = 5
    flat: tuple[int, ...] = ()  # layers without a gradient's length
    factor: float = 1.0
    growing: float = 1.0  # what products shrink by from one measurement to the next


CASES = {
    "defaults": Case(),
    "first_step": Case(steps=0),
    "weight_decay": Case(options={"weight_decay": 0.3}),
    "growth": Case(growing=30.0),
    "negative": Case(curvature=-1.0),
    "no_curvature": Case(curvature=0.0, options={"weight_decay": 0.0}),
    "infinite_curvature": Case(curvature=math.inf),
    "flat_layer": Case(flat=(1, 3)),
    "scaled_products": Case(factor=0.125),
    "empty_and_single": Case(layers=(((0,),), ((1,),), ((3, 0), (2,)), ((0,), (0, 4)), ((),))),
    "one_next_to_many": Case(layers=(((1,),), ((41, 29),), ((1,), (1,)))),
    "full_chunks": Case(layers=(((64,),), ((128,), (64, 3)), ((63,), (65,)))),
    "bfloat16": Case(layers=(((64,), (9,)), ((130,),)), dtypes=(torch.bfloat16,)),
    "float16": Case(layers=(((64,), (9,)), ((130,),)), dtypes=(torch.float16,)),
    "mixed_dtypes": Case(layers=(((64,), (70,), (3,)),) * 3, dtypes=(torch.float32, torch.bfloat16, torch.float16)),
    "twenty_layers": Case(layers=(((2,), (1,)),) * 20),
}
IMPLEMENTATIONS = ["torch", "triton"]


class Problem:
    """Layers with their vectors, to be measured by either implementation or by the reference."""

    def __init__(self, case: Case, **options):
        torch.manual_seed(0)
        self.case, self.shrunk = case, 1.0
        shapes = [shape for layer in case.layers for shape in layer]
        names = [f"layer{i}.{j}" for i, layer in enumerate(case.layers) for j in range(len(layer))]
        params = [torch.zeros(s, dtype=case.dtypes[i % len(case.dtypes)], device=DEVICE) for i, s in enumerate(shapes)]
        self.options = {**case.options, **options}
        self.opt = AdamWLW(zip(names, params, strict=True), **self.options)
        (self.bucket,) = self.opt._layout.buckets
        self.bucket.steps.fill_(case.steps)
        self.selection = self.bucket.select(range(len(params)))
        self.signs = [(-1.0) ** (i // 2) for i in range(len(case.layers))]
        self.ref = ReferenceAdamWLW([torch.cat(group) for group in self._by_layer(params)], **self.options)

    def _by_layer(self, tensors):
        found = [[] for _ in self.case.layers]
        for layer, tensor in zip(self.selection.layer, tensors, strict=True):
            found[layer].append(tensor.double().flatten().cpu())
        return found

    def measure(self):
        """Draw new vectors: the probe and the products, and the same to the reference."""
        self.gradients, directions, products, self.denominators = [], [], [], []
        for n, param in enumerate(self.selection.params):
            layer = self.selection.layer[n]
            g = torch.randn(param.shape, device=DEVICE).to(param.dtype)
            g = g * 0 if layer in self.case.flat else g
            denominator = torch.rand(param.shape, dtype=torch.float64, device=DEVICE) + 1 + 2 * g.double().abs()
            d = (-self.signs[layer] * g.double() / denominator).float()
            h = torch.rand(param.shape, device=DEVICE) + 0.1
            u = (d * h * (self.case.curvature if layer == 0 else 1.0) * self.shrunk).to(param.dtype)
            self.gradients.append(g)
            self.denominators.append(denominator)
            directions.append(d)
            products.append(torch.where(d == 0, 0.0, u))
        self.shrunk /= self.case.growing
        vectors, loss = Vectors(self.gradients, directions), torch.tensor(0.7, device=DEVICE)
        probe = Probe(
            self.bucket, self.selection, vectors, self.signs, 1.0, loss, [0.0] * len(self.signs), max_fall=10.0
        )
        self._tell_reference(products, directions)
        return probe, Products(products, self.case.factor)

    def _tell_reference(self, products, directions):
        ref, n = self.ref, self.case.steps
        beta2 = ref.hyper.betas[1]
        g = [torch.cat(t) for t in self._by_layer(self.gradients)]
        s = [torch.cat(t) - ref.hyper.eps for t in self._by_layer(self.denominators)]
        ref.n = [n] * len(g)
        # The second moment that gives these denominators.
        ref.v = [((1 - beta2 ** (n + 1)) * si**2 - (1 - beta2) * gi**2) / beta2 for si, gi in zip(s, g, strict=True)]
        u, v = (torch.cat([torch.cat(t) for t in self._by_layer(ts)]) for ts in (products, directions))
        diagonal = torch.where(v == 0, 0.0, self.case.factor * u / v)
        if len(diagonal) < 3000:
            ref._refresh(g, torch.diag(diagonal), self.signs, 0.7)

    def refresh(self, implementation, probe, products, plans, finish=True):
        group = self.opt.param_groups[0]
        if implementation == "torch":
            return refresh([probe], [layer_sums(probe, products)], [group])[0]
        found = launch.launch([probe], [products], [group], plans, finish, chunk=CHUNK, block=BLOCK)[finish][0]
        return found


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_three_refreshes_follow_the_reference(name, implementation):
    problem, plans = Problem(CASES[name]), {}
    for _ in range(3):
        probe, products = problem.measure()
        problem.bucket.table[:] = problem.refresh(implementation, probe, products, plans)
    ref, table = problem.ref, problem.bucket.table.cpu().double()
    half = torch.float32 not in CASES[name].dtypes
    found = list(problem.opt.rates().values())
    assert found == pytest.approx(ref.rate, rel=2e-6)
    for row, events, last in zip(table.tolist(), ref.events, ref.last, strict=True):
        counts = {"negative": Column.NEGATIVE, "nonfinite": Column.NONFINITE, "nondescent": Column.NO_DESCENT}
        counts |= {"growth": Column.GROWTH, "refreshes": Column.REFRESHES}
        assert {event: int(row[column]) for event, column in counts.items()} == {e: events[e] for e in counts}
        if events["refreshes"]:
            assert row[Column.DESCENT] == pytest.approx(last["descent"], rel=1e-6)
            assert row[Column.CURVATURE] == pytest.approx(last["curvature"], rel=1e-6)
    assert half or torch.isfinite(table).all()


def test_what_is_not_finite_is_told_apart_alike():
    """NaN and infinity in each vector: same guards, same counters."""
    pytest.importorskip("triton")
    problem = Problem(Case(options={"weight_decay": 0.0}))
    for vectors, value, layer in itertools.product(range(3), (math.nan, math.inf, 1e38, 0.0), (0, 3)):
        probe, products = problem.measure()
        changed = [list(v) for v in (*probe.vectors, products.tensors)]
        changed[vectors][layer] = torch.full_like(changed[vectors][layer], value)
        probe.vectors, products = Vectors(*changed[:2]), Products(changed[2], 1.0)
        expected = problem.refresh("torch", probe, products, {})
        found = problem.refresh("triton", probe, products, {})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor


def unaligned(tensor):
    longer = tensor.new_empty(tensor.numel() + 1)
    longer[1:] = tensor.flatten()
    return longer[1:].view(tensor.shape)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def test_l2_is_curvature(implementation):
    problem = Problem(Case())
    probe, products = problem.measure()
    found = problem.refresh(implementation, dataclasses.replace(probe, l2=[0.3] * len(probe.signs)), products, {})
    sums = layer_sums(probe, products)
    assert (sums[:, Sums.CURVATURE] > 0).all()
    sums[:, Sums.CURVATURE] += 0.3 * sums[:, Sums.SQUARE]
    (expected,) = refresh([probe], [sums], problem.opt.param_groups)
    at = [Column.AVERAGE, Column.WEIGHT, Column.LOSS, Column.REFRESHES]
    torch.testing.assert_close(found[:, at], expected[:, at], rtol=2e-6, atol=0)


LAYOUTS = {"transposed": transposed, "unaligned": unaligned, "channels_last": channels_last}


@pytest.mark.parametrize(
    ("layout", "which"),
    [(layout, "all") for layout in LAYOUTS] + [("transposed", one) for one in ("gradients", "directions", "products")],
)
def test_any_layout(layout, which):
    pytest.importorskip("triton")
    problem = Problem(Case(layers=(((4, 5, 3, 7),), ((8, 8, 4, 1),))))
    probe, products = problem.measure()
    expected = problem.refresh("torch", probe, products, {})
    lists = {**probe.vectors._asdict(), "products": products.tensors}
    for name, tensors in lists.items():
        if which in (name, "all"):
            lists[name] = [LAYOUTS[layout](t) for t in tensors]
    probe.vectors = Vectors(*(lists[name] for name in Vectors._fields))
    found = problem.refresh("triton", probe, Products(lists["products"], 1.0), {})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_two_dtypes_in_one_tensor_and_products_that_are_zero():
    pytest.importorskip("triton")
    problem = Problem(Case(layers=(((70,), (9,)),), dtypes=(torch.bfloat16,)))
    probe, products = problem.measure()
    mixed = Products([products.tensors[0].float(), None], torch.tensor(0.5, device=DEVICE))
    found = problem.refresh("triton", probe, mixed, {})
    torch.testing.assert_close(found, problem.refresh("torch", probe, mixed, {}), rtol=1e-5, atol=1e-7)


def test_more_layers_than_the_last_program_takes_at_a_time(monkeypatch):
    pytest.importorskip("triton")
    from lwas_fast.triton_kernels import layer_rates as kernels

    monkeypatch.setattr(kernels, "AT_ONCE", 8)
    problem = Problem(CASES["twenty_layers"])
    probe, products = problem.measure()
    found, expected = (problem.refresh(implementation, probe, products, {}) for implementation in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_minus_the_directions():
    """SGD's, which are not read: a stream less."""
    pytest.importorskip("triton")
    problem = Problem(Case(layers=(((70,), (9,)), ((3,),))))
    probe, products = problem.measure()
    minus = [-problem.signs[i] * d for i, d in zip(probe.selection.layer, probe.vectors.directions, strict=True)]
    explicit = problem.refresh(
        "torch", dataclasses.replace(probe, vectors=probe.vectors._replace(gradients=minus)), products, {}
    )
    probe.vectors = probe.vectors._replace(gradients=None)
    for implementation in IMPLEMENTATIONS:
        found = problem.refresh(implementation, probe, products, {})
        torch.testing.assert_close(found, explicit, rtol=1e-5, atol=1e-7)


def test_sums_are_where_the_launch_stops_in_a_distributed_run():
    pytest.importorskip("triton")
    for case in (CASES["full_chunks"], CASES["weight_decay"], CASES["mixed_dtypes"]):
        problem, plans = Problem(case), {}
        probe, products = problem.measure()
        sums, expected = problem.refresh("triton", probe, products, plans, finish=False), layer_sums(probe, products)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_repeats_are_equal_bit_for_bit_and_leave_nothing_behind():
    pytest.importorskip("triton")
    problem, plans = Problem(CASES["full_chunks"]), {}
    probe, products = problem.measure()
    first = problem.refresh("triton", probe, products, plans)
    for _ in range(1000 if DEVICE == "cuda" else 3):
        assert torch.equal(problem.refresh("triton", probe, products, plans), first)
    (plan,) = plans.values()
    assert (plan.arrivals == 0).all()


OPTIONS = {
    "defaults": {},
    "momentum": {"weight_decay": 0.1, "schedule_free": False},
    "blocks": {"curvature": "blocks"},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize(("name", "how"), [*((name, "autograd") for name in OPTIONS), ("defaults", "closure")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_the_same(kind, name, how, monkeypatch):
    """Through the optimizer, with two groups, one launch for both."""
    pytest.importorskip("triton")
    options = dict(OPTIONS[name])
    if kind == "adamw" and how == "closure":
        options["betas"] = (0.9, 0.999)  # a shorter memory makes of one bit in the weights 7e-4 of a rate, not 6e-5
    found = []
    served = []
    for implementation in IMPLEMENTATIONS:
        monkeypatch.setattr(launch, "serves", lambda *_, i=implementation: served.append(i) or i == "triton")
        model = small_net(torch.float32).to(DEVICE)
        matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
        others = [(n, p) for n, p in model.named_parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.5, "update_every": 1}]
        opt = OPTIMIZERS[kind](groups, update_every=2, **options)
        data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(5, torch.float32)]
        train(opt, model, data, how=how)
        found.append([*model.parameters(), torch.tensor(list(opt.rates().values()))])
    assert served == ["torch"] * 8 + ["triton"] * 8  # the second group is due at each of 5 steps, the first at 3
    # Differences of float32 gradients lose three digits, and rounding with them.
    rtol, atol = (1e-5, 1e-6) if how == "autograd" else (5e-4, 1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_another_default_dtype_changes_nothing():
    pytest.importorskip("triton")
    found = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        problem = Problem(CASES["weight_decay"])
        probe, products = problem.measure()
        torch.set_default_dtype(default)
        try:
            found.append(problem.refresh("triton", probe, products, {}))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_trial_runs():
    pytest.importorskip("triton")
    launch.trial(torch.device(DEVICE))
