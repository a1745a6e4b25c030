"""An optimizer that follows its model: evaluation sees the average, plain ``loss.backward()`` measures.

Catches: a due step that is not measured, or measured twice or otherwise than by `opt.backward`; a marked tensor or a
hook that outlives its step or optimizer; evaluation, a state dict or a checkpoint with the wrong set of weights; a
resumed run that differs in a bit.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast import measure
from lwas_fast.measure.watch import Watched

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
STEPS = 25


def followed(kind, model=None, **options):
    model = small_net(torch.float32) if model is None else model
    return model, OPTIMIZERS[kind](model, **options)


def explicit(kind, model, **options):
    """The same optimizer, told everything."""
    return OPTIMIZERS[kind](model.named_parameters(), weight_decay_on="matrices", **options)


def steps(opt, model, data, parts=1):
    for batch in data:
        for part, micro in enumerate(zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True)):
            loss = loss_of(model, micro) / parts
            loss.backward() if opt._now.following else opt.backward(loss, last=part == parts - 1)
        opt.step()
        opt.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@EACH
@pytest.mark.parametrize("options", [{}, {"schedule_free": False}, {"curvature": "blocks"}, {"weight_decay": 0.1}])
def test_plain_backward_is_opt_backward(kind, options):
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind, **options)
    other = small_net(torch.float32)
    told = explicit(kind, other, **options)
    steps(opt, model, data)
    steps(told, other, data)
    assert same(weights(model), weights(other))
    assert opt.diagnostics() == told.diagnostics()
    assert (opt.measured_by, told.measured_by) == ("loss.backward", "opt.backward")
    assert all(row["refreshes"] == 3 for row in opt.diagnostics().values())


@EACH
def test_names_and_groups(kind):
    model = small_net(torch.float32)
    for wrapped in (model, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        _, opt = followed(kind, wrapped)
        (group,) = opt.param_groups
        assert list(opt.rates()) == ["0", "2", "4"]
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
        assert group["weight_decay_on"] == "matrices"
        assert opt._layout.buckets[0].decays == [True, False] * 3
    assert followed(kind, weight_decay_on="all")[1].param_groups[0]["weight_decay_on"] == "all"
    with pytest.raises(ValueError, match="none of the module's parameters"):
        opt.follow(small_net())


@EACH
def test_accumulation_needs_no_last(kind, monkeypatch):
    """The first window measures each micro-batch, for its length is not known; later ones the last."""
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind, update_every=4)
    other = small_net(torch.float32)
    told = explicit(kind, other, update_every=4)
    seen = []
    original = measure.in_passing

    def in_passing(*args):
        seen.append(sum(p.grad is not None for p in model.parameters()))
        return original(*args)

    monkeypatch.setattr(measure, "in_passing", in_passing)
    steps(opt, model, data, parts=2)
    steps(told, other, data, parts=2)
    assert same(weights(model), weights(other))
    assert seen == [0] + 7 * [
        6
    ]  # gradients that stood before: the first micro-batch of the first window alone has none


@EACH
@pytest.mark.parametrize("divided", [True, False])
def test_earlier_gradients_and_their_share_do_not_matter(kind, divided):
    """Equal micro-batches, divided or not, accumulated in any way: the rates of the joint batch."""
    batch = batches(1, torch.float64)[0]
    found = []
    for parts in (1, 3):
        for way in ("followed", "told", "told late") if parts > 1 else ("told",):
            model = small_net()
            eps = {"eps": 1e-30} if kind == "adamw" else {}  # of the gradients' scale
            opt = OPTIMIZERS[kind](model, **eps) if way == "followed" else explicit(kind, model, **eps)
            for part in range(parts):
                loss = loss_of(model, batch) / (parts if divided else 1)
                if way == "followed" or (way == "told late" and part < parts - 1):
                    loss.backward()
                else:
                    opt.backward(loss, last=part == parts - 1)
            opt.step()
            rates = torch.tensor(list(opt.rates().values()), dtype=torch.float64)
            # What plain SGD's step is long by, its rate is short by.
            found.append(rates * (1 if divided or kind == "adamw" else parts))
    for rates in found[1:]:
        torch.testing.assert_close(rates, found[0], rtol=1e-9, atol=0)


@EACH
def test_evaluation_sees_the_average_and_training_goes_on(kind):
    data = batches(2 * STEPS, torch.float32)
    model, opt = followed(kind)
    other = small_net(torch.float32)
    told = explicit(kind, other)
    for half in (data[:STEPS], data[STEPS:]):
        steps(opt, model, half)
        steps(told, other, half)
        model.eval()
        told.eval()
        with torch.no_grad():
            assert torch.equal(model(half[0][0]), other(half[0][0]))
            assert torch.equal(model(half[0][0]), other(half[0][0]))  # and again, for it is idempotent
        assert same(weights(model), weights(other))
        model.train()
        told.train()


@pytest.mark.parametrize("how", ["part", "nested part", "inference mode", "mode set by hand", "generate"])
def test_whatever_is_called_in_evaluation_mode_sees_the_average(how):
    model = nn.Sequential(small_net(torch.float32), nn.Sequential(nn.Linear(2, 2)))
    _, opt = followed("adamw", model)
    steps(opt, model, batches(STEPS, torch.float32))
    x = torch.ones(1, 3)
    with opt.averaged():
        expected = model[0](x).detach()
    trained = model[0](x).detach()
    assert not torch.equal(expected, trained)
    if how == "mode set by hand":
        for part in model.modules():
            part.training = False
    else:
        model.eval()
    with torch.inference_mode() if how == "inference mode" else torch.no_grad():
        if how == "generate":
            for _ in range(3):
                model(x)
        found = model[0][4](model[0][:4](x)) if how == "nested part" else model[0](x)
    if how == "nested part":  # the slice is a module of its own, unknown: what comes after it is not
        assert not opt._now.following.trained
    else:
        assert torch.equal(found, expected)
    model.train()
    assert torch.allclose(model[0](x), trained, atol=1e-6)


@EACH
def test_state_dict_has_the_average_in_either_mode(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(STEPS, torch.float32))
    with opt.averaged():
        average = weights(model)
    trained = weights(model)
    assert same(model.state_dict().values(), average)
    assert same(model[0].state_dict().values(), average[:2])
    assert same(model.state_dict(keep_vars=True).values(), trained)
    assert same(weights(model), trained)
    model.eval()
    assert same(model.state_dict().values(), average)
    assert same(opt.averaged_state_dict(model).values(), average)


def test_tied_weights_stay_one_tensor_in_a_state_dict():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    opt = OPTIMIZERS["adamw"](model)
    steps(opt, model, [(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))] * 3)
    saved = model.state_dict()
    assert saved["0.weight"] is saved["2.weight"]
    steps(opt, model, [(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))])
    assert not torch.equal(model.state_dict()["0.weight"], saved["0.weight"])


ORDERS = list(itertools.permutations(["model", "optimizer"]))


@EACH
@pytest.mark.parametrize("saves", ORDERS, ids=lambda order: f"save {order[0]} first")
@pytest.mark.parametrize("loads", ORDERS, ids=lambda order: f"load {order[0]} first")
@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit_in_any_order(kind, saves, loads, mode, dtype):
    data = batches(2 * STEPS, dtype)
    model, opt = followed(kind, small_net(dtype))
    steps(opt, model, data[:STEPS])
    if mode == "evaluation":
        model.eval()
        model(data[0][0])
    files = {}
    for what in saves:
        files[what] = io.BytesIO()
        torch.save((model if what == "model" else opt).state_dict(), files[what])
    model.train()
    resumed, again = followed(kind, small_net(dtype, seed=1))
    for what in loads:
        files[what].seek(0)
        (resumed if what == "model" else again).load_state_dict(torch.load(files[what], weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(opt, model, data[STEPS:])
        steps(again, resumed, data[STEPS:])
    assert same(weights(model), weights(resumed))
    assert opt.diagnostics() == again.diagnostics()


@EACH
def test_a_state_goes_back_into_the_optimizer_it_is_of(kind):
    """As some trainers do in passing: nothing changes."""
    data = batches(2 * STEPS, torch.float32)
    found = []
    for reload in (True, False):
        model, opt = followed(kind)
        steps(opt, model, data[:STEPS])
        state = opt.state_dict()
        if reload:
            opt.load_state_dict(state)
        steps(opt, model, data[STEPS:])
        found.append(weights(model))
    assert same(*found)


@EACH
def test_states_of_different_checkpoints_are_noticed(kind):
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data)
    early, state = copy.deepcopy(model.state_dict()), None
    steps(opt, model, data)
    state = opt.state_dict()
    resumed, again = followed(kind, small_net(torch.float32, seed=1))
    resumed.load_state_dict(early)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="not those that the loaded state"):
        steps(again, resumed, data[:1])
    resumed.load_state_dict(early)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="not those that the loaded state"):
        resumed.eval()(data[0][0])
    assert same(resumed.state_dict().values(), early.values())


@EACH
def test_a_model_saved_in_one_mode_and_an_optimizer_in_the_other_are_put_right(kind):
    """Without following: the model's file after eval(), the optimizer's after train()."""
    data = batches(STEPS, torch.float32)
    model = small_net(torch.float32)
    opt = explicit(kind, model)
    steps(opt, model, data)
    opt.eval()
    files = copy.deepcopy(model.state_dict())
    opt.train()
    trained, state = weights(model), opt.state_dict()
    resumed = small_net(torch.float32, seed=1)
    again = explicit(kind, resumed)
    resumed.load_state_dict(files)
    again.load_state_dict(state)
    torch.testing.assert_close(weights(resumed), trained, rtol=1e-6, atol=1e-8)


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_loaded_weights_are_an_average(kind, training):
    """The best checkpoint, loaded for a test in a model that has trained on, is what was saved."""
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data)
    best = copy.deepcopy(model.state_dict())
    steps(opt, model, data)
    if not training:
        model.eval()(data[0][0])
    model.load_state_dict(best)
    model.eval()
    model(data[0][0])
    assert same(weights(model), best.values())
    model.train()
    steps(opt, model, data)


def test_training_in_evaluation_mode_says_what_to_do():
    model, opt = followed("adamw")
    data = batches(2, torch.float32)
    steps(opt, model, data)
    model.eval()
    loss_of(model, data[0]).backward()
    with pytest.raises(RuntimeError, match="opt.unfollow"):
        opt.step()
    opt.zero_grad()
    opt.unfollow()
    opt.train()
    steps(opt, model, data)


@EACH
def test_copies_and_pickles_are_followed_by_nobody(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(3, torch.float32))
    before = weights(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.train(False) is other
        assert model.training
        other.eval()(torch.ones(1, 3))
        other.load_state_dict(other.state_dict())
    assert same(weights(model), before)
    assert opt._now.following.trained
    copied = copy.deepcopy(opt)
    copied.eval()
    assert copied._now.following is None


@EACH
def test_hooks_go_with_the_optimizer(kind):
    model, opt = followed(kind)
    assert model._forward_pre_hooks
    opt.unfollow()
    assert not model._forward_pre_hooks
    opt.follow(model)
    del opt
    gc.collect()
    for part in model.modules():
        assert not part._forward_pre_hooks
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks


@EACH
def test_nothing_stays_marked(kind):
    model, opt = followed(kind)
    x, y = batches(1, torch.float32)[0]
    out = model(x)
    loss = F.cross_entropy(out, y)
    assert type(loss) is Watched
    assert type(loss.detach()) is Tensor
    loss.backward()
    assert type(loss) is Tensor
    assert type(out) is Watched
    opt.step()
    assert type(out) is Tensor
    loss = F.cross_entropy(model(x), y)  # an ordinary step
    assert type(loss) is Tensor
    with torch.no_grad():
        assert type(model(x)) is Tensor


@EACH
def test_the_order_of_a_loop_does_not_matter(kind):
    """zero_grad before the forward pass, between it and backward, or after the step; of the model or the optimizer."""
    data, found = batches(STEPS, torch.float32), []
    for order in ("first", "between", "last", "model"):
        model, opt = followed(kind)
        for batch in data:
            if order == "first":
                opt.zero_grad()
            loss = loss_of(model, batch)
            if order == "between":
                opt.zero_grad()
            loss.backward()
            opt.step()
            if order == "last":
                opt.zero_grad()
            if order == "model":
                model.zero_grad()
        found.append(weights(model))
    assert all(same(found[0], other) for other in found[1:])


class Attention(nn.Module):
    """A block with fused attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Checkpointed(Attention):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Dictionary(Attention):
    def forward(self, x):
        return {"logits": [super().forward(x)], "hidden": None}


@pytest.mark.parametrize("make", [Attention, Recurrent, Checkpointed, Dictionary])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@EACH
def test_what_has_no_second_derivative_is_measured(kind, make, amp, device):
    if make is Recurrent and amp is torch.float16 and device == "cpu":
        pytest.skip("torch's CPU has no LSTM of half precision")
    torch.manual_seed(0)
    model = make().to(device)
    opt = OPTIMIZERS[kind](model)
    x, y = torch.randn(16, 5, 8, device=device), torch.randint(0, 2, (16,), device=device)
    scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16, init_scale=1024.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
                out = model(x)
                loss = F.cross_entropy(out["logits"][0] if isinstance(out, dict) else out, y, label_smoothing=0.1)
            loss = loss + 1e-4 * model.out.weight.square().sum()  # a loss made of parts
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert all(row["refreshes"] == 2 for row in opt.diagnostics().values())


@EACH
def test_grad_scaler_changes_no_rate(kind):
    found = []
    for scale in (None, 2.0**10):
        model, opt = followed(kind)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for batch in batches(STEPS, torch.float32):
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        found.append(torch.tensor(list(opt.rates().values())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@EACH
def test_two_optimizers_on_one_loss(kind):
    """Each measures as if it were alone, and the gradients are those of one backward."""
    x, y = batches(1, torch.float32)[0]
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    alone = []
    for part in (encoder, decoder):
        opt = OPTIMIZERS[kind](part)
        F.cross_entropy(decoder(encoder(x)), y).backward()
        alone.append([p.grad.clone() for p in part.parameters()])
        opt.step()
        alone.append(opt.rates())
        [p.grad.zero_() for p in [*encoder.parameters(), *decoder.parameters()]]
        opt.unfollow()
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    opts = [OPTIMIZERS[kind](part) for part in (encoder, decoder)]
    F.cross_entropy(decoder(encoder(x)), y).backward()
    assert all(p.grad is not None for opt in opts for p in opt.param_groups[0]["params"])
    for opt in opts:
        opt.step()
        assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())
    assert opts[0].rates() == pytest.approx(alone[1])


@pytest.mark.parametrize("call", ["retain_graph", "gradient", "inputs", "twice"])
def test_backward_with_arguments_does_what_torch_does(call):
    x, y = batches(1, torch.float32)[0]
    grads = []
    for following in (True, False):
        model = small_net(torch.float32)
        opt = followed("adamw", model)[1] if following else None
        loss = F.cross_entropy(model(x), y)
        if call == "retain_graph":
            loss.backward(retain_graph=True)
            loss.backward()
        elif call == "gradient":
            loss.backward(torch.tensor(2.0))
        elif call == "inputs":
            loss.backward(inputs=list(model[0].parameters()))
        else:
            loss.backward()
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        if call == "retain_graph" and opt is not None:
            opt.step()
            assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())
    torch.testing.assert_close(*grads)


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net(torch.float32)

    def forward(self, x):
        return self.net(x) * 1.0


@EACH
@pytest.mark.parametrize("told", [True, False], ids=["given compiled", "compiled later"])
@pytest.mark.parametrize("make", [lambda: small_net(torch.float32), Compiled], ids=["sequential", "module"])
def test_a_compiled_model_is_measured_and_evaluated_with_the_average(kind, told, make):
    """Compiled code calls no hooks. Steps that measure run the model as it is."""
    torch.manual_seed(0)
    model = make()
    compiled = torch.compile(model, backend="aot_eager")
    opt = OPTIMIZERS[kind](compiled if told else model)
    data = batches(STEPS, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = []
        for k, (x, y) in enumerate(data):
            out = compiled(x)
            names.append(out.grad_fn.name())
            F.cross_entropy(out, y).backward()
            opt.step()
            opt.zero_grad()
            if k == 12:
                compiled.eval()
                with torch.no_grad():
                    found = compiled(x)
                with opt.averaged():
                    assert torch.equal(found, model(x).detach())
                compiled.train()
    assert all(row["refreshes"] >= 2 for row in opt.diagnostics().values())
    assert names.count("CompiledFunctionBackward") >= STEPS - 4
    torch.testing.assert_close(
        compiled.state_dict()["_orig_mod." + next(iter(model.state_dict()))].shape, next(model.parameters()).shape
    )
    with torch.compiler.set_stance("default"):
        assert compiled(data[0][0]).grad_fn.name() == "CompiledFunctionBackward"
    opt.unfollow()
    assert "train" not in model.__dict__
    assert compiled(data[0][0]).grad_fn.name() == "CompiledFunctionBackward"


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.two(Once.apply(self.one(x)))


class Smooth(Stubborn):
    """The same function, differentiable twice."""

    def forward(self, x):
        return self.two(self.one(x).sin())


@EACH
@pytest.mark.parametrize("way", ["plain", "accumulated", "scaled", "dropout", "loss inside"])
def test_a_model_without_second_derivative_is_called_once_more(kind, way):
    """What is measured is what the same function with a second derivative would give."""
    found = []
    for make in (Stubborn, Smooth):
        torch.manual_seed(0)
        model = make()
        if way == "dropout":
            model.two = nn.Sequential(nn.Dropout(0.3), model.two)
        if way == "loss inside":
            net = model
            model = type(
                "Inside", (nn.Module,), {"forward": lambda self, x, y: {"loss": F.cross_entropy(self.net(x), y)}}
            )()
            model.net = net
        model.double()
        opt = OPTIMIZERS[kind](model, curvature="blocks", update_every=1)
        scaler = torch.amp.GradScaler("cpu", enabled=way == "scaled", init_scale=64.0)
        torch.manual_seed(1)
        for k, (x, y) in enumerate(batches(4)):
            if k == 0:
                continue  # other numbers for each make
            for _ in range(2 if way == "accumulated" else 1):
                loss = model(x=x, y=y)["loss"] if way == "loss inside" else F.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if k == 1 and make is Stubborn and way != "accumulated":
                assert opt.measured_by is None  # the first try told
            if k == 2:
                found.append(opt.diagnostics())
                break
        assert opt.measured_by == ("replay" if make is Stubborn else "loss.backward")
    assert all(row["refreshes"] >= 1 for row in found[0].values())


@EACH
def test_a_second_call_measures_what_autograd_does(kind):
    data = batches(3)
    found = []
    for make in (Stubborn, Smooth):
        torch.manual_seed(0)
        model = make().double()
        opt = OPTIMIZERS[kind](model, curvature="blocks")
        opt._now.following.replays = make is Stubborn
        (F.cross_entropy(model(data[0][0]), data[0][1], label_smoothing=0.1)).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        opt.step()
        found.append([(row["descent"], row["curvature"]) for row in opt.diagnostics().values()] + [grads])
    torch.testing.assert_close(found[0][-1], found[1][-1])
    torch.testing.assert_close(torch.tensor(found[0][:-1]), torch.tensor(found[1][:-1]), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("why", ["two calls", "changed in place", "input with a gradient"])
def test_what_cannot_be_measured_is_said_and_training_goes_on(why):
    model = Stubborn()
    opt = OPTIMIZERS["adamw"](model)
    x, y = batches(1, torch.float32)[0]

    def step():
        out = model(x.clone().requires_grad_() if why == "input with a gradient" else x)
        if why == "two calls":
            out = out + model(x)
        F.cross_entropy(out.mul_(2.0) if why == "changed in place" else out, y).backward()
        opt.step()
        opt.zero_grad()

    with pytest.warns(UserWarning, match="once_differentiable|no second derivative") as caught:
        for _ in range(3):
            step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="10 steps since .*(once_differentiable|no second derivative)"):
        for _ in range(9):
            step()


@EACH
def test_a_closure_measures_in_its_only_call(kind):
    """As Lightning calls it: gradients there before, no zero_grad, and None for a batch that is skipped."""
    model, opt = followed(kind, update_every=2)
    calls = []
    for k, batch in enumerate(batches(9, torch.float32)):

        def closure(batch=batch, k=k):
            calls.append(k)
            if k == 5:
                return None
            loss = loss_of(model, batch)
            opt.zero_grad()
            loss.backward()
            return loss

        opt.step(closure)
    assert calls == list(range(9))
    assert all(row["refreshes"] >= 4 for row in opt.diagnostics().values())


def test_the_average_with_batch_norm_is_warned_of_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = OPTIMIZERS["adamw"](model)
    data = batches(3, torch.float32)
    steps(opt, model, data)
    with pytest.warns(UserWarning, match="refresh_norms"):
        model.eval()(data[0][0])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(opt, model, data)
        model.eval()(data[0][0])


@EACH
@pytest.mark.parametrize("flatten", [True, False])
def test_resume_through_distributed_checkpoint(kind, flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    data = batches(2 * STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data[:STEPS])
    of_model, of_optimizer = get_state_dict(model, opt, options=how)
    resumed, again = followed(kind, small_net(torch.float32, seed=1))
    set_state_dict(
        resumed,
        again,
        model_state_dict=copy.deepcopy(of_model),
        optim_state_dict=copy.deepcopy(of_optimizer),
        options=how,
    )
    steps(opt, model, data[STEPS:])
    steps(again, resumed, data[STEPS:])
    if flatten:  # torch takes back the entries alone that every state has, and so drops what rounding loses
        torch.testing.assert_close(weights(model), weights(resumed), rtol=1e-3, atol=1e-5)
    else:
        assert same(weights(model), weights(resumed))
        assert opt.diagnostics() == again.diagnostics()


@EACH
@pytest.mark.parametrize("more", ["fewer micro-batches", "a stray backward"])
def test_windows_may_become_shorter(kind, more):
    model, opt = followed(kind, update_every=5)
    data = batches(30, torch.float32)
    if more == "a stray backward":
        loss_of(model, data[0]).backward()
        opt.zero_grad(set_to_none=False)
    steps(opt, model, data[:6], parts=4 if more == "fewer micro-batches" else 1)
    steps(opt, model, data)
    assert all(row["refreshes"] >= 7 for row in opt.diagnostics().values())


@EACH
def test_the_next_optimizer_of_a_model_takes_over(kind):
    model, first = followed(kind)
    data = batches(2 * STEPS, torch.float32)
    steps(first, model, data[:STEPS])
    second = OPTIMIZERS[kind](model)
    for batch in data[STEPS:]:
        loss_of(model, batch).backward()
        second.step()
        second.zero_grad()
    with second.averaged():
        average = weights(model)
    assert same(model.state_dict().values(), average)
    del first
    gc.collect()
    model.eval()
    with torch.no_grad():
        model(data[0][0])
    assert same(weights(model), average)
    assert "train" in model.__dict__


@EACH
@pytest.mark.parametrize("how", ["plain", "default device", "list", "stack"])
def test_a_scaler_is_recognised(kind, how):
    rates = []
    for scale in (None, 1024.0):
        model, opt = followed(kind)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        loss = loss_of(model, batches(1, torch.float32)[0])
        with torch.device("cpu") if how == "default device" else contextlib.nullcontext():
            if how == "list":
                loss = scaler.scale([loss])[0]
            elif how == "stack":
                loss = torch.stack([scaler.scale(loss / 2), scaler.scale(loss / 2)]).sum()
            else:
                loss = scaler.scale(loss)
        loss.backward()
        scaler.step(opt)
        rates.append(torch.tensor(list(opt.rates().values())))
    torch.testing.assert_close(*rates, rtol=1e-3, atol=0)


@EACH
def test_hooks_see_the_gradient_alone(kind):
    """The second pass of a measurement brings other numbers: neither hooks nor retain_grad get to see these."""
    seen: dict[bool, list] = {}
    rates = {}
    for hooked in (False, True):
        model, opt = followed(kind)
        x, y = batches(1, torch.float32)[0]
        out = model(x)
        found = seen[hooked] = []
        if hooked:
            out.retain_grad()
            for tensor in (out, *model.parameters()):
                tensor.register_hook(lambda grad, found=found: found.append(grad.detach().clone()))
        F.cross_entropy(out, y).backward()
        if hooked:
            other = small_net(torch.float32)
            plain = other(x)
            plain.retain_grad()
            F.cross_entropy(plain, y).backward()
            torch.testing.assert_close(out.grad, plain.grad)
            assert not out.grad.requires_grad
        opt.step()
        rates[hooked] = opt.rates()
    assert len(seen[True]) == 1 + 6
    assert rates[True] == rates[False]


@EACH
def test_the_mode_is_known_before_the_model_is_called(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    with opt.averaged():
        average = weights(model)
        expected = model(data[0][0]).detach()
    model.eval()
    assert same(weights(model), average)
    assert same(weights(copy.deepcopy(model)), average)
    torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(data[0][0])
    exported = torch.export.export(model, (data[0][0],)).module()
    torch.testing.assert_close(exported(data[0][0]), expected)
    model.train()
    assert opt._now.following.trained


@EACH
def test_parts_that_are_added_are_saved_with_their_average(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    model.append(nn.Linear(2, 2))
    opt.add_param_group({"params": [(f"5.{name}", p) for name, p in model[5].named_parameters()]})
    steps(opt, model, data)
    with opt.averaged():
        average = weights(model)
    assert same(model.state_dict().values(), average)


@EACH
def test_an_interrupt_in_the_model_leaves_nothing_behind(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.stops = small_net(torch.float32), True

        def forward(self, x):
            if self.stops:
                raise KeyboardInterrupt
            return self.net(x)

    model, flash = Model(), torch.backends.cuda.flash_sdp_enabled()
    opt = OPTIMIZERS[kind](model)
    data = batches(3, torch.float32)
    with pytest.raises(KeyboardInterrupt):
        model(data[0][0])
    model.stops = False
    steps(opt, model, data)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


@EACH
def test_weights_loaded_in_evaluation_mode_are_trained_from(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    other = small_net(torch.float32, seed=5).state_dict()
    model.eval()(data[0][0])
    model.load_state_dict(other)
    model.train()(data[0][0])
    assert same(weights(model), other.values())


@EACH
def test_a_load_that_fails_loses_nothing(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(STEPS, torch.float32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"2.weight": torch.zeros(9, 9)}, strict=False)
    assert same(model.state_dict().values(), before.values())
    model.state_dict()["2.weight"].zero_()
    assert same(model.state_dict().values(), before.values())


@EACH
def test_two_compiled_models_leave_compiling_on(kind):
    models = [small_net(torch.float32), small_net(torch.float32, seed=1)]
    compiled = [torch.compile(model, backend="aot_eager") for model in models]
    opts = [OPTIMIZERS[kind](model, update_every=4) for model in compiled]
    for batch in batches(9, torch.float32):
        for model in compiled:
            loss_of(model, batch).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert all(row["refreshes"] == 3 for opt in opts for row in opt.diagnostics().values())
    for opt in opts:
        opt.unfollow()
    assert compiled[0](batch[0]).grad_fn.name() == "CompiledFunctionBackward"


@EACH
@pytest.mark.parametrize("what", ["criterion", "part"])
def test_compiled_parts_and_losses(kind, what):
    model = nn.Sequential(small_net(torch.float32))
    criterion = F.cross_entropy
    if what == "criterion":
        criterion = torch.compile(lambda out, y: F.cross_entropy(out, y), backend="aot_eager", fullgraph=True)
    else:
        model[0].compile(backend="aot_eager")
    opt = OPTIMIZERS[kind](model)
    for x, y in batches(12, torch.float32):
        criterion(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert all(row["refreshes"] == 2 for row in opt.diagnostics().values())


@EACH
def test_steps_without_the_model_leave_compiling_on(kind):
    model, opt = followed(kind)
    function = torch.compile(lambda x: x.sin(), backend="aot_eager")
    x = torch.ones(2, requires_grad=True)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    assert function(x).grad_fn.name() == "CompiledFunctionBackward"


@EACH
def test_a_watched_loss_shows_and_stores_as_any_other(kind):
    model, opt = followed(kind)
    x, y = batches(1, torch.float32)[0]
    loss = F.cross_entropy(model(x), y)
    value = loss.item()
    assert f"{loss:.4f}" == f"{value:.4f}"
    assert "Watched" not in f"{loss} {loss!r}"
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["loss"]) is Tensor
    assert type(loss) is Watched
    out = model(x)
    opt.unfollow()
    assert type(out) is type(loss) is Tensor


@EACH
def test_train_keeps_its_arguments(kind):
    class Model(nn.Sequential):
        def train(self, mode=True, freeze=False):
            super().train(mode)
            self.frozen = freeze
            return self

    model = Model(nn.Linear(3, 2))
    opt = OPTIMIZERS[kind](model)
    assert model.train(True, freeze=True) is model
    assert model.frozen
    del opt


@EACH
def test_evaluation_between_backward_and_step(kind):
    data = batches(STEPS, torch.float32)
    found = []
    for evaluates in (True, False):
        model, opt = followed(kind)
        for batch in data:
            loss_of(model, batch).backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(batch[0])
                    model.train()
            opt.step()
            opt.zero_grad()
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@EACH
def test_outputs_are_found_in_objects(kind):
    class Held:
        __slots__ = ("inner",)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(torch.float32)

        def forward(self, x):
            held = Held()
            held.inner = torch.distributions.Independent(torch.distributions.Normal(self.net(x), 1.0), 1)
            return held

    model = Model()
    opt = OPTIMIZERS[kind](model)
    x, y = batches(1, torch.float32)[0]
    (-model(x).inner.log_prob(F.one_hot(y, 2).float()).mean()).backward()
    opt.step()
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


@EACH
def test_an_evaluation_function_under_no_grad_of_a_compiled_model(kind):
    """As nanoGPT's: mode and evaluation without gradients, then the next step."""
    model = small_net(torch.float32)
    compiled = torch.compile(model, backend="eager")
    opt = OPTIMIZERS[kind](compiled, update_every=50)
    for k, batch in enumerate(batches(12, torch.float32)):
        loss = loss_of(compiled, batch)
        assert opt._now.following.trained
        loss.backward()
        opt.step()
        opt.zero_grad()
        if k % 3 == 2:
            with torch.no_grad():
                compiled.eval()
                compiled(batch[0])
                compiled.train()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluating_and_saving_change_nothing(kind, dtype):
    data, found = batches(2 * STEPS, dtype), []
    for disturbs in (True, False):
        model, opt = followed(kind, small_net(dtype))
        for batch in data:
            steps(opt, model, [batch])
            if disturbs:
                model.eval()(batch[0])
                with torch.inference_mode():
                    model.state_dict()
                    opt.state_dict()
                model.train()
                model.state_dict()
                opt.state_dict()
        found.append(weights(model))
    assert same(*found)


@EACH
def test_a_failed_measurement_keeps_nothing_alive(kind, monkeypatch):
    model, opt = followed(kind)

    def fails(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("lwas_fast.measure.routes.by_autograd", fails)
    x, y = batches(1, torch.float32)[0]
    out = model(x)
    loss, ref = F.cross_entropy(out, y), weakref.ref(out)
    loss.backward()
    opt.step()
    del loss, out
    assert ref() is None
    opt.zero_grad()
    steps(opt, model, [(x, y)])
    assert opt.measured_by == "replay"


@EACH
def test_rates_fit_clipped_gradients_where_the_graph_is_kept(kind):
    found = []
    for keep in (True, False):
        model, opt = followed(kind)
        for batch in batches(2, torch.float32):
            loss_of(model, batch).backward(retain_graph=keep)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
            opt.zero_grad()
        found.append(torch.tensor(list(opt.rates().values())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@EACH
def test_two_optimizers_for_two_halves_of_a_model(kind):
    model = small_net(torch.float32)
    halves = [[(n, p) for n, p in model.named_parameters() if (p.ndim > 1) is matrices] for matrices in (True, False)]
    opts = [OPTIMIZERS[kind](half) for half in halves]
    for opt in opts:
        opt.follow(model)
    for batch in batches(12, torch.float32):
        loss_of(model, batch).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert all(row["refreshes"] == 2 for opt in opts for row in opt.diagnostics().values())
    assert torch.backends.cuda.flash_sdp_enabled()
    model.eval()
    assert not any(opt._now.following.trained for opt in opts)
    opts[0].unfollow()
    assert "train" in model.__dict__
    opts[1].unfollow()
    assert "train" not in model.__dict__


def test_frozen_quantised_weights_are_left_out():
    model = small_net(torch.float32)
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    assert list(OPTIMIZERS["adamw"](model).rates()) == ["0", "2", "4"]
