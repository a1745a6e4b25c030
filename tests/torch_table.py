"""The optimizers in the form of torch's own table of optimizers, and the small problem its generic tests use.

Importing this skips the importing file where torch's testing modules cannot be imported (they need expecttest).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import ALL, BETWEEN, rows_of
from torch import Tensor, nn

common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)


def _inputs_of(kind: str) -> Callable[..., list[Any]]:
    def inputs(device: object, dtype: object = None) -> list[Any]:
        # As a tensor in place of the number: test_tensor_lr has the two equal.
        rows = {**rows_of(kind, but=(*BETWEEN, "half_rate")), "tensor_lr": {"lr": torch.tensor(0.5)}}
        return [common.OptimizerInput(params=None, kwargs=dict(kwargs), desc=name) for name, kwargs in rows.items()]

    return inputs


def _errors(device: object, dtype: torch.dtype) -> list[Any]:
    """What torch refuses of every optimizer and what only we refuse: (params, kwargs, error, message)."""
    a, b = (nn.Parameter(torch.randn(2, 2, dtype=dtype)) for _ in range(2))
    rows = [
        (a, {}, TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
        ([], {}, ValueError, "optimizer got an empty parameter list"),
        ([{"params": {a, b}}], {}, TypeError, "ordered collection"),
        (3, {}, TypeError, "iterable"),
        ([a, 3], {}, TypeError, "must be tensors, not int"),
        ([{"lr": 1.0}], {}, (KeyError, ValueError), "params"),
        ([{"params": a}, {"params": a}], {}, ValueError, "some parameters appear in more than one parameter group"),
        ([("a", a), b], {}, ValueError, "all optimizer params should be with/without names"),
        ([{"params": [a]}, {"params": [("b", b)]}], {}, ValueError, "groups should be with/without names"),
        ([a * 2], {}, ValueError, "non-leaf"),
        ([torch.zeros(2, dtype=torch.complex64)], {}, ValueError, "complex: optimize torch.view_as_real"),
        ([torch.zeros(2, dtype=torch.int64)], {}, ValueError, "not floating-point"),
        ([torch.zeros(2, 2).to_sparse()], {}, ValueError, "sparse"),
        ([a], {"lr": torch.tensor([1.0, 2.0])}, ValueError, "^lr="),
        ([a], {"lr": -1.0}, ValueError, "^lr="),
        ([{"params": [a], "lr": -1.0}], {}, ValueError, "^lr=-1.0 in parameter group 0"),
        ([{"params": [a], "hvp": "autograd"}], {}, ValueError, "whole optimizer"),
        ([a], {"foreach": True, "fused": True}, ValueError, "exclude each other"),
        ([a], {"amsgrad": True}, TypeError, "no keyword 'amsgrad'"),
        ([a], {"weight_decay": -0.1}, ValueError, "^weight_decay="),
    ]
    return [
        common.ErrorOptimizerInput(common.OptimizerInput(params, kwargs, text), error_type=error, error_regex=text)
        for params, kwargs, error, text in rows
    ]


INFOS = {
    kind: common.OptimizerInfo(
        cls,
        optim_inputs_func=_inputs_of(kind),
        optim_error_inputs_func=_errors,
        supported_impls=("foreach",),
        not_og_supported_flags=("foreach", "fused", "maximize"),
        supports_complex=False,
    )
    for kind, cls in ALL.items()
}
EACH_INFO = pytest.mark.parametrize("info", INFOS.values(), ids=[info.name for info in INFOS.values()])


def each_row(*only: str) -> pytest.MarkDecorator:
    """Parametrize `info` and `row` over all optimizers and these rows, or where none is named all."""
    rows = [(info, row) for info in INFOS.values() for row in info.optim_inputs_func("cpu")]
    rows = [(info, row) for info, row in rows if not only or row.desc in only]
    assert {row.desc for _, row in rows} >= {*only}
    return pytest.mark.parametrize(("info", "row"), rows, ids=[f"{info.name}-{row.desc}" for info, row in rows])


class Problem:
    """Two layers of a weight and a bias each, and a smooth loss that is not quadratic.

    Attributes:
        named: (name, parameter) pairs; the layers are "a" and "b".
        x: What goes in; another row at every call of `loss`.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        made = torch.Generator().manual_seed(seed)
        shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.bias": (2,)}
        drawn = {name: torch.randn(shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()}
        self.named = [(name, nn.Parameter(value.to(dtype))) for name, value in drawn.items()]
        self.x = torch.randn(16, 3, generator=made, dtype=torch.float64).to(dtype)
        self.calls = 0

    @property
    def params(self) -> list[Tensor]:
        return [p for _, p in self.named]

    def loss(self, k: int) -> Tensor:
        w, b, v, c = self.params
        return (v.mv(torch.tanh(w.mv(self.x[k % 16]) + b)) + c).square().sum()

    def run(self, opt: Any, steps: Iterable[int]) -> None:
        """Take these steps by the two routes in turn."""
        for k in steps:

            def closure(k: int = k) -> Tensor:
                opt.zero_grad()
                loss = self.loss(k)
                loss.backward()
                return loss

            if k % 2:
                opt.step(closure)
            else:
                opt.zero_grad()
                opt.backward(self.loss(k))
                opt.step()


def assert_equal(one: Iterable[Tensor], two: Iterable[Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.detach(), b.detach())


def assert_equal_states(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Two state_dicts hold the same groups, and the same tensors bit for bit.

    But for "differentiable", which torch adds on loading: test_loading_adds_nothing_to_groups has it. And for samples
    of the weights, which are the model's.
    """
    no = ("differentiable", "samples")
    groups = [[{k: v for k, v in g.items() if k not in no} for g in s["param_groups"]] for s in (one, two)]
    assert groups[0] == groups[1]
    assert one["state"].keys() == two["state"].keys()
    for key, entry in one["state"].items():
        assert entry.keys() == two["state"][key].keys()
        assert_equal(entry.values(), two["state"][key].values())
