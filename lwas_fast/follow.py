"""A model that an optimizer follows: which of its two sets of weights it holds, and the losses made from its outputs.

Hooks on the model, none on torch. They sit on the model and on its parts two levels down, for a part may be called
alone; calls further inside cost nothing. A copied or pickled model is followed by nobody.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from lwas_fast.hooks import Hook, Train, entries, nothing
from lwas_fast.interrupts import whole
from lwas_fast.measure import Call, Seen, watch, with_graph
from lwas_fast.measure.products import leaves_of
from lwas_fast.says import warn
from lwas_fast.shards import mesh_of, version
from lwas_fast.wrappers import (
    EAGER,
    PLAIN_ATTENTION,
    PLAIN_RECURRENCE,
    is_compiled,
    layers_of,
    named_parameters,
    run_eagerly,
    unwrapped,
)


def _stop(
    root: weakref.ref[nn.Module],
    then: weakref.WeakMethod[Any],
    handles: list[Any],
    who: weakref.ref[Following],
    identity: int,
) -> None:
    """Take everything off a model that an optimizer followed."""
    for handle in handles:
        handle.remove()
    for shared in (PLAIN_ATTENTION, PLAIN_RECURRENCE, EAGER):
        shared.leave(identity)
    watch.unwatch(who())
    model = root()
    if model is not None and isinstance(train := model.__dict__.get("train"), Train):
        train.then = [ref for ref in train.then if ref is not then]
        if not train.then:
            del model.__dict__["train"]


class Owner(NamedTuple):
    """What a `Following` asks of its optimizer, which it must not keep alive: methods, each held weakly.

    Attributes:
        hold: Put the weights to train on (True) or their average (False) into the model.
        place: Find out which of them a model holds that was loaded; whether that is known now, which it is if told to
            find it out `at_last`.
        due: Whether a measurement is.
        see: See `watch.Watcher`.
        average_of: A parameter's average, in memory of its own; None if there is none.
        averaged: Hold the average inside.
        restart: Take a parameter's weights for iterate and average at once.
        unfollow: Follow no model any more.
    """

    hold: weakref.WeakMethod[Callable[[bool], None]]
    place: weakref.WeakMethod[Callable[[bool], bool]]
    due: weakref.WeakMethod[Callable[[], bool]]
    see: weakref.WeakMethod[Callable[..., bool]]
    average_of: weakref.WeakMethod[Callable[[Tensor], Tensor | None]]
    averaged: weakref.WeakMethod[Callable[[], AbstractContextManager[None]]]
    restart: weakref.WeakMethod[Callable[[Tensor], None]]
    unfollow: weakref.WeakMethod[Callable[[], None]]


class Following:
    """One optimizer's hooks on one model.

    Attributes:
        params: Those of the model that are the optimizer's.
        trained: Whether the model holds the weights to train on, not their average.
        due: Whether the next loss may have to be measured.
        pinned: Whether the model keeps the weights that it has, whatever its mode.
        restored: Whether the optimizer's state was loaded since its last step.
        replays: Whether the model has no second derivative, and is called once more instead.
        failed: Whether that is known by a measurement that failed; it is saved, or a resumed run would try again.
    """

    def __init__(self, model: nn.Module, params: set[Tensor], optimizer: object, owner: dict[str, Any]):
        root = unwrapped(model)
        self.params: set[Tensor] = params & {param for _, param in named_parameters(root)}
        for earlier in _followers(root):
            if not earlier.params.isdisjoint(self.params):
                earlier.give_up()
        self._sharded = any(mesh_of(param) is not None for param in self.params)
        self._root, self._owner = weakref.ref(root), Owner(**{k: weakref.WeakMethod(v) for k, v in owner.items()})
        self._given_model = weakref.ref(model)
        self._has_rnn = any(isinstance(part, nn.RNNBase) for part in root.modules())
        self._has_norms = any(isinstance(p, _BatchNorm) and p.track_running_stats for p in root.modules())
        self._norms_seen = self._stepped = self._inside = self._in_backward = self.pinned = self.restored = False
        self.trained = self.due = True
        self.replays, self.failed = self._sharded, False  # what gathers shards has none
        self._calls: list[Call | None] = []  # of the model, since the last loss; None of one that is not needed again
        self._given: dict[int, tuple[Any, Any]] = {}  # averages that were handed out, while they live
        handles = [
            # First, for FSDP2's hook gathers the weights that this one may change.
            entry.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
            for entry in dict.fromkeys(entries(root))
        ]
        for part in root.modules():
            if part._parameters:
                handles.append(part.register_state_dict_post_hook(Hook(self._saved)))  # type: ignore[no-untyped-call]
                handles.append(part.register_load_state_dict_pre_hook(Hook(self._loads)))  # type: ignore[no-untyped-call]
        compiled = [part for part in layers_of(model) if is_compiled(part)]
        handles += [part.register_forward_pre_hook(Hook(self._before_compiled)) for part in compiled]
        self._compiled: bool | None = True if compiled else None  # not known
        self._handles = handles
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        for part in layers_of(model):
            if isinstance(part, DistributedDataParallel):
                self._wrapped(part)
        self._opened: weakref.ref[nn.Module] | None = None  # what was called last, of which the output is watched
        self._reached: set[Tensor] = set()  # leaves that its output came from
        self._called = False  # in training mode, since the last step
        if not isinstance(train := root.__dict__.get("train"), Train):
            train = root.__dict__["train"] = Train(self._root)
        then = weakref.WeakMethod(self._mode_set)
        train.then.append(then)
        ours = self._root, then, handles, weakref.ref(self), id(self)
        self.stop = weakref.finalize(optimizer, _stop, *ours)

    def __reduce__(self) -> Any:
        return (Hook, (nothing,))

    def model(self) -> nn.Module | None:
        """The model as it was given, while that lives, or its inside."""
        given = self._given_model()
        return self._root() if given is None else given

    def give_up(self) -> None:
        """Make way for another optimizer: the weights to train on are what it starts from, and their own average."""
        hold, restart, unfollow = self._owner.hold(), self._owner.restart(), self._owner.unfollow()
        if hold is not None and restart is not None and unfollow is not None:
            hold(True)
            for param in self.params:
                restart(param)
            unfollow()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the model, or a part of it, is called."""
        if torch.compiler.is_compiling() or torch._C._is_tracing() or (root := self._root()) is None:
            return
        training = root.training
        if training is not self.trained or self.due:
            with whole():
                self._act(module, training, args, kwargs)

    def _act(self, module: nn.Module, training: bool, args: Any, kwargs: Any) -> None:
        hold, place = self._owner.hold(), self._owner.place()
        if self._in_backward:  # called once more, or for a checkpoint
            return
        # An interrupt kept the last call from leaving; or this one is inside DDP's, which was opened.
        if self._inside and module is self._root() and (self._opened is None or self._opened() is module):
            self._leave()
        if hold is None or place is None or self.pinned or self._inside or getattr(module, "_is_replica", False):
            return
        # Trainers wrap the model when the optimizer has been made.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None:
            self._wrapped(wrapper)
        place(True)
        self._called = self._called or training
        if not training:
            run_eagerly(id(self), False)
            if self.trained:
                hold(False)
                self._warn_of_norms()
        elif torch.is_grad_enabled():
            if not self.trained:
                hold(True)
            if self.due:
                self._open(module, args, kwargs)
        elif not self.trained:  # statistics of the average are being gathered
            self._norms_seen = True

    def _mode_set(self, training: bool) -> None:
        """After ``model.train()`` or ``model.eval()``, which is all that is to be seen of a compiled model."""
        with whole():
            self._set_mode(training)

    def _set_mode(self, training: bool) -> None:
        self._leave()
        hold, place = self._owner.hold(), self._owner.place()
        # Without gradients statistics may be about to be gathered, of whatever weights there are; but nothing that
        # follows would tell of a compiled model's call.
        changes = training is not self.trained and (not training or torch.is_grad_enabled() or bool(self._compiled))
        if hold is not None and place is not None and changes and not self.pinned and place(False):
            hold(training)
            if not training:
                self._warn_of_norms()
        run_eagerly(id(self), training and self.due and bool(self._compiled))

    def _before_compiled(self, *_: object) -> None:
        root, due = self._root(), self._owner.due()
        if root is not None and root.training and self.due and torch.is_grad_enabled():
            run_eagerly(id(self), due is not None and due())

    def _open(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Have the loss that is made from this call's output measured."""
        due = self._owner.due()
        self.due = due is not None and due()
        if not self.due:
            return
        self._opened = weakref.ref(module)
        call = Call(module, args, kwargs, list(self.params)) if self.replays else None
        if call is None:
            run_eagerly(id(self), True)  # parts of it, and the loss, may be compiled
        self._enter()

        def done(_module: nn.Module, _args: Any, output: Any) -> None:
            with whole():
                handle.remove()
                self._leave()
                if output is None:  # it raised
                    return
                if call is not None:
                    call.returned(with_graph(output))
                self._calls = [*self._calls, call][-2:]  # more than one is of no use
                if self._sharded:
                    self._reached.update(leaves_of(*with_graph(output)))
                watch.watch(self, output)

        handle = module.register_forward_hook(done, always_call=True)

    @contextmanager
    def average_held(self) -> Iterator[None]:
        """Hold the average in the model inside, for the statistics that are gathered there."""
        averaged = self._owner.averaged()
        with nullcontext() if averaged is None else averaged():
            yield
        self._norms_seen = True

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """See `watch.Watcher`."""
        self._enter()
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            self._leave()

    def _enter(self) -> None:
        """Call no kernel that has no second derivative where there is one that has."""
        self._inside = True
        if not self.replays:
            PLAIN_ATTENTION.enter(id(self))
            if self._has_rnn:
                PLAIN_RECURRENCE.enter(id(self))

    def _leave(self) -> None:
        self._inside = False
        for kernels in (PLAIN_ATTENTION, PLAIN_RECURRENCE):
            kernels.leave(id(self))

    def wants(self, leaves: set[Tensor]) -> bool:
        """See `watch.Watcher`."""
        return not (self.params.isdisjoint(leaves) and self._reached.isdisjoint(leaves))

    def see(self, loss: Tensor, scaler: Any, keep: bool) -> bool:
        """See `watch.Watcher`."""
        see, calls, self._calls = self._owner.see(), self._calls, []
        return see is not None and see(Seen(loss, scaler, self.ddp(), keep), calls)

    def ddp(self) -> DistributedDataParallel | None:
        """What averages the gradients over replicas, if anything does."""
        return None if self._ddp is None else self._ddp()

    def _wrapped(self, ddp: DistributedDataParallel) -> None:
        """Note what the model is in. Its output is what to watch: its own functions may stand behind the model's."""
        if self.ddp() is not ddp:
            self._ddp = weakref.ref(ddp)
            self._handles.append(ddp.register_forward_pre_hook(self, prepend=True, with_kwargs=True))
            self.replays = self.replays or ddp.static_graph  # which takes gradients by a backward of its own alone

    def after_step(self, due: bool, unheard: bool) -> None:
        """Note that a step was taken, and whether the next is to be measured, or may turn out to be."""
        if self.due:
            self._leave()  # an interrupt may have kept it from leaving
            self._calls, self._reached = [], set()
            watch.unwatch(self)
            if not self._called:  # nobody told us that it is compiled, but no hook was called; unless that was no help
                self._compiled = True if self._compiled is None else self._compiled and id(self) not in EAGER
        run_eagerly(id(self), due and bool(self._compiled))
        self._called = self.restored = self._norms_seen = False
        self.due, self._stepped = due or unheard, True

    def _saved(self, module: nn.Module, saved: dict[str, Any], prefix: str, _: Any) -> None:
        """A state dict of the model has the average in it, whatever the model holds."""
        average_of = self._owner.average_of()
        if average_of is not None and self.trained:
            with whole():
                self._put_average(module, saved, prefix, average_of)

    def _put_average(
        self, module: nn.Module, saved: dict[str, Any], prefix: str, average_of: Callable[[Tensor], Tensor | None]
    ) -> None:
        for name, param in module._parameters.items():
            entry = saved.get(prefix + name)
            if param is None or entry is None or entry is param:  # keep_vars=True asks for the parameters themselves
                continue
            # A tied tensor stays one.
            versions, given = self._given.get(id(param), (None, lambda: None))
            average = given()
            if average is None or versions != (version(param), version(average)):
                with torch.inference_mode(False):  # whose tensors have no version
                    average = average_of(param)
                if average is None:
                    continue
                self._given[id(param)] = (version(param), version(average)), weakref.ref(average)
            saved[prefix + name] = average

    def _loads(self, module: nn.Module, saved: dict[str, Any], prefix: str, *_: Any) -> None:
        """Weights that are loaded are an average: the iterate starts from there as well."""
        restart, hold = self._owner.restart(), self._owner.hold()
        if restart is None or hold is None:
            return
        if self.restored and self.trained and self._is_average(module, saved, prefix):
            hold(False)  # the model held the weights that the state was saved with, and now gets their average
        if self.restored and not self.trained:  # that belongs to what is loaded now
            return
        for name, param in module._parameters.items():
            new = saved.get(prefix + name)
            if param is not None and new is not None and getattr(new, "shape", None) == param.shape:
                restart(param)

    def _is_average(self, module: nn.Module, saved: dict[str, Any], prefix: str) -> bool:
        """Whether a module is about to load the averages of its own parameters, where those are other weights."""
        average_of, found = self._owner.average_of(), []
        for name, param in module._parameters.items():
            new = saved.get(prefix + name)
            average = None if param is None or average_of is None else average_of(param)
            if param is None or average is None or not isinstance(new, Tensor) or torch.equal(average, param):
                continue
            found.append(new.shape == average.shape and torch.equal(new.detach().to(average), average))
        return bool(found) and all(found)

    def _warn_of_norms(self) -> None:
        if self._has_norms and self._stepped and not self._norms_seen:
            self._has_norms = False  # once
            warn(
                "the model is evaluated with the average of its weights, but the running statistics of its BatchNorm "
                "layers are those of the weights trained on. Gather the average's before: "
                "lwas_fast.refresh_norms(model, training_batches)"
            )


def refresh_norms(model: nn.Module, loader: Iterable[Any], device: torch.device | int | None = None) -> None:
    """Gather BatchNorm's running statistics anew, with the average of the weights: before evaluating, and saving, it.

    ``torch.optim.swa_utils.update_bn`` with the average in the model. In training mode, without gradients, it runs the
    model over all of `loader`: some 50 training batches are enough (``itertools.islice(loader, 50)``).

    Args:
        model: A model that an optimizer follows, or a part of it; of another one the weights are taken as they are.
        loader: Training batches: inputs, or lists or tuples that begin with them.
        device: Where to move inputs to.

    Raises:
        TypeError: `loader` is None, as a trainer's may be before training.
    """
    if loader is None:
        raise TypeError("loader is None: pass batches of training data, from which BatchNorm gathers its statistics")
    with ExitStack() as held:
        for following in _followers(unwrapped(model)):
            held.enter_context(following.average_held())
        update_bn(loader, model, device)


def _followers(module: nn.Module) -> list[Following]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Following)]
