"""What the tests of sharded parameters share: a net on several processes, and what a run of it comes to."""

from __future__ import annotations

import torch
from cases import small_net
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model, parts=(0,), **how):
    """Shard a net by FSDP2: some of its layers in groups of their own, and the rest."""
    for part in parts:
        fully_shard(model[part], **how)
    return fully_shard(model, **how)


def sharded(dtype=torch.float64, parts=(0,), **how):
    """The small net likewise. Its layers have 5, 4 and 2 rows: uneven shards on two processes, empty ones on four."""
    return shard(small_net(dtype), parts, **how)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def result_of(opt, model, losses):
    state = opt.state_dict()["state"]
    return {
        "losses": torch.tensor(losses),
        "weights": [whole(p) for p in model.parameters()],
        "states": {k: {n: whole(v) for n, v in of_param.items()} for k, of_param in state.items()},
        "rates": opt.rates(),
        "by": opt.measured_by,
    }
