"""The launch of `triton_kernels/layer_rates.py`: what is laid out once, and what is handed over at each refresh.

Addresses of gradients and products are new at every refresh, hyperparameters may be. Both go to the device in one
copy from pinned memory; nothing comes back, and nothing of them is compiled into the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lwas_fast.layers import FUSED_DTYPES, Layout, upload
from lwas_fast.measure import Probe, Products, Vectors
from lwas_fast.options import wants_plain
from lwas_fast.rates.when import memory
from lwas_fast.selection import Selection
from lwas_fast.table import Column, Sums

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what layer_rates.Tensors.KIND says
UNALIGNED = 4


def launch_key(probe: Probe) -> tuple[torch.device, bool]:
    """Probes of which this is equal share a launch."""
    return probe.bucket.table.device, probe.vectors.gradients is not None


class Plan:
    """What stays the same from one launch over some probes' selections to the next: chunks, rows, and scratch."""

    def __init__(self, probes: Sequence[Probe], chunk: int):
        chunks: list[tuple[int, int, int, int]] = []
        firsts: list[int] = []
        rows: list[int] = []
        tensor = layers = 0
        for bucket, selection in ((probe.bucket, probe.selection) for probe in probes):
            for i, param, layer in zip(selection.indices, selection.here, selection.layer, strict=True):
                if layers + layer == len(firsts):
                    firsts.append(len(chunks))
                    rows.append(bucket.table[bucket.row[i]].data_ptr())
                count = param.numel()
                starts = range(0, max(count, 1), chunk)  # an empty tensor has a chunk too: its layer must be finished
                chunks += [(tensor, n, min(chunk, count - s), layers + layer) for n, s in enumerate(starts)]
                tensor += 1
            layers = len(firsts)
        device = probes[0].bucket.table.device
        self.layers = np.array([firsts, np.diff([*firsts, len(chunks)]), rows, rows, rows], np.int64).T  # two to be set
        self.chunks = upload(chunks, torch.int64, device)
        self.partials = torch.empty(len(chunks), len(Sums), dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(layers + 1, dtype=torch.int32, device=device)
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
    (gradients, directions), found = probe.vectors, []
    for n, direction in enumerate(directions):
        product = products.tensors[n]
        if product is None:
            product = torch.zeros_like(direction)
        gradient = product if gradients is None else gradients[n]  # that would not be read
        if gradient.dtype != product.dtype:
            gradient, product = gradient.to(torch.float32), product.to(torch.float32)
        streams = _in_one_order((gradient, direction, product))
        alive.append(streams)
        addresses = [t.data_ptr() for t in streams]
        kind = KINDS[product.dtype] + (UNALIGNED if any(a % 16 for a in addresses) else 0)
        found.append([*addresses, kind])
    return found


def _numbers(probe: Probe, products: Products, group: dict[str, Any]) -> np.ndarray:
    """`layer_rates.Numbers` of each layer of a probe."""
    scale = 1.0 if isinstance(products.factor, Tensor) else products.factor
    common = [memory(group), group["warmup_rate"], probe.max_fall]
    rows = [[sign, scale, l2, *common] for sign, l2 in zip(probe.signs, probe.l2, strict=True)]
    return np.array(rows, np.float32)


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
        loss = probe.loss.to(plan.one.device, torch.float32)
        alive.append([loss])
        rows[start:stop, 4] = loss.data_ptr()
        start = stop
    return rows


def launch(
    probes: Sequence[Probe],
    products: Sequence[Products],
    groups: Sequence[dict[str, Any]],
    plans: Plans,
    finish: bool = True,
    chunk: int | None = None,
    block: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take a measurement of some probes, all of one `launch_key`, into the rates, in one launch.

    Args:
        probes: What was measured along; tables are float32.
        products: Their products with the Hessian.
        groups: Their hyperparameters.
        plans: Where layouts are kept; to be forgotten with the buckets.
        finish: Whether to go on from sums to statistics; not in a distributed run.
        chunk: Elements that a program sums up. Default: the kernel's own.
        block: Elements that it takes at a time; likewise.

    Returns:
        For each probe (S, len(Sums)), the sums; and if it is to `finish`, (S, len(Column)), its layers' new statistics.
    """
    from lwas_fast.triton_kernels import layer_rates as kernels  # imports Triton

    chunk, block = chunk or kernels.CHUNK, block or kernels.BLOCK
    plan = _plan(plans, probes, chunk)
    alive: list[Sequence[Tensor]] = []  # until the launch is enqueued
    rows = [row for pair in zip(probes, products, strict=True) for row in _tensor_rows(*pair, alive)]
    numbers = np.concatenate([_numbers(*triple) for triple in zip(probes, products, groups, strict=True)])
    sent = plan.send([np.array(rows, np.int64), _layer_rows(probes, products, plan, alive), numbers])
    device, with_gradient = launch_key(probes[0])
    count = len(plan.layers)
    sums = torch.empty(count, len(Sums), dtype=torch.float32, device=device)
    out = torch.empty(count, len(Column), dtype=torch.float32, device=device) if finish else sums
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if device.type == "cuda":  # the scratch may have been made on another stream
            for scratch in (*sent, plan.chunks, plan.partials, plan.arrivals, plan.one):
                scratch.record_stream(torch.cuda.current_stream())
        tensors, layers, of_layers = sent
        kernels.layer_rates[(len(plan.chunks),)](
            tensors,
            plan.chunks,
            layers,
            of_layers,
            plan.partials,
            plan.arrivals,
            sums,
            out,
            count,
            with_gradient=with_gradient,
            finish=finish,
            chunk=chunk,
            block=block,
            at_once=kernels.AT_ONCE,
            num_warps=kernels.WARPS,
        )
    sizes = [len(probe.signs) for probe in probes]
    return torch.split(sums, sizes), torch.split(out, sizes) if finish else ()


def triton_version() -> str | None:
    """The version of Triton, really imported: an installation whose compiled part does not load is as good as none."""
    try:
        import triton

        return str(triton.__version__)
    except Exception:  # not only ImportError: a broken driver or a missing system library raises others
        return None


def why_not(device: torch.device) -> str | None:
    """Why the single launch does not serve a device; None where it does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    return _fails(device)


@cache
def _fails(device: torch.device) -> str | None:
    """Try it once: Triton is there without being of use where the C compiler is missing that it needs."""
    if triton_version() is None:
        return "Triton is not installed"
    try:
        trial(device)
    except Exception as error:  # whatever it is, training goes on without
        return f"Triton does not work here ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def serves(group: dict[str, Any], probe: Probe) -> bool:
    """Whether the single launch takes a measurement into a bucket's rates; if not, plain torch does."""
    bucket = probe.bucket
    if wants_plain(group) or bucket.mixed:
        return False
    float32 = bucket.table.dtype == torch.float32 and all(p.dtype in FUSED_DTYPES for p in bucket.params)
    return float32 and why_not(bucket.table.device) is None


def trial(device: torch.device) -> None:
    """Compile and launch the kernels once, on next to nothing; raises whatever Triton has to say."""
    p = torch.zeros(1, device=device)
    group = {"params": [p], "layer_names": ["trial"], "warmup_rate": 1.0}
    group |= {"steps": 0, "warmup_steps": 0, "update_every": None, "last_refresh": None}
    (bucket,) = Layout([group], {}, lambda _: ()).buckets
    probe = Probe(bucket, bucket.select([0]), Vectors([p], [p]), [1.0], 1.0, p[0], [0.0])
    launch([probe], [Products([p], 1.0)], [group], {})
