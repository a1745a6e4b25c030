"""The models of the training-quality suite that neither the demo nor bench/models.py has.

Attention is written out: the fused kinds have no second derivative, which measuring the curvature needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Tanh layers down to a linear code and, mirrored, back up to linear outputs, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    both = [*widths, *reversed(widths[:-1])]
    for i, (before, after) in enumerate(zip(both[:-1], both[1:], strict=True)):
        layers.append(nn.Linear(before, after))
        if i not in (len(widths) - 2, len(both) - 2):  # the code, the output
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


VGG = {11: ((1, 1, 2, 2, 2), False), 16: ((2, 2, 3, 3, 3), True)}  # convolutions a stage; whether with BatchNorm


def vgg(depth: int, scale: int) -> nn.Sequential:
    """VGG11, or VGG16 with BatchNorm, for 32x32 pixels and 10 classes, its widths divided by `scale`."""
    stages, norm = VGG[depth]
    layers: list[nn.Module] = []
    channels = 3
    for convolutions, full_width in zip(stages, (64, 128, 256, 512, 512), strict=True):
        width = full_width // scale
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
            nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")  # torch's default fades over 8 layers
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def sparse_start(model: nn.Module, connections: int = 15) -> None:
    """Martens' start: so many weights of each unit from N(0, 1), the others and the biases 0.

    As for logistic units; for tanh, Martens (2010) has biases of 0.5 instead.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                chosen = torch.rand(layer.weight.shape).argsort(1) < connections
                layer.weight.copy_(torch.randn(layer.weight.shape) * chosen)
                layer.bias.zero_()


def subsample(x: Tensor) -> Tensor:
    """ResNet's shortcut without weights: every other pixel, and as many channels of zeros as there are."""
    before = x.shape[1] // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, x.shape[1] - before))


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions; where the shape changes, the shortcut has weights (`project`) or none."""

    def __init__(self, channels: int, width: int, stride: int, project: bool = True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        down = [nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        same = channels == width and stride == 1
        self.down = nn.Identity() if same or not project else nn.Sequential(*down)
        self.subsamples = not (same or project)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (subsample(x) if self.subsamples else self.down(x)))


def resnet(width: int, blocks: int, stride: int = 1, project: bool = True) -> nn.Sequential:
    """ResNet for 32x32 pixels and 10 classes: three stages of `blocks` blocks, of 1, 2 and 4 times `width` channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(3):
        for block in range(blocks):
            layers.append(BasicBlock(channels, width * 2**stage, 2 if stage and not block else 1, project))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    """A transformer's block: attention and an MLP, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.drop = heads, causal, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias), nn.GELU(), nn.Linear(4 * width, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        x = x + self.drop(self.out((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm2(x)))


class CharTransformer(nn.Module):
    """A transformer over characters, its output tied to the embedding; causal, or one that sees both sides."""

    def __init__(
        self, vocabulary: int, length: int, width: int, depth: int, heads: int, causal: bool = True,
        bias: bool = True, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, causal, bias, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=bias)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)  # GPT-2's: at torch's 1 the tied output starts far off

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.token(x) + self.position.weight[: x.shape[1]])
        return F.linear(self.norm(self.blocks(h)), self.token.weight)


def gpt(vocabulary: int, length: int, width: int, depth: int, heads: int, **options: Any) -> CharTransformer:
    """A causal transformer that starts as GPT-2 does: N(0, 0.02²), what a block adds by 1/sqrt(2 depth) less."""
    model = CharTransformer(vocabulary, length, width, depth, heads, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in model.blocks:
        for layer in (block.out, block.mlp[-1]):
            nn.init.normal_(layer.weight, std=0.02 / (2 * depth) ** 0.5)
    return model


class MixerBlock(nn.Module):
    """MLP-Mixer's block: one MLP over the patches and one over the channels, each after a LayerNorm."""

    def __init__(self, patches: int, width: int, across: int, within: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(patches, across), nn.GELU(), nn.Linear(across, patches))
        self.within = nn.Sequential(nn.Linear(width, within), nn.GELU(), nn.Linear(within, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


def mixer(patch: int, width: int, depth: int) -> nn.Sequential:
    """MLP-Mixer for grey images of 28x28 pixels and 10 classes.

    The patches' biases start at 0, as its authors have it: a black patch gives the first LayerNorm nothing but zeros.
    """
    patches, cut = (28 // patch) ** 2, nn.Conv2d(1, width, patch, patch)
    nn.init.zeros_(cut.bias)
    blocks = [MixerBlock(patches, width, width // 2, 2 * width) for _ in range(depth)]
    return nn.Sequential(cut, Rows(), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, 10))


class Rows(nn.Module):
    """From channels of pixels to pixels with channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


class Mean(nn.Module):
    """Over the pixels, or patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ViT(nn.Module):
    """A vision transformer for 32x32 pixels and 10 classes, which averages over its patches."""

    def __init__(self, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((32 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.output(self.norm(self.blocks(h)).mean(1))


class CharLSTM(nn.Module):
    """One LSTM layer over characters."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent layers have no second derivative
            return self.output(self.lstm(self.token(x))[0])


class GCN(nn.Module):
    """Two graph convolutions with dropout before each; the graph is a buffer, dense and normalised."""

    def __init__(self, graph: Tensor, features: int, width: int, classes: int, dropout: float = 0.5):
        super().__init__()
        self.register_buffer("graph", graph, persistent=False)
        self.hidden, self.output, self.dropout = nn.Linear(features, width), nn.Linear(width, classes), dropout
        for layer in (self.hidden, self.output):  # as the GCN's authors initialise
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x, self.dropout, self.training)
        h = F.relu(self.graph @ self.hidden(h))
        return self.graph @ self.output(F.dropout(h, self.dropout, self.training))
