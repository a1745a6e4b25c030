"""Train PyTorch models without a learning rate.

:class:`MuonLW`, :class:`AdamWLW` and :class:`SGDLW` measure the curvature of the loss along each layer's own descent
direction and turn it into that layer's step size in closed form.

    >>> import torch
    >>> from lwas_fast import AdamWLW
    >>> model = torch.nn.Linear(4, 1)
    >>> opt = AdamWLW(model)
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> opt.step()
    >>> list(opt.rates())
    ['param']
"""

import importlib.machinery
import importlib.util
import os
import sys

# In a clone the kernels stand beside this package, not in it. The finder of an editable install knows where, but in a
# second clone it finds those of the first, and where nothing is installed there is no finder. So the clone that runs
# takes its own. Not by a longer __path__: every folder of the clone would become a module of this package.
if importlib.machinery.PathFinder.find_spec("lwas_fast.triton_kernels", __path__) is None:
    _spec = importlib.machinery.PathFinder.find_spec("lwas_fast.triton_kernels", [os.path.dirname(__path__[0])])
    if _spec is not None and _spec.loader is not None:
        sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_spec.name])
        triton_kernels = sys.modules[_spec.name]

from lwas_fast.adamw import AdamWLW
from lwas_fast.errors import CurvatureError
from lwas_fast.follow import refresh_norms
from lwas_fast.muon import MuonLW
from lwas_fast.plots import plot_rates
from lwas_fast.sgd import SGDLW
from lwas_fast.update import averaged

__version__ = "0.1.0.dev0"

__all__ = [
    "SGDLW",
    "AdamWLW",
    "CurvatureError",
    "MuonLW",
    "__version__",
    "averaged",
    "plot_rates",
    "refresh_norms",
]
