"""What others may rely on: the public names, and the parameters that are torch.optim's.

Catches: a public name added or removed in passing, a parameter that stands elsewhere than torch's own, one of torch's
that is new and neither taken nor refused, and a module that reads another's private names (ruff sees ``module._name``,
not ``from module import _name``).
"""

from __future__ import annotations

import ast
import inspect
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lwas_fast
from lwas_fast.options import Common

PUBLIC = ["AdamWLW", "CurvatureError", "MuonLW", "SGDLW", "__version__", "averaged", "plot_rates", "refresh_norms"]

# Parameters of torch's that ours do not take. A release of torch that brings another makes the test fail: it is to be
# taken or listed here.
LACKING = {
    "amsgrad",  # the maximum of the second moments takes the place of a smaller step, and the step is measured
    "capturable",  # the steps between two measurements can be captured as they are: examples/cuda_graph.py
    "dampening",  # momentum is an average of gradients, which dampens each by 1 - momentum already
    "differentiable",  # a measured rate is no function of the graph
    "nesterov",  # by default there is no momentum to look ahead with, and with momentum nobody asked
}
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def parameters(kind: type, *, positional: bool) -> list[str]:
    """The names that may be passed by position, or those that must be passed by name."""
    found = list(inspect.signature(kind).parameters.values())
    by_name = [p.name for p in found if p.kind is KEYWORD]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
        by_name += Common.__annotations__
    return [p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] if positional else by_name


def test_public_names() -> None:
    assert sorted(lwas_fast.__all__) == PUBLIC
    seen = [name for name, value in vars(lwas_fast).items() if not isinstance(value, ModuleType)]
    assert sorted([*(name for name in seen if not name.startswith("_")), "__version__"]) == PUBLIC


OPTIMIZERS = [
    (lwas_fast.AdamWLW, torch.optim.AdamW),
    (lwas_fast.SGDLW, torch.optim.SGD),
    (lwas_fast.MuonLW, torch.optim.AdamW),  # in whose place it is taken: torch.optim.Muon is for matrices alone
]
WITHOUT = {lwas_fast.MuonLW: {"eps"}}  # nothing is divided by


@pytest.mark.parametrize(("ours", "torchs"), OPTIMIZERS)
def test_parameters_stand_where_torchs_do(ours: type, torchs: type) -> None:
    for positional in (True, False):
        lacking = LACKING | WITHOUT.get(ours, set())
        wanted = [name for name in parameters(torchs, positional=positional) if name not in lacking]
        named = [name for name in parameters(ours, positional=positional) if name in wanted]
        assert named == wanted
    # By position ours take nothing that torch's do not have.
    assert set(parameters(ours, positional=True)) <= set(parameters(torchs, positional=True))


def test_what_torchs_have_and_ours_lack_is_listed() -> None:
    def every(kind: type) -> set[str]:
        return {*parameters(kind, positional=True), *parameters(kind, positional=False)}

    missing = [every(torchs) - every(ours) - WITHOUT.get(ours, set()) for ours, torchs in OPTIMIZERS]
    assert set(chain.from_iterable(missing)) == LACKING


def test_no_module_imports_a_private_name_of_another() -> None:
    found = []
    for file in Path(lwas_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lwas_fast"):
                names = (name.name for name in node.names)
                found += [f"{file.name}:{node.lineno}: {n}" for n in names if n.startswith("_") and n != "__version__"]
    assert found == []
