"""Measurements in a run of several replicas under DistributedDataParallel.

The gradient's graph is this process's; the gradient itself is to be the replicas' average, which DDP takes when the
parameters' AccumulateGrad nodes are reached. So a gradient that was taken apart from ``backward`` is handed to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lwas_fast.errors import CurvatureError
from lwas_fast.shards import summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CLOSURE = "or make the optimizer with the model and call loss.backward(), or use opt.step(closure)"


def replicas(group: ProcessGroup | None = None) -> int:
    """How many processes there are, of a group or in all."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(group) if there else 1


def check(ddp: DistributedDataParallel | None) -> None:
    """Refuse to measure by autograd where replicas would drift apart. Nothing has been changed by then.

    Raises:
        TypeError: `ddp` is something else.
        CurvatureError: A distributed run without `ddp`, or DDP in a mode that does not work.
    """
    if ddp is None:
        if replicas() > 1:
            raise CurvatureError(
                "in a distributed run opt.backward must know what averages the gradients: write "
                f"opt.backward(loss, ddp=model), with model the DistributedDataParallel, {_CLOSURE}"
            )
    elif not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp= must be the DistributedDataParallel module, not {type(ddp).__name__}")
    elif ddp.static_graph:
        raise CurvatureError(
            f"DistributedDataParallel's static_graph=True cannot be measured: leave it out, {_CLOSURE}"
        )
    elif (why := why_not_all(ddp)) is not None:
        raise why


def why_not_all(ddp: DistributedDataParallel | None) -> CurvatureError | None:
    """What to say where replicas may be missing, which would be waited for; None where all take each step."""
    if ddp is None or not ddp._join_config.enable:
        return None
    return CurvatureError(
        "inside DistributedDataParallel.join() a rank that has run out of batches takes no part in measurements: give "
        "all ranks as many batches"
    )


def agree(groups: list[tuple[ProcessGroup, Any]], works: bool) -> bool:
    """Whether something works on all processes of some groups, each given with the device on which it talks.

    A message of one number to each, of which it waits for the answer.
    """
    for group, device in groups:
        failed = torch.tensor([0.0 if works else 1.0], device=device)
        torch.distributed.all_reduce(failed, group=group)
        works = works and failed.item() == 0
    return works


def refuse_accumulation() -> None:
    """Refuse differences of gradients on the last of several micro-batches: DDP would average that one alone.

    Raises:
        CurvatureError: A distributed run.
    """
    if replicas() > 1:
        raise CurvatureError(
            'in a distributed run hvp="finite_difference" cannot measure with accumulated gradients: use '
            'hvp="autograd", or accumulate within the closure of opt.step(closure)'
        )


def accumulate(graph: dict[Tensor, Tensor]) -> None:
    """Give each leaf its gradient by way of its AccumulateGrad node, where DDP waits for it.

    Raises:
        CurvatureError: A gradient hook, which would run a second time. No gradient has been touched.
    """
    if hooked := [leaf for leaf in graph if leaf._backward_hooks]:
        raise CurvatureError(
            f"a parameter of shape {tuple(hooked[0].shape)} has a gradient hook (register_hook), which would run twice "
            f"in a distributed run: use register_post_accumulate_grad_hook, {_CLOSURE}"
        )
    torch.autograd.backward(list(graph), [gradient.detach() for gradient in graph.values()])


def average_loss(loss: Tensor, group: ProcessGroup | None) -> Tensor:
    """A loss, in a distributed run averaged over a group, or over all processes, which then take this step together."""
    return loss if replicas(group) == 1 else average([loss], group)[0]


def average(values: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Average tensors over the replicas, in one message."""
    return [total / replicas(group) for total in summed(values, [group])]
