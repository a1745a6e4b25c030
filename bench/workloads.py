"""What the benchmarks work on: the parameter shapes of known models, written out so that no model library is needed."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]


def many_small() -> Shapes:
    """1000 tensors of 1000 numbers: all overhead."""
    return [(1000,)] * 1000


def small_cnn() -> Shapes:
    """Nine convolutions with BatchNorm and two linear layers: 1.3 M numbers in 40 tensors."""
    shapes: Shapes = []
    channels = 3
    for width in (32, 32, 64, 64, 96, 128, 128, 160, 160):
        shapes += [(width, channels, 3, 3), (width,), (width,), (width,)]
        channels = width
    return [*shapes, (560, channels * 5), (560,), (100, 560), (100,)]


def vgg16_bn() -> Shapes:
    """VGG16 with BatchNorm for 32x32 pixels and 10 classes: 14.7 M numbers in 54 tensors (convolutions biased)."""
    shapes: Shapes = []
    channels = 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(width, channels, 3, 3), (width,), (width,), (width,)]
        channels = width
    return [*shapes, (10, 512), (10,)]


def resnet50() -> Shapes:
    """ResNet-50 for 1000 classes: 25.6 M numbers in 161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, kernel in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """GPT-2 small, output tied to the embedding: 124 M numbers in 148 tensors."""
    width = 768
    layer: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(12 * layer), (width,), (width,)]


UPDATE_WORKLOADS = {"1000 x 1k": many_small, "VGG16-BN": vgg16_bn, "ResNet-50": resnet50, "GPT-2 124M": gpt2}


def parameters(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Parameters of these shapes with gradients, random."""
    made = []
    for shape in shapes:
        p = torch.randn(shape, device=device).to(dtype).requires_grad_()
        p.grad = torch.randn(shape, device=device).to(dtype)
        made.append(p)
    return made
