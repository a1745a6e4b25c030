"""The operators themselves, and which extension they come from.

Catches: a change that autograd does not notice; a schema without its fake; errors that come after something was
changed; chunks of long lists that are left out; an extension of another torch being loaded.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import COMPILED
from test_fused import EACH, KINDS

from lwas_fast import AdamWLW
from lwas_fast.table import Column
from lwas_fast.update import extension, toolchain

pytestmark = pytest.mark.skipif(extension.EXTENSION is None, reason=f"no compiled update: {extension.MISSING}")


@EACH
def test_versions_go_up(kind):
    p = torch.randn(5).requires_grad_()
    opt = KINDS[kind]([p], fused=True)
    saved = (p * p).sum()  # keeps p for its backward
    p.grad = torch.ones(5)
    version = p._version
    opt.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def operator_arguments(kind: str) -> tuple:
    schedule_free = kind in COMPILED
    params, grads, first, second = ([torch.rand(4, 3), torch.rand(5)] for _ in range(4))
    table, steps = torch.zeros(1, len(Column)), torch.zeros(2)
    where, control = torch.tensor([[0, 0, 1, 17], [0, 1, 1, 17]]), [1.0, 1.0, 1e-2, 3.0, 0.1, 10.0, 0.01, 2.0]
    common = (table, steps, where, control, False)
    if kind.startswith("adamw"):
        return (params, grads, first, second, *common, 0.9, 0.999, 1e-8, 0.01, False, schedule_free)
    return (params, grads, first, *common, 0.9, 0.01, False, schedule_free)


def in_part(totals: torch.Tensor | None, settles: bool = False) -> dict:
    return {"totals": totals, "settles": settles}


@EACH
@pytest.mark.parametrize("part", [{}, in_part(torch.ones(1, 4).double()), in_part(torch.ones(1, 4).double(), True)])
def test_opcheck(kind, part):
    operator = getattr(torch.ops.lwas_fast, f"{kind.removesuffix('_m')}_step").default
    assert set(torch.library.opcheck(operator, operator_arguments(kind), part).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (1, [torch.rand(4, 3)], ValueError, "different lengths"),
        (1, [torch.rand(4, 3), torch.rand(5).double()], TypeError, r"grads\[1\] is Double, not Float"),
        (1, [torch.rand(3, 4), torch.rand(5)], ValueError, r"grads\[0\] is of shape \[3, 4\]"),
        (2, [torch.rand(4, 3), torch.rand(5).half()], TypeError, r"first moments\[1\] is Half"),
        (4, torch.zeros(1, 3), ValueError, "table must be"),
        (5, torch.zeros(2).double(), ValueError, "steps must be"),
        (6, torch.tensor([[0, 0, 1], [0, 1, 1]]), ValueError, "where must be"),
        (6, torch.tensor([[0, 0, 1, 17], [7, 1, 1, 17]]), ValueError, r"where\[1\]: row 7"),
        (6, torch.tensor([[0, 0, 1, 17], [0, 2, 1, 17]]), ValueError, r"where\[1\]: place 2"),
        (6, torch.tensor([[0, 0, 1, 16], [0, 1, 1, 16]]), ValueError, r"where\[1\]: .* cannot have 16 elements"),
        (6, torch.tensor([[0, 0, 1, 17], [0, 1, 1, 18]]), ValueError, r"where\[1\]: .* cannot have 18 elements"),
        (7, [1.0], ValueError, "control has 1 numbers"),
    ],
)
def test_operator_refuses_before_it_changes_anything(position, value, error, words):
    arguments = list(operator_arguments("adamw"))
    arguments[position] = value
    before = copy.deepcopy(arguments[0])
    with pytest.raises(error, match=words):
        torch.ops.lwas_fast.adamw_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments[0], strict=True))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (in_part(torch.zeros(2, 4).double()), r"totals must be of shape \[1, 4\], not \[2, 4\]"),
        (in_part(torch.zeros(1, 4)), "totals must be contiguous float64 on cpu"),
        (in_part(torch.zeros(1, 8).double()[:, ::2]), "totals must be contiguous"),
        (in_part(None, True), "settles takes totals"),
    ],
)
def test_operator_refuses_totals_that_do_not_fit(part, words):
    arguments = operator_arguments("adamw")
    before = copy.deepcopy(arguments[0])
    with pytest.raises(ValueError, match=words):
        torch.ops.lwas_fast.adamw_step(*arguments, **part)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments[0], strict=True))


def test_columns_are_those_of_the_rates():
    columns = extension.EXTENSION.build_info()["columns"]
    assert columns.pop("count") == len(Column)
    assert columns == {name: Column[name] for name in columns}


@pytest.mark.parametrize("capacity", [1, 3, 58])
@pytest.mark.parametrize("count", [0, 1, 57, 58, 59, 1000])
def test_plan_covers_every_chunk_once(count, capacity):
    sizes = torch.randint(0, 300, (count,)).tolist()
    chunks = [max(1, -(-size // 32)) for size in sizes]
    seen_tensors, seen_chunks = [], 0
    for first, last, start, total in extension.EXTENSION.plan(sizes, chunk=32, capacity=capacity):
        assert 0 < last - first <= capacity
        assert start == seen_chunks
        assert total == sum(chunks[first:last])
        seen_tensors += range(first, last)
        seen_chunks += total
        starts = [sum(chunks[first:i]) for i in range(first, last)]
        owners = [extension.EXTENSION.tensor_of(starts, chunk) for chunk in range(total)]
        assert owners == [i for i in range(last - first) for _ in range(chunks[first + i])]
    assert seen_tensors == list(range(count))
    assert seen_chunks == sum(chunks)


def test_plan_counts_past_32_bits():
    launches = extension.EXTENSION.plan([2**40, 5], chunk=1024, capacity=58)
    assert launches == [(0, 2, 0, 2**30 + 1)]


def test_extension_of_another_torch_is_named_and_the_plain_update_serves(monkeypatch):
    module, reason = extension.load_extension("9.8.7")
    assert module is None
    assert re.search(rf"is for torch .*{'.'.join(torch.__version__.split('.')[:2])}.*and this is 9.8.7", reason)
    monkeypatch.setattr(extension, "EXTENSION", None)
    monkeypatch.setattr(extension, "MISSING", reason)
    p = torch.randn(5).requires_grad_()
    with pytest.raises(RuntimeError, match="fused=True.*no compiled update.*9.8.7.*LWAS_FAST_BUILD=none"):
        AdamWLW([p], fused=True)
    opt = AdamWLW([p])
    p.grad = torch.ones(5)
    before = p.detach().clone()
    opt.step()
    assert not torch.equal(p, before)


def test_extension_of_other_sources_is_named(monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(toolchain, "INTERFACE", 1)
        module, reason = extension.load_extension()
        assert module is None
        assert "or of other sources" in reason
    monkeypatch.setattr(extension, "INTERFACE", 1)
    module, reason = extension.load_extension()
    assert module is None
    assert "is of another state of the sources" in reason


def test_which_implementation_serves():
    def compiled(dtype: torch.dtype = torch.float32, **options: object) -> bool:
        opt = AdamWLW([torch.zeros(3, dtype=dtype).requires_grad_()], **options)
        return extension.serves(opt.rule, opt.param_groups[0], opt._layout.buckets[0])

    assert compiled() and compiled(torch.bfloat16) and compiled(fused=True)
    plain = (compiled(torch.float64), compiled(fused=False), compiled(foreach=True), compiled(foreach=False))
    assert not any(plain)
    with pytest.raises(RuntimeError, match="float64 parameters"):
        compiled(torch.float64, fused=True)
