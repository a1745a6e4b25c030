"""The launch of `triton_kernels/layer_rates.py`: what is laid out once, and what is handed over at each refresh.

Addresses of gradients and products are new at every refresh, hyperparameters may be. Both go to the device in one
copy from pinned memory; nothing comes back, and nothing of them is compiled into the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
        self.partials = torch.empty(len(chunks), len(Sums), dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(layers, dtype=torch.int32, device=device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
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


class Launch:
    """A measurement of some probes, all of one `launch_key`, laid out for the kernel.

    Args:
        probes: What was measured along; tables are float32.
        products: Their products with the Hessian.
        groups: Their hyperparameters.
        plans: Where layouts are kept; to be forgotten with the buckets.
        chunk: Elements that a program sums up. Default: the kernel's own.
        block: Elements that it takes at a time; likewise.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        products: Sequence[Products],
        groups: Sequence[dict[str, Any]],
        plans: Plans,
        chunk: int | None = None,
        block: int | None = None,
    ):
        from lwas_fast.triton_kernels import layer_rates as kernels  # imports Triton

        self._kernels = kernels
        self._chunk, self._block = chunk or kernels.CHUNK, block or kernels.BLOCK
        self._plan = _plan(plans, probes, self._chunk)
        self._alive: list[Sequence[Tensor]] = []
        pairs = list(zip(probes, products, strict=True))
        tensors = np.array([row for pair in pairs for row in _tensor_rows(*pair, self._alive)], np.int64)
        triples = zip(probes, products, groups, strict=True)
        numbers = np.concatenate([_numbers(*triple) for triple in triples])
        layers = _layer_rows(probes, products, self._plan, self._alive)
        self._device, self._with_gradient, self._with_momentum = launch_key(probes[0])
        self._sent = self._plan.send([tensors, layers, numbers])
        self._counts = [len(probe.signs) for probe in probes]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _run(self, columns: int, finish: bool) -> tuple[Tensor, ...]:
        plan, kernels = self._plan, self._kernels
        out = torch.empty(len(plan.layers), columns, dtype=torch.float32, device=self._device)
        with self._on_device():
            if self._device.type == "cuda":  # the scratch may have been made on another stream
                for scratch in (*self._sent, plan.chunks, plan.partials, plan.arrivals, plan.one):
                    scratch.record_stream(torch.cuda.current_stream())
            kernels.layer_rates[(len(plan.chunks),)](
                self._sent[0],
                plan.chunks,
                self._sent[1],
                self._sent[2],
                plan.partials,
                plan.arrivals,
                out,
                with_gradient=self._with_gradient,
                with_momentum=self._with_momentum,
                finish=finish,
                chunk=self._chunk,
                block=self._block,
                at_once=kernels.AT_ONCE,
                num_warps=kernels.WARPS,
            )
        return torch.split(out, self._counts)

    def rows(self) -> tuple[Tensor, ...]:
        """For each probe (S, len(Column)), its layers' new statistics, in one launch."""
        return self._run(len(Column), finish=True)

    def sums(self) -> tuple[Tensor, ...]:
        """For each probe (S, len(Sums)), where the launch stops in a distributed run."""
        return self._run(len(Sums), finish=False)

    def finish(self, sums: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Go on from `sums`, averaged over the replicas, to what `rows` gives, in a second, small launch."""
        rows = torch.empty(len(self._plan.layers), len(Column), dtype=torch.float32, device=self._device)
        with self._on_device():
            self._kernels.finish_layers[(len(rows),)](*self._sent[1:], torch.cat(list(sums)), rows, num_warps=1)
        return torch.split(rows, self._counts)


def trial(device: torch.device) -> None:
    """Compile and launch the kernels once, on nothing; raises whatever Triton has to say."""
    from lwas_fast.triton_kernels import layer_rates as kernels

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    row, number = zeros(1, len(Column)), zeros()
    layers = upload([[0, 1, row.data_ptr(), number.data_ptr()]], torch.int64, device)
    tensors = upload([[number.data_ptr()] * kernels.Tensors.KIND + [0]], torch.int64, device)
    numbers, sums = zeros(1, len(kernels.Numbers)), zeros(1, len(Sums))
    chunks, arrivals = zeros(1, len(kernels.Chunks), dtype=torch.int64), zeros(1, dtype=torch.int32)
    flags = {"with_gradient": True, "with_momentum": True, "finish": True, "num_warps": kernels.WARPS}
    sizes = {"chunk": kernels.CHUNK, "block": kernels.BLOCK, "at_once": kernels.AT_ONCE}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.layer_rates[(1,)](tensors, chunks, layers, numbers, sums, arrivals, row, **flags, **sizes)
        kernels.finish_layers[(1,)](layers, numbers, sums, row, num_warps=1)
