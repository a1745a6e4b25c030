"""The models of the whole-step benchmarks: full size for a GPU, a narrow version of the same shape for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Problem(NamedTuple):
    """A model and the loss of one fixed batch."""

    model: nn.Module
    loss: Callable[[], Tensor]


def _classified(model: nn.Module, x: Tensor, classes: int) -> Problem:
    y = torch.arange(len(x), device=x.device) % classes
    return Problem(model, lambda: F.cross_entropy(model(x), y))


def mlp(device: str, full: bool) -> Problem:
    """784-1000-1000-10 (4096-wide in full)."""
    width, batch = (4096, 1024) if full else (1000, 128)
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return _classified(nn.Sequential(*layers).to(device), torch.randn(batch, 784, device=device), 10)


def vgg16_bn(device: str, full: bool) -> Problem:
    """VGG16 with BatchNorm for 32x32 pixels; an eighth as wide where not in full."""
    scale, batch = (1, 128) if full else (8, 64)
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width // scale, 3, padding=1), nn.BatchNorm2d(width // scale), nn.ReLU()]
            channels = width // scale
        else:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 // scale, 10)]
    return _classified(nn.Sequential(*layers).to(device), torch.randn(batch, 3, 32, 32, device=device), 10)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = channels == 4 * width and stride == 1
        down = [nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)]
        self.down = nn.Identity() if same else nn.Sequential(*down)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.down(x))


def resnet50(device: str, full: bool) -> Problem:
    """ResNet-50 for 224x224 pixels; an eighth as wide and for 64x64 where not in full."""
    scale, batch, pixels = (1, 64, 224) if full else (8, 16, 64)
    channels = 64 // scale
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width // scale, 2 if stage and not block else 1))
            channels = 4 * width // scale
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000 // scale)]
    x = torch.randn(batch, 3, pixels, pixels, device=device)
    return _classified(nn.Sequential(*layers).to(device), x, 1000 // scale)


class Block(nn.Module):
    """A transformer's block: causal attention and an MLP, each after a LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2, output tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(h)), self.token.weight)


def gpt2(device: str, full: bool) -> Problem:
    """GPT-2 small; 4 layers of width 128, 96 characters where not in full."""
    sizes, batch = ((50257, 1024, 768, 12, 12), 4) if full else ((96, 64, 128, 4, 4), 16)
    model = GPT(*sizes).to(device)
    x = torch.randint(0, sizes[0], (batch, sizes[1] + 1), device=device)
    return Problem(model, lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))


MODELS = {"MLP": mlp, "VGG16-BN": vgg16_bn, "ResNet-50": resnet50, "GPT-2": gpt2}
