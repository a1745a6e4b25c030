"""Training from defaults does not collapse, whatever the model and the seed.

Catches: rates that run away or vanish in the first steps (dead ReLUs, saturated tanh, a loss stuck at its start);
differences that do not serve a fused kernel. Digits, 150 steps of 64; "collapsed" is a final loss above the given share
of the first one (-rP prints them all), two to three times the worst that was seen.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import ALL, take_step
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwas_fast import CurvatureError

pytestmark = pytest.mark.slow


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])


class Transformer(nn.Module):
    """One block over the rows of an image."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(torch.randn(8, 32) * 0.02)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.block(self.embed(x.view(-1, 8, 8)) + self.position).mean(1))


def tanh_autoencoder() -> nn.Module:
    sizes = [64, 48, 24, 8, 24, 48, 64]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        0.4,
    ),
    "cnn_batchnorm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        ),
        0.2,
    ),
    # 0.611 is the mean image drawn for every image, and in 150 steps torch's optimizers come to no more either, with
    # whatever rate. So this one catches a loss that stays at its start or rises, not one that stays at the mean.
    "tanh_autoencoder": (tanh_autoencoder, 0.64),
    "lstm": (Recurrent, 0.45),
    "transformer": (Transformer, 0.6),
    # The CPU's fused kernel knows no dropout.
    "fused_transformer": (lambda: Transformer(dropout=0.0), 0.5),
}
# Fused attention has no second derivative, so it has one route. The other models use the kernel that has one.
WAYS = [(name, route) for name in MODELS for route in ("autograd", "closure")]
WAYS.remove(("fused_transformer", "autograd"))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("name", "route"), WAYS)
@pytest.mark.parametrize("kind", ALL)
def test_no_collapse(kind, name, route, seed):
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    make, share = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    opt = ALL[kind](model.named_parameters())
    fused = name == "fused_transformer"

    def loss_on(rows):
        # This kernel and no other: torch raises where it cannot serve.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
            out = model(x[rows])
        if name == "tanh_autoencoder":
            return F.binary_cross_entropy_with_logits(out, x[rows])
        return F.cross_entropy(out, y[rows])

    everything = torch.arange(len(x))
    with torch.no_grad():
        first = loss_on(everything).item()
    if fused:
        with pytest.raises(CurvatureError, match="fused scaled-dot-product attention"):
            opt.backward(loss_on(everything[:64]))
    for _ in range(150):
        rows = torch.randint(0, len(x), (64,))

        take_step(opt, partial(loss_on, rows), route)
    model.eval()
    with torch.no_grad():
        final = loss_on(everything).item()
    print(f"share of the first loss: {final / first:.4f}")
    assert final < share * first, f"{first:.3f} -> {final:.3f}"
