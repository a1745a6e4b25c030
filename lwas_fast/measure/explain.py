"""What autograd raises in a curvature pass, told in the user's terms: which operation, and the ways out."""

from __future__ import annotations

import re

import torch

from lwas_fast.errors import CurvatureError, FailsAgainError

# The error that autograd raises -> what the user called, and what to do about it besides finite differences.
_NO_DOUBLE_BACKWARD = (
    (
        r"scaled_dot_product|_flash_attention|_efficient_attention",
        "fused scaled-dot-product attention",
        "run the forward pass of refresh steps under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    ),
    (
        r"aot_autograd does not currently support double backward|torch\.compile|donated buffer",
        "what torch.compile has compiled",
        "call the uncompiled function or module (compiled._orig_mod) when opt.curvature_due is true",
    ),
    (
        r"cudnn_rnn|CuDNN RNN|miopen_rnn",  # the flags below switch MIOpen, its counterpart on AMD GPUs, too
        "a cuDNN recurrent layer",
        "run the forward pass of refresh steps under torch.backends.cudnn.flags(enabled=False)",
    ),
    (
        r"mkldnn_rnn|MkldnnRnn",
        "an mkldnn recurrent layer",
        "run the forward pass of refresh steps under torch.backends.mkldnn.flags(enabled=False)",
    ),
    (
        r"use_reentrant|utils\.checkpoint is incompatible|Checkpointing is not compatible",
        "reentrant activation checkpointing",
        "pass use_reentrant=False to torch.utils.checkpoint.checkpoint",
    ),
    (
        r"once_differentiable",
        "a custom autograd function marked once_differentiable",
        "give that function a differentiable backward",
    ),
)
_NOT_IMPLEMENTED = re.compile(r"derivative for '?([\w:]+)'? is not implemented")
_OUT_OF_MEMORY = re.compile(r"(CUDA|HIP|MPS|XPU)\b.* out of memory|you tried to allocate")
_FREED = re.compile(r"backward through the graph a second time|saved intermediate values of the graph")


def out_of_memory(error: Exception) -> bool:
    """Whether memory was what an operation lacked, of a device or of the host (whose error has no class of its own)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def explain(error: Exception) -> CurvatureError | None:
    """Translate what was raised in a curvature pass.

    Args:
        error: The exception of ``torch.autograd.grad``, or of what an evaluation or a copy lacked memory for.

    Returns:
        An error that names the operation and the ways out, or None where the cause is another one (a bug of the model's
        own): that one is the user's to see unchanged.
    """
    text = str(error)
    if out_of_memory(error):
        return FailsAgainError(
            f"the curvature pass ran out of memory ({text.splitlines()[0] if text else type(error).__name__}). Use "
            'smaller micro-batches; or hvp="finite_difference" with opt.step(closure), which needs room for a copy of '
            "the weights and of the gradients, and none for a second derivative"
        )
    if not isinstance(error, RuntimeError):
        return None
    fallback = (
        'or measure by finite differences, which need no second derivative: hvp="finite_difference" with '
        "opt.step(closure), the closure being PyTorch's usual one (zero_grad, loss, backward, return loss)"
    )
    for pattern, operation, remedy in _NO_DOUBLE_BACKWARD:
        if re.search(pattern, text):
            return CurvatureError(
                f"the curvature pass needs the second derivative of {operation}, which PyTorch does not have. "
                f"Either {remedy}; {fallback}."
            )
    if _FREED.search(text):
        return CurvatureError(
            "the graph of this loss is gone, so neither its gradient nor its curvature can be had. Call "
            "opt.backward(loss) in place of loss.backward(), not after it, and once for each forward pass."
        )
    if found := _NOT_IMPLEMENTED.search(text):
        return CurvatureError(
            f"the curvature pass needs the derivative of {found[1]}, which PyTorch does not have. "
            f"Either express that operation by others; {fallback}."
        )
    return None
