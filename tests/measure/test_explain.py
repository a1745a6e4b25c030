"""Where there is no second derivative: the error names what was called and the right way out.

Catches: a message of torch's that is not recognised, or taken for another operation's; a cause that is the user's own
turned into ours; a remedy that does not work. Messages are torch's own, word for word; where one can be had on a CPU
the operation itself raises it, so that a torch that words it anew is noticed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW, CurvatureError
from lwas_fast.measure.explain import explain

ATTENTION, COMPILED, RNN = "SDPBackend.MATH", "_orig_mod", r"torch.backends.cudnn.flags\(enabled=False\)"
NO_DERIVATIVE = "derivative for aten::{} is not implemented"
NOT_IMPLEMENTED = "the derivative for '{}' is not implemented."
CUDNN = (
    "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API. To run double backwards, "
    "please disable the CuDNN backend temporarily while running the forward pass of your RNN. For example: \n"
    "with torch.backends.cudnn.flags(enabled=False):\n    output = model(inputs)"
)
FREED = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already been "
    "freed). Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). Specify "
    "retain_graph=True if you need to backward through the graph a second time or if you need to access saved tensors "
    "after calling backward."
)
MESSAGES = {
    "cudnn rnn": (NOT_IMPLEMENTED.format("_cudnn_rnn_backward") + " " + CUDNN, RNN),
    "cudnn rnn, no reason": (NOT_IMPLEMENTED.format("_cudnn_rnn_backward"), RNN),
    "cudnn rnn, reason only": (CUDNN, RNN),
    "miopen rnn": (NOT_IMPLEMENTED.format("miopen_rnn_backward"), RNN),
    "mkldnn rnn": (NOT_IMPLEMENTED.format("mkldnn_rnn_layer_backward"), r"mkldnn.flags\(enabled=False\)"),
    "flash": (NO_DERIVATIVE.format("_scaled_dot_product_flash_attention_backward"), ATTENTION),
    "flash on a CPU": (NO_DERIVATIVE.format("_scaled_dot_product_flash_attention_for_cpu_backward"), ATTENTION),
    "efficient": (NO_DERIVATIVE.format("_scaled_dot_product_efficient_attention_backward"), ATTENTION),
    "cudnn attention": (NO_DERIVATIVE.format("_scaled_dot_product_cudnn_attention_backward"), ATTENTION),
    "flash alone": (NO_DERIVATIVE.format("_flash_attention_backward"), ATTENTION),
    "efficient alone": (NO_DERIVATIVE.format("_efficient_attention_backward"), ATTENTION),
    "aot_autograd": ("torch.compile with aot_autograd does not currently support double backward", COMPILED),
    "donated buffers": (
        "This backward function was compiled with non-empty donated buffers which requires create_graph=False and "
        "retain_graph=False. Please keep backward(create_graph=False, retain_graph=False) across all backward() "
        "function calls, or set torch._functorch.config.donated_buffer=False to disable donated buffer.",
        COMPILED,
    ),
    "reentrant": (
        "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad() or passing an `inputs` parameter "
        "to .backward(). To resolve this error, you can either set use_reentrant=False, or call .backward() without "
        "passing the `inputs` argument.",
        "pass use_reentrant=False",
    ),
    "once": (
        "trying to differentiate twice a function that was marked with @once_differentiable",
        "differentiable backward",
    ),
    "ctc": (NO_DERIVATIVE.format("_ctc_loss_backward"), "derivative of aten::_ctc_loss_backward.*Either express"),
    "cdist": (NOT_IMPLEMENTED.format("_cdist_backward"), "derivative of _cdist_backward.*Either express"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_right_remedy_is_named(name):
    text, remedy = MESSAGES[name]
    found = explain(RuntimeError(text))
    assert isinstance(found, CurvatureError)
    pytest.raises(CurvatureError, lambda: (_ for _ in ()).throw(found)).match(rf"(?s){remedy}.*finite_difference")
    others = {ATTENTION, COMPILED, "cudnn.flags", "mkldnn.flags", "use_reentrant", "express that"}
    named = [other for other in others if other in str(found)]
    assert len(named) <= 1, "one remedy, and not another operation's"


def test_a_used_graph_is_not_a_missing_derivative():
    found = explain(RuntimeError(FREED))
    assert "in place of loss.backward()" in str(found)
    assert "finite_difference" not in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "element 0 of tensors does not require grad and does not have a grad_fn",  # a loss linear in the parameters
        "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
        "one of the variables needed for gradient computation has been modified by an inplace operation",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_other_causes_are_left_as_they_are(text):
    assert explain(RuntimeError(text)) is None


def used_up(x):
    loss = x.square().sum()
    loss.backward()
    return loss


OPERATIONS = {
    "flash on a CPU": lambda x: F.scaled_dot_product_attention(*[x.unflatten(-1, (2, 4)).unsqueeze(0)] * 3).sum(),
    "ctc": lambda x: F.ctc_loss(x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), (6,), (2,)),
    "aot_autograd": lambda x: torch.compile(lambda y: y.tanh().square(), backend="aot_eager")(x).sum(),
}


def test_a_compiled_function_without_parameters_is_noticed():
    """A compiled loss, say: autograd finds no path through it and would give a curvature of 0 without a word."""
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    loss = torch.compile(lambda out: out.tanh().square().mean(), backend="aot_eager")
    with pytest.raises(CurvatureError, match=COMPILED):
        AdamWLW(model.named_parameters()).backward(loss(model(x)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_still_words_it_so(name):
    """The operation raises the message of the table above; the optimizer explains it and has changed nothing."""
    weight = nn.Parameter(torch.randn(6, 8))
    opt = AdamWLW([weight])
    before = weight.detach().clone()
    with pytest.raises(CurvatureError, match=MESSAGES[name][1]) as caught:
        opt.backward(OPERATIONS[name](weight * 1.0))
    assert str(caught.value.__cause__) == MESSAGES[name][0]
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
    assert not opt.state


def test_torch_still_words_a_used_graph_so():
    weight = nn.Parameter(torch.randn(6, 8))
    with pytest.raises(CurvatureError, match="in place of loss.backward") as caught:
        AdamWLW([weight]).backward(used_up(weight))
    assert str(caught.value.__cause__) == FREED


def test_errors_of_the_users_own_come_through():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("my own mistake")

    weight = nn.Parameter(torch.randn(3))
    with pytest.raises(RuntimeError, match="^my own mistake$") as caught:
        AdamWLW([weight]).backward(Broken.apply(weight).sum())
    assert not isinstance(caught.value, CurvatureError)
