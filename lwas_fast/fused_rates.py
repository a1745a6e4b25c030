"""The launch of `triton_kernels/layer_rates.py`: what is laid out once, and what is handed over at each refresh.

Addresses of gradients and products are new at every refresh, hyperparameters may be. Both go to the device in one
copy from pinned memory; nothing comes back, and nothing of them is compiled into the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lwas_fast.curvature import Probe, Products
from lwas_fast.layers import Selection, upload
from lwas_fast.rates import Column, Sums, memory

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what layer_rates.Tensors.KIND says
UNALIGNED = 4


def launch_key(probe: Probe) -> tuple[torch.device, bool, bool]:
    """Probes of which this is equal share a launch."""
    vectors = probe.vectors
    return probe.bucket.table.device, vectors.gradients is not None, vectors.momenta is not None


class Plan:
    """What stays the same from one launch over some probes' selections to the next: chunks, rows, and scratch.

    Args:
        probes: Whose tensors take part, in order.
        chunk: Elements that a program sums up.
    """

    def __init__(self, probes: Sequence[Probe], chunk: int):
        chunks: list[tuple[int, int, int, int]] = []
        firsts: list[int] = []
        rows: list[int] = []
        tensor = layers = 0
        for bucket, selection in ((probe.bucket, probe.selection) for probe in probes):
            for i, param, layer in zip(selection.indices, selection.params, selection.layer, strict=True):
                if layers + layer == len(firsts):
                    firsts.append(len(chunks))
                    rows.append(bucket.table[bucket.row[i]].data_ptr())
                count = param.numel()
                starts = range(0, max(count, 1), chunk)  # an empty tensor has a chunk too: its layer must be finished
                chunks += [(tensor, n, min(chunk, count - s), layers + layer) for n, s in enumerate(starts)]
                tensor += 1
            layers = len(firsts)
        device = probes[0].bucket.table.device
        self.layers = np.array([firsts, np.diff([*firsts, len(chunks)]), rows, rows], np.int64).T  # factors to be set
        self.chunks = upload(chunks, torch.int64, device)
        self.partials = torch.empty(len(chunks), len(Sums), device=device)
        self.arrivals = torch.zeros(layers, dtype=torch.int32, device=device)
        self.one = torch.ones((), device=device)
        self._sent: tuple[bytes, Tensor] | None = None

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Copy some arrays to the device, if they are not there already; each starts at a multiple of 16 bytes."""
        content = b"".join(a.tobytes().ljust(-(-a.nbytes // 16) * 16, b"\0") for a in arrays)
        if self._sent is None or self._sent[0] != content:
            self._sent = content, upload(np.frombuffer(bytearray(content), np.uint8), torch.uint8, self.one.device)
        there, found, start = self._sent[1], [], 0
        for a in arrays:
            dtype = torch.int64 if a.dtype == np.int64 else torch.float32
            found.append(there[start : start + a.nbytes].view(dtype).view(a.shape))
            start += -(-a.nbytes // 16) * 16
        return found


Plans: TypeAlias = "dict[tuple[Selection, ...], Plan]"


def _plan(plans: Plans, probes: Sequence[Probe], chunk: int) -> Plan:
    key = tuple(probe.selection for probe in probes)
    if key not in plans:
        if len(plans) >= 16:  # patterns that never come back must not pile up
            plans.clear()
        plans[key] = Plan(probes, chunk)
    return plans[key]


def _in_one_order(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of one shape as they are if their elements lie in memory in the same order without gaps, else copies."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(tensors[0].dim(), [])
    for form in formats:
        if all(t.is_contiguous(memory_format=form) for t in tensors):
            return tensors
    return [t.contiguous() for t in tensors]


def _tensor_rows(probe: Probe, products: Products, alive: list[Sequence[Tensor]]) -> list[list[int]]:
    """`layer_rates.Tensors` of each tensor of a probe; what has to be kept alive for it is added to `alive`."""
    directions, found = probe.vectors.directions, []
    gradients, momenta = probe.vectors.gradients, probe.vectors.momenta or directions  # those would not be read
    for n, (i, direction) in enumerate(zip(probe.selection.indices, directions, strict=True)):
        product = products.tensors[n]
        if product is None:
            product = torch.zeros_like(direction)
        gradient = product if gradients is None else gradients[n]
        if gradient.dtype != product.dtype:
            gradient, product = gradient.to(torch.float32), product.to(torch.float32)
        streams = _in_one_order((gradient, direction, product, momenta[n]))
        alive.append(streams)
        addresses = [t.data_ptr() for t in streams]
        kind = KINDS[product.dtype] + (UNALIGNED if any(a % 16 for a in addresses) else 0)
        found.append([*addresses, probe.bucket.counts[i].data_ptr(), kind])
    return found


def _numbers(probe: Probe, products: Products, group: dict[str, Any]) -> np.ndarray:
    """`layer_rates.Numbers` of each layer of a probe."""
    common = [
        1.0 if isinstance(products.factor, Tensor) else products.factor,
        group["weight_decay"] + group["damping"],
        0.5 * group["self_concordance"],
        memory(group),
        group["noise_exponent"],
        group["max_growth"],
        group["warmup_rate"],
        float(group["negative_curvature"] == "skip"),
        math.log(probe.decay) if probe.decay > 0 else -math.inf,
    ]
    signs = np.array(probe.signs, np.float32)[:, None]
    return np.hstack([signs, np.tile(np.array(common, np.float32), (len(signs), 1))])


def _layer_rows(
    probes: Sequence[Probe], products: Sequence[Products], plan: Plan, alive: list[Sequence[Tensor]]
) -> np.ndarray:
    """`layer_rates.Layers` of each layer."""
    rows, start = plan.layers.copy(), 0
    for probe, product in zip(probes, products, strict=True):
        factor = plan.one
        if isinstance(product.factor, Tensor):
            factor = product.factor.to(plan.one.device, torch.float32).contiguous()
            alive.append([factor])
        stop = start + len(probe.signs)
        stride = factor.element_size() if factor.dim() else 0
        rows[start:stop, 3] = factor.data_ptr() + stride * np.arange(stop - start)
        start = stop
    return rows


def refresh(
    probes: Sequence[Probe],
    products: Sequence[Products],
    groups: Sequence[dict[str, Any]],
    plans: Plans,
    average: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
    block: int | None = None,
) -> Tensor:
    """Take a measurement of some probes, all of one `launch_key`, into the statistics of their layers, in one launch.

    Args:
        probes: What was measured along; tables are float32.
        products: Their products with the Hessian.
        groups: Their hyperparameters.
        plans: Where layouts are kept; to be forgotten with the buckets.
        average: Takes the sums (L, len(Sums)) of this process to those of all; a second, small launch goes on with
            them then.
        chunk: Elements that a program sums up. Default: the kernel's own.
        block: Elements that it takes at a time; likewise.

    Returns:
        (L, len(Column)), the new rows of the probes' layers, one after the other.
    """
    from lwas_fast.triton_kernels import layer_rates as kernels  # imports Triton

    chunk, block = chunk or kernels.CHUNK, block or kernels.BLOCK
    plan = _plan(plans, probes, chunk)
    alive: list[Sequence[Tensor]] = []
    pairs = list(zip(probes, products, strict=True))
    tensors = np.array([row for pair in pairs for row in _tensor_rows(*pair, alive)], np.int64)
    triples = zip(probes, products, groups, strict=True)
    numbers = np.concatenate([_numbers(*triple) for triple in triples])
    device, with_gradient, with_momentum = launch_key(probes[0])
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        sent = plan.send([tensors, _layer_rows(probes, products, plan, alive), numbers])
        rows = torch.empty(len(numbers), len(Column), device=device)
        out = rows if average is None else torch.empty(len(numbers), len(Sums), device=device)
        kernels.layer_rates[(len(plan.chunks),)](
            sent[0],
            plan.chunks,
            sent[1],
            sent[2],
            plan.partials,
            plan.arrivals,
            out,
            with_gradient=with_gradient,
            with_momentum=with_momentum,
            finish=average is None,
            chunk=chunk,
            block=block,
            at_once=kernels.AT_ONCE,
            num_warps=kernels.WARPS,
        )
        if average is not None:
            kernels.finish_layers[(len(numbers),)](sent[1], sent[2], average(out), rows, num_warps=1)
    return rows


def trial(device: torch.device) -> None:
    """Compile and launch the smaller kernel once, on nothing; raises whatever Triton has to say."""
    from lwas_fast.triton_kernels import layer_rates as kernels

    row = torch.zeros(1, len(Column), device=device)
    layers = upload([[0, 0, row.data_ptr(), 0]], torch.int64, device)
    numbers, sums = torch.zeros(1, len(kernels.Numbers), device=device), torch.zeros(1, len(Sums), device=device)
    with torch.cuda.device(device):
        kernels.finish_layers[(1,)](layers, numbers, sums, row, num_warps=1)
