"""Train PyTorch models without a learning rate.

:class:`AdamWLW` and :class:`SGDLW` measure the curvature of the loss along each layer's own descent
direction and turn it into that layer's step size in closed form.

    >>> import torch
    >>> from lwas_fast import AdamWLW
    >>> model = torch.nn.Linear(4, 1)
    >>> opt = AdamWLW(model.named_parameters())
    >>> opt.backward(model(torch.ones(8, 4)).square().mean())
    >>> opt.step()
    >>> list(opt.rates())
    ['param']
"""

from lwas_fast.adamw import AdamWLW
from lwas_fast.averaging import averaged
from lwas_fast.errors import CurvatureError
from lwas_fast.sgd import SGDLW

__version__ = "0.1.0.dev0"

__all__ = ["SGDLW", "AdamWLW", "CurvatureError", "__version__", "averaged"]
