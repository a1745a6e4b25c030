"""The compiled update against the one in plain torch. The operators themselves are `test_operators.py`'s.

Catches: a formula, order or rounding that differs between the two; memory orders, odd sizes and alignments that lose
elements; the second pass (layers that turn out to be capped, layers of which nothing is known) giving another step than
the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cases import BETWEEN, COMPILED, STEP, batches, each_case, small_net, train

from lwas_fast.update import extension

pytestmark = pytest.mark.skipif(extension.EXTENSION is None, reason=f"no compiled update: {extension.MISSING}")
WITH_MOMENTUM = {f"{kind}_m": partial(cls, schedule_free=False) for kind, cls in COMPILED.items()}
KINDS = {**COMPILED, **WITH_MOMENTUM}
EACH = pytest.mark.parametrize("kind", KINDS)
each_compiled = partial(each_case, kinds=COMPILED)
# Absolute and relative; about three times the worst seen. Half precision: one unit in the last place, also of what a
# weight near 0 was before.
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-4, 8e-3), torch.float16: (1e-5, 1e-3)}
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU where there is one."""
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Also where each worker of the tests has but one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_close(one: list[torch.Tensor], two: list[torch.Tensor], factor: float = 1.0) -> None:
    for a, b in zip(one, two, strict=True):
        atol, rtol = TOLERANCE[a.dtype]
        torch.testing.assert_close(a, b, atol=factor * atol, rtol=factor * rtol, equal_nan=True)


def both(kind: str, params: list[torch.Tensor], **options: object) -> list[tuple[list, torch.optim.Optimizer]]:
    """The same parameters twice, under the compiled and the plain update; tensors named to be layers of two."""
    found = []
    for implementation in ({"fused": True}, {"foreach": True}):
        own = copy.deepcopy(params)
        named = [(f"layer{i // 2}.{i % 2}", p) for i, p in enumerate(own)]
        found.append((own, KINDS[kind](named, update_every=10**9, warmup_steps=10**9, **options, **implementation)))
    return found


def step_alike(pairs: list, gradients: list[torch.Tensor]) -> None:
    for params, opt in pairs:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone(memory_format=torch.preserve_format)
        opt.step()


def compare(pairs: list, factor: float = 1.0) -> None:
    (mine, one), (theirs, two) = pairs
    assert_close(mine, theirs, factor)
    for p, q in zip(mine, theirs, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        for name, value in one.state[p].items():
            if name == "offset" and p.dtype != torch.float32:
                # Rounded to another neighbour, which is rare, a weight's state goes on from there.
                far = (value - two.state[q][name]).abs() > 1e-6 * factor + 1e-5 * value.abs()
                assert far.sum() <= 1 + 0.05 * far.numel()
                continue
            rtol = 1e-5 if p.dtype == torch.float32 else 5e-4  # norms of weights that were rounded to other neighbours
            torch.testing.assert_close(
                value, two.state[q][name], atol=1e-6 * factor, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )


def train_both(kind: str, options: dict, dtype: torch.dtype, device: str) -> None:
    """By the compiled and the plain update, and compare."""
    found, data = [], batches(8 if dtype == torch.float32 else 2, dtype)
    data = [(x.to(device), y.to(device)) for x, y in data]
    for implementation in ("fused", "foreach"):
        model = small_net(dtype).to(device)
        train(COMPILED[kind](model.named_parameters(), **options, **{implementation: True}), model, data)
        found.append([p.detach() for p in model.parameters()])
    # Rates measured after the first step differ by the rounding of the weights.
    assert_close(*found, factor=10 if options.get("cap") == math.inf or dtype != torch.float32 else 1)


@each_compiled(but=BETWEEN)
def test_training_agrees_over_the_table_of_options(kind, options, device):
    train_both(kind, options, torch.float32, device)


@each_compiled(*STEP)
def test_training_agrees_in_bfloat16(kind, options, device):
    train_both(kind, options, torch.bfloat16, device)


@each_compiled("defaults")  # the two half precisions differ in loads and stores only
def test_training_agrees_in_float16(kind, options, device):
    train_both(kind, options, torch.float16, device)


SIZES = [0, 1, 3, 15, 16, 17, 1023, 1024, 1025, 4095, 4097, 16383, 16384, 16385, 40000]


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.usefixtures("two_threads")
def test_sizes_and_alignments(kind, dtype, offset, device):
    params = [torch.randn(n + offset, dtype=dtype, device=device)[offset:].requires_grad_() for n in SIZES]
    pairs = both(kind, params)
    for _ in range(3):
        step_alike(pairs, [torch.randn_like(p) for p in params])
    compare(pairs, factor=1 if dtype == torch.float32 else 3)  # halves: a unit in the last place for each step


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_orders(kind, dtype, device):
    square = torch.randn(12, 7, dtype=dtype)
    images = torch.randn(4, 3, 5, 5, dtype=dtype)
    params = [
        square.t(),  # dense, another order
        images.contiguous(memory_format=torch.channels_last),
        torch.randn(12, 14, dtype=dtype)[:, ::2],  # not dense
        torch.randn(6, 8, dtype=dtype)[:, 2:5],
        torch.randn((), dtype=dtype),
    ]
    params = [p.to(device).detach().requires_grad_() for p in params]
    pairs = both(kind, params)
    for k in range(3):
        gradients = [
            torch.randn(p.shape, dtype=dtype, device=device) for p in params
        ]  # contiguous: not the parameter's order
        if k == 1:
            gradients[0] = torch.randn(7, 1, dtype=dtype, device=device).expand(7, 12)
        step_alike(pairs, gradients)
    compare(pairs)
    for params, _ in pairs:
        assert params[0].stride() == (1, 7)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_turn_out_capped_after_the_first_pass(kind, dtype, device):
    """Steps far from the cap, then a gradient a hundred times as large: moved, found capped, corrected."""
    params = [torch.randn(n, dtype=dtype, device=device).requires_grad_() for n in (3000, 50)]
    options = {"cap": 0.02, "warmup_rate": 9e-3, "weight_decay": 0.1}
    options |= {"betas": (0.0, 0.9999)} if kind.startswith("adamw") else {"momentum": 0.5}
    pairs = both(kind, params, **options)
    (_, one), (_, two) = pairs
    counts = []
    for scale in [1] * 100 + [100, 100, 0.01, 1, 100]:
        step_alike(pairs, [scale * torch.randn_like(p) for p in params])
        assert [r["capped"] for r in one.diagnostics().values()] == [r["capped"] for r in two.diagnostics().values()]
        counts.append(one.diagnostics()["layer0"]["capped"])
    assert counts[99] == 0
    assert counts[99] < counts[100] < counts[-1]
    if dtype == torch.float32:
        compare(pairs, factor=5)
    else:  # what was moved and moved back has been rounded once more, at a few times its size, in each of a few steps
        for p, q in zip(pairs[0][0], pairs[1][0], strict=True):
            torch.testing.assert_close(p, q, atol=2**-4, rtol=2**-6)


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1e2, 1e3, 3e4])
def test_a_runaway_after_quiet_steps_costs_no_weight(kind, dtype, size, device):
    """The direction was nearly 0: nothing speaks of a cap, and the uncapped step is far outside the dtype's reach."""
    options = {"warmup_rate": 100.0} | ({"betas": (0.0, 0.9)} if kind.startswith("adamw") else {"momentum": 0.0})
    pairs = both(kind, [torch.full((8,), 0.5, dtype=dtype, device=device).requires_grad_()], **options)
    for gradient in (0.0, 1e-6, size, -size, 0.0, 0.1):
        step_alike(pairs, [torch.full((8,), gradient, dtype=dtype, device=device)])
        assert_close(pairs[0][0], pairs[1][0], factor=4)  # not the norms: they show a unit in the last place


@EACH
def test_tensors_of_a_layer_that_step_in_turns_go_by_norms_of_their_own(kind, device):
    """The norms of the step before are those of other tensors."""
    pairs = both(kind, [torch.ones(1000, device=device), torch.full((10,), 0.01, device=device)], warmup_rate=10.0)
    for step in range(6):
        for params, opt in pairs:
            params[0].grad = None if step % 2 else torch.ones_like(params[0])
            params[1].grad = torch.ones_like(params[1])
            opt.step()
            (row,) = opt.diagnostics().values()
            cap = opt.param_groups[0]["cap"]
            assert row["applied"] * row["length"] == pytest.approx(cap * row["size"], rel=1e-3)
    compare(pairs)


@EACH
def test_a_norm_that_overflows_holds_nothing_up(kind, device):
    """Squares that are finite, and whose sum is not; first of all, and later."""
    pairs = both(kind, [torch.ones(2, device=device)], warmup_rate=1e-3)
    for size in [1.5e19, 1.0, 1.0, 1.5e19, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        step_alike(pairs, [torch.full((2,), size, device=device)])
        compare(pairs)
    assert (pairs[0][0][0] != 1).all()
    if not kind.startswith("adamw"):  # whose second moment is still of another size
        (row,) = pairs[0][1].diagnostics().values()
        assert row["applied"] > 0


@EACH
def test_not_finite_gradients_leave_their_elements_alone(kind, device):
    params = [torch.randn(n, device=device).requires_grad_() for n in (40, 9, 5)]
    pairs = both(kind, params, weight_decay=0.1)
    step_alike(pairs, [torch.randn_like(p) for p in params])
    before = [p.clone() for p in pairs[0][0]]
    state = copy.deepcopy([pairs[0][1].state[p] for p in pairs[0][0]])
    gradients = [torch.randn_like(p) for p in params]
    gradients[0][3], gradients[0][7], gradients[0][11] = torch.nan, torch.inf, 1e30  # whose square overflows
    gradients[2].fill_(torch.nan)
    step_alike(pairs, gradients)
    compare(pairs)
    mine, opt = pairs[0]
    for i in (3, 7, 11):
        assert mine[0][i] == before[0][i]
        assert all(opt.state[mine[0]][name][i] == state[0][name][i] for name in opt.rule.buffers(opt.param_groups[0]))
    assert (mine[0] != before[0]).sum() == 37
    assert torch.equal(mine[2], before[2])
    assert opt.state[mine[2]]["step"] == 1  # a layer of which nothing moves does not count
    assert opt.state[mine[0]]["step"] == 2
    assert [row["skipped"] for row in opt.diagnostics().values()] == [1, 1]


@EACH
def test_a_step_worked_by_hand(kind):
    p = torch.tensor([1.0, -2.0, 3.0, -4.0]).requires_grad_()
    opt = KINDS[kind]([p], warmup_rate=0.01, warmup_steps=5, weight_decay=0.5, cap=1e9, fused=True)
    p.grad = torch.tensor([0.5, -0.5, 1.0, 0.0])
    opt.step()
    if kind.startswith("adamw"):  # bias correction makes the first direction -sign(g); decay 1 - 0.01 * 0.5
        expected = [0.995 - 0.01, -1.99 + 0.01, 2.985 - 0.01, -3.98]
    else:  # and the first momentum g + 0.5 W = (1, -1.5, 2.5, -2)
        expected = [1 - 0.01, -2 + 0.015, 3 - 0.025, -4 + 0.02]
    torch.testing.assert_close(p.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


@EACH
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_what_a_grad_scaler_sets(kind, found, device):
    params = [torch.randn(n, device=device).requires_grad_() for n in (30, 4)]
    pairs = both(kind, params)
    plain = both(kind, params)
    step_alike(pairs, [torch.ones_like(p) for p in params])
    step_alike(plain, [torch.ones_like(p) for p in params])
    gradients = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in pairs[0][0]]
    rows = pairs[0][1].diagnostics()
    for _, opt in pairs:
        opt.grad_scale, opt.found_inf = torch.tensor(256.0, device=device), torch.tensor(found, device=device)
    step_alike(pairs, [g * 256 for g in gradients])
    compare(pairs)
    if found:
        assert all(torch.equal(a, b) for a, b in zip(before, pairs[0][0], strict=True))
        assert pairs[0][1].diagnostics() == rows
    else:
        step_alike(plain, gradients)
        compare([pairs[0], plain[0]])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_lists_agree(kind, dtype):
    """What test_fuzz_update.py cannot reach: views, orders and gradients as torch has them."""
    dice = torch.Generator().manual_seed(5)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=dice))

    def tensor(kept: bool) -> torch.Tensor:
        shape = [number(20) for _ in range(1 + number(3))]
        made = torch.randn([n + 2 for n in shape], generator=dice).to(dtype)
        for axis, n in enumerate(shape):
            made = made.narrow(axis, number(3), n)
        made = made.transpose(0, -1) if number(2) else made
        return made if kept else made.contiguous()

    for _ in range(60):
        params = [tensor(kept=bool(number(2))).detach().requires_grad_() for _ in range(number(8) + 1)]
        pairs = both(kind, params, cap=[0.01, 10.0][number(2)])
        gradients = [torch.randn(p.shape, generator=dice).to(dtype) * 10 ** number(3) for p in params]
        for _ in range(2):
            if dtype == torch.float32:  # a correction, which half precision rounds once more, has a test of its own
                gradients = [torch.randn_like(g) * 10 ** number(3) for g in gradients]
            step_alike(pairs, gradients)
        compare(pairs, factor=4)
