"""Refreshes and fused steps with odd sizes and alignments, within the cap and beyond it: for compute-sanitizer."""

from __future__ import annotations

import itertools

import torch

from lwas_fast import SGDLW, AdamWLW

SIZES = (0, 1, 31, 1025, 32767, 32769, 70001)


def main() -> None:
    """Take the steps; print a number, so that nothing can be left out."""
    total = torch.zeros((), device="cuda")
    for kind in (AdamWLW, SGDLW):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for cap, free in itertools.product((0.1, 1e-4), (False, True)):
                params = [
                    torch.randn(n + 3, device="cuda").to(dtype)[k:].requires_grad_() for k in (0, 3) for n in SIZES
                ]
                opt = kind(params, update_every=2, schedule_free=free, cap=cap, fused=True)
                for scale in (1, 1, 1e3):  # the last step turns out to be far too long
                    opt.zero_grad()
                    loss = sum((p.float() ** 2 * torch.randn_like(p.float())).sum() for p in params)
                    opt.backward(scale * loss)
                    opt.step()
                total += sum(p.detach().float().sum() for p in params)
    print("sum of all weights:", total.item())


if __name__ == "__main__":
    main()
