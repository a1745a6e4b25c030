"""Models of Llama's shapes, without memory: on the meta device, sharded over ranks that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore


class Shape(NamedTuple):
    """What a model is made of.

    Attributes:
        blocks: How many.
        width: Of the residual stream.
        hidden: Of the MLPs.
        keys: Width of keys and of values: less than `width` where heads share them.
        vocabulary: Tokens that there are; embedding and output are not tied.
    """

    blocks: int
    width: int
    hidden: int
    keys: int
    vocabulary: int = 32000


SHAPES = {
    "1B": Shape(22, 2048, 5632, 256),  # TinyLlama's
    "7B": Shape(32, 4096, 11008, 4096),  # these three Llama 2's
    "13B": Shape(40, 5120, 13824, 5120),
    "70B": Shape(80, 8192, 28672, 1024),
}


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    """A block's parameters; the attention itself has none, and is left out."""

    def __init__(self, shape: Shape):
        super().__init__()
        width, hidden, keys = shape.width, shape.hidden, shape.keys
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (_linear(width, n) for n in (width, keys, keys, width))
        self.gate, self.up, self.down = _linear(width, hidden), _linear(width, hidden), _linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = self.q(y) + (self.k(y) + self.v(y)).mean(-1, keepdim=True)  # each of them gets a gradient
        x = x + self.o(mixed)
        y = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A model's parameters, as many tensors and layers as Llama has."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm, self.output = nn.RMSNorm(shape.width), _linear(shape.width, shape.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def on_meta(shape: Shape) -> Llama:
    """A model whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return Llama(shape)


@contextmanager
def fake_ranks(count: int, replicas: int = 1) -> Iterator[DeviceMesh]:
    """A mesh of so many ranks, of which this process is the first and the others are not there: messages do nothing.

    With `replicas`, that many groups of ranks hold all of the model each (HSDP).
    """
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        shape, names = (
            ((count,), ("shard",)) if replicas == 1 else ((replicas, count // replicas), ("replicas", "shard"))
        )
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        torch.distributed.destroy_process_group()


def shard(model: Llama, mesh: DeviceMesh, half: bool = True) -> Llama:
    """FSDP2 on each block and on the rest; `half`: weights gathered in bfloat16, gradients reduced in float32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)
