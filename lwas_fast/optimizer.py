"""The base class: what happens in `backward` and in `step`, in that order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, ParamsT

from lwas_fast import fits, groups, measure, options, rates, shards, state, update, wrappers
from lwas_fast.base import Now
from lwas_fast.errors import FailsAgainError
from lwas_fast.interrupts import whole
from lwas_fast.layers import Grouping
from lwas_fast.parallel import ddp as replicas
from lwas_fast.rule import Scaling
from lwas_fast.says import warn
from lwas_fast.weights import WithAverage


class LayerwiseOptimizer(WithAverage):
    """What `MuonLW`, `AdamWLW` and `SGDLW` share: layers, measurements, guards and PyTorch's optimizer interface.

    Every so many steps the curvature of the loss along each layer's own descent direction is measured and
    turned into that layer's rate; in between rates are held. All of this but ``curvature``, ``hvp``, ``seed`` and
    ``layers`` can be set for each parameter group.

    Args:
        params: A module, which the optimizer then follows (see `follow`); or parameters, ``(name, parameter)`` pairs,
            or group dictionaries.
        own: The subclass's hyperparameters and their defaults.
        layers: Which tensors share a rate: a callable from parameter name to layer name, a mapping likewise, or a
            module. Default: parameters of one module (``conv1.weight``, ``conv1.bias``) where names are given, else
            each tensor. A layer never spans two groups.
        common: The keywords below.

    Keyword Args:
        update_every (int | None): Steps from one measurement to the next (the paper's T). Default: a tenth of the steps
            since warm-up, but at least 10 and at most 100.
        weight_decay_on (str): ``"matrices"`` (tensors of two or more dimensions; default with a module) or ``"all"``.
        curvature (str): ``"signs"`` (default; one product, unbiased) or ``"blocks"`` (exact, one product a layer).
        hvp (str): ``"autograd"`` (default) or ``"finite_difference"``. Without a
            model to follow, ``step(closure)`` uses the latter anyway.
        warmup_steps (int): Steps without measurement, at ``warmup_rate``. Default 0.
        maximize (bool): Ascend. Default False.
        foreach (bool | None): Given at all, plain torch takes the place of compiled code; True and False do the same.
        fused (bool | None): True insists on a compiled update. Default: used where there is one.
        seed (int): Of the signs that ``"signs"`` draws; equal on all replicas of a distributed run. Default 0.

    Raises:
        TypeError: An unknown keyword, an option of an earlier version, or a parameter that is no tensor.
        ValueError: A hyperparameter out of range; an impossible ``layers=``; a sparse or complex parameter, or one of
            FSDP1 or DeepSpeed's ZeRO; ``ZeroRedundancyOptimizer`` around it.
    """

    def __init__(self, params: ParamsT | nn.Module, own: dict[str, Any], layers: Grouping, common: options.Common):
        options.check_names(common, type(self).__name__)
        groups.refuse_part_of_model(type(self).__name__)
        chosen: dict[str, Any] = {**own, **options.DEFAULTS, **common}
        model = params if isinstance(params, nn.Module) else None
        if model is not None:
            params, chosen["weight_decay_on"] = wrappers.named_parameters(model), "matrices"
            chosen |= common
        options.check(chosen)
        self._how = {name: chosen.pop(name) for name in options.WHOLE}
        self._layer_rule = layers
        self._now = Now()
        self._warn_of_lr([chosen])
        super().__init__(params, chosen)  # type: ignore[arg-type]
        # GradScaler then sets grad_scale and found_inf instead of waiting for the device; as in torch, if asked for.
        self._step_supports_amp_scaling = bool(chosen["fused"])
        if model is not None:
            self.follow(model)

    def _reset(self) -> None:
        vars(self._now).update(vars(Now(following=self._now.following)))  # in place: wrappers share it

    def _close_window(self) -> None:
        self._now.window, self._now.measured = measure.Window(), None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training; its first measurement comes with the next `backward`.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; ``"layers"`` overrides the optimizer's.

        Raises:
            TypeError: No dictionary, or a parameter that is no tensor.
            ValueError: See the class.
        """
        group = groups.prepare(param_group, self.param_groups, self.defaults, self._layer_rule, type(self).__name__)
        group |= {"cap": self.rule.cap({**self.defaults, **group}), **state.label()}
        update.check_fused(self.rule, {**self.defaults, **group})
        super().add_param_group(group)
        self._forget_layout()
        self._now.measured = None
        if self._now.following is not None and (model := self._now.following.model()) is not None:  # parts may be new
            self.follow(model)

    def _subject(self) -> measure.Subject:
        self._now.checked.check(self.param_groups)
        due = [number for number, group in enumerate(self.param_groups) if rates.is_due(group)]
        layout = self._fitting_layout()
        layout.check_shapes()
        now = self._now
        return measure.Subject(layout, self.rule, self._how, due, now.window, self._model(), now.repeats)

    def backward(
        self,
        loss: Tensor | Callable[[], Tensor],
        *,
        last: bool = True,
        scaler: Any = None,
        ddp: DistributedDataParallel | None = None,
    ) -> Tensor:
        """``loss.backward()``, and the curvature pass when one is due.

        Gradient accumulation: pass ``last=False`` for every micro-batch but the last. The last one's curvature is
        measured along the direction of all accumulated gradients, and counts for all. Gradients may be clipped or
        unscaled between `backward` and `step`. SGDLW's step is shorter by clipping; those of MuonLW and AdamWLW are
        not, if gradients are clipped at each step, for their length is relative to past gradients.

        Args:
            loss: A scalar with its graph; or a callable that returns it, which ``hvp="finite_difference"`` needs
                because it evaluates the loss twice.
            last: Whether `step` comes next.
            scaler: A ``torch.amp.GradScaler``; the loss is scaled by it here (do not scale it yourself).
            ddp: In a distributed run, the module that averages the gradients. Measurements are averaged over its
                process group too, a few numbers a layer. With accumulated gradients they go along the whole window's.

        Returns:
            The loss, without its graph.

        Raises:
            TypeError: `loss` is no tensor, or no callable where one is needed.
            ValueError: `loss` is no scalar or has no graph.
            CurvatureError: The curvature cannot be had; names the operation and the way out.
            RuntimeError: `backward` was called twice without `step` or `zero_grad`, or after `eval`.
        """
        self._check_training()
        loss = measure.released(loss)
        if self._now.window.complete and any(p.grad is not None for g in self.param_groups for p in g["params"]):
            raise RuntimeError(
                "opt.backward() was called twice without opt.step() or opt.zero_grad() between. To accumulate "
                "gradients, pass last=False for every micro-batch but the last; to add losses, call it on their sum."
            )
        if self._now.window.complete:  # gradients were dropped behind our back (model.zero_grad(), GradScaler)
            self._close_window()
        measures = last and self.curvature_due
        with whole():
            value, found = measure.backward(self._subject, loss, self._how["hvp"], measures, scaler, ddp)
            if found is not None and (failure := self._take(found, "opt.backward")) is not None:
                self._say(failure)
            self._now.window.micro_batches += 1
            self._now.window.complete = last
        return value

    def _see(self, seen: measure.Seen, calls: list[measure.Call | None]) -> bool:
        """Measure at somebody else's ``loss.backward()``; whether gradients have been accumulated by that.

        Nobody tells which micro-batch is a window's last. As many as the last window had are waited for, and where that
        is not known or there are more, each is measured, and the last measurement counts.
        """
        window = self._now.window
        if window.complete or not (window.held_back or any(p.grad is not None for p in self._layout.params)):
            self._close_window()
        number = self._now.window.micro_batches + 1
        unsynced = seen.ddp is not None and not seen.ddp.require_backward_grad_sync
        held_back = shards.gradients_held_back(self._model())
        waits = number < self._now.micro_batches or unsynced or held_back
        waits = waits or not self._now.checked.are_valid(self.param_groups)  # `step` will refuse them
        accumulated = False
        following = self._now.following
        if (why := replicas.why_not_all(seen.ddp)) is not None:
            self._say(why)
        elif not waits and self._due() and following is not None:
            self._now.measured = None
            can_replay = len(calls) == 1 and not seen.keep
            call = calls[0] if can_replay else None
            if call is not None and seen.ddp not in (None, call.module):  # made before the model was wrapped
                call = None
            if call is not None:
                found, accumulated = measure.replayed(self._subject, seen, call)
            else:
                found, accumulated = measure.in_passing(self._subject, seen)
            failure = self._take(found, "loss.backward" if call is None else "replay")
            if failure is not None and self._now.measured is None and can_replay and not following.replays:
                following.replays = following.failed = True  # the next step is due
            elif failure is not None:
                self._say(failure)
        self._now.window.micro_batches, self._now.window.held_back = number, held_back
        return accumulated

    def _say(self, failure: Exception) -> None:
        if self._now.failure is None:
            warn(f"{type(self).__name__} could not measure the curvature, and goes on at present rates: {failure}")
        self._now.failure = str(failure)  # the exception would hold the graph
        # To try at each step would cost more than a measurement is worth. But replicas must measure together.
        if isinstance(failure, FailsAgainError) and replicas.replicas() == 1:
            rates.postpone(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as in torch, and whatever `backward` measured on them."""
        self._close_window()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a measurement into the rates, if there is one, and update the parameters.

        Args:
            closure: Clears the gradients, evaluates the loss, calls backward and returns the loss, or None if there is
                none. If a measurement is due and it did not measure itself (by the loss of a followed model, or by
                `backward`), it is called again at displaced parameters (finite differences), before the first
                measurement also where they stand. It must use the same batch each time.

        Returns:
            What the closure returned.

        Raises:
            TypeError: The closure returned neither a tensor nor None, or a gradient is sparse. Nothing has been
                updated.
            ValueError: An option of a group is out of range, or a parameter has another shape than at its last step.
            RuntimeError: ``fused=True``, and the compiled update cannot serve; or `eval` was called, but not `train`.
                Nothing has been updated.
        """
        with whole(), torch.no_grad():
            value = None
            try:
                if closure is not None:
                    self._place()
                    value = self._evaluate(closure)
                self._check_training()  # the closure may have called eval()
                self._now.checked.check(self.param_groups)
                self._update()
            except BaseException:
                # GradScaler then leaves these here, and the next step would go by them.
                self.__dict__.pop("grad_scale", None)
                self.__dict__.pop("found_inf", None)
                raise
        return value

    def _update(self) -> None:
        layout = self._fitting_layout()  # once, for it is looked through for parameters that somebody replaced
        following = self._now.following
        if following is not None and following.due and following.params.isdisjoint(layout.home):
            self._follow_again()
        parts = update.prepare(layout, self.rule)
        scales = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaling = Scaling(*(scale if isinstance(scale, Tensor) else None for scale in scales))
        if self._now.measured is None:
            if 0 < self._now.window.micro_batches < self._now.micro_batches:  # fewer than were waited for
                self._now.micro_batches = self._now.window.micro_batches
            self._hear_outcome()
            self._warn_if_overdue()
        else:
            self._warn_of_lr(self.param_groups)
            measured, self._now.measured = self._now.measured, None  # once, even if the update fails
            measured = rates.of_this_step(measured, layout, self.rule, scaling)
            self._now.outcome = rates.take_in(measured, self.param_groups, scaling.found_inf)
            for probe, *_ in measured.parts:
                layout.keep(probe.bucket, probe.selection)
            self._now.patience, self._now.failure = 1, None
            self._now.micro_batches = self._now.window.micro_batches
        try:
            update.run(layout, self.rule, parts, scaling)
        except (TypeError, ValueError, RuntimeError):
            layout.check_shapes()  # which names the parameter where that is the cause
            raise
        self._close_window()
        if self._now.following is not None:  # perhaps another than before
            self._now.following.after_step(any(map(rates.is_due, self.param_groups)), self._now.outcome is not None)

    def _follow_again(self) -> None:
        """Where somebody sharded the model and put its new parameters into the groups, as Accelerate does."""
        assert self._now.following is not None
        model = self._now.following.model()
        if model is not None and not self._layout.home.keys().isdisjoint(model.parameters()):
            self.follow(model)

    def _evaluate(self, closure: Callable[[], Tensor | None]) -> Tensor | None:
        if not self.curvature_due:
            return measure.evaluate(closure)
        params, window = self._layout.params, self._now.window
        replay, stood = measure.Replay(params), {p: p.grad for p in params if p.grad is not None}
        start = {p: grad.clone() for p, grad in stood.items()}
        versions = [grad._version for grad in stood.values()]
        value = measure.evaluate(closure)
        # The closure may have measured, by opt.backward or by the loss of a followed model.
        of_model = None if self._now.following is None else self._now.following.ddp()
        if (why := replicas.why_not_all(of_model)) is not None:
            self._say(why)
        elif self._now.measured is None and value is not None:
            # Whether it added to what stood there: a zero_grad, the optimizer's or the model's, leaves other traces.
            accumulated = (
                bool(stood)
                and window is self._now.window
                and all(
                    p.grad is grad and (grad._version <= version + 1 or shards.mesh_of(grad) is not None)
                    for (p, grad), version in zip(stood.items(), versions, strict=True)
                )
            )
            found = measure.again(self._subject(), closure, value, replay, 1.0, start, accumulated, of_model)
            if (failure := self._take(found, "opt.step")) is not None:
                self._say(failure)
        return value

    def _take(self, found: measure.Measurement | Exception, route: str) -> Exception | None:
        """Work out what a measurement makes of the rates, for the next step; give what failed, if anything did."""
        if isinstance(found, Exception):
            return found
        self._now.repeats = self._now.repeats or found.repeats
        measured = rates.refreshed(found, self.param_groups, self._now.plans)
        if isinstance(measured, Exception):
            return measured
        self._now.measured = measured
        if measured is not None:
            self._now.route = route
        return found.failure

    def _warn_of_lr(self, groups: list[dict[str, Any]]) -> None:
        self._now.warned_of_lr = self._now.warned_of_lr or any(map(options.warn_of_lr, groups))

    def _warn_if_overdue(self) -> None:
        late = max(map(rates.overdue, self.param_groups), default=0)
        if late < self._now.patience:
            return
        self._now.patience = 10 * late
        name = type(self).__name__
        if self._now.failure is not None:
            why = f"At the last try: {self._now.failure}"
        elif self._now.following is None:
            why = (
                f"Make it with the model, {name}(model), and a plain loss.backward() measures, in a trainer too; or "
                "call opt.backward(loss) instead of loss.backward(), or opt.step(closure)."
            )
        else:
            why = "It saw no loss.backward() of a scalar made from the model's output: call opt.backward(loss)."
        warn(
            f"{name} has taken {late} steps since a measurement of the curvature was due, and none was made: its step "
            f"sizes stay as they are. {why}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep; a ``layers=`` rule has done its work and may not be picklable."""
        self._hear_outcome()
        return {**super().__getstate__(), "_how": self._how, "_layer_rule": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Restore from pickle, deepcopy or `load_state_dict`; options that an old state lacks get their defaults."""
        if "_whole" in values:
            raise ValueError(
                "an earlier lwas_fast pickled this optimizer: make a new one and load a state_dict() of it"
            )
        self.__dict__.setdefault("_now", Now())
        loading = self._now.loading
        super().__setstate__(values)
        if loading is not None:
            state.fit(self.param_groups, self.state, loading)
        state.upgrade(self.param_groups, self.state, self.defaults)
        self._step_supports_amp_scaling = bool(self.defaults.get("fused"))
        self._reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, onto any device and parameter dtype, state kept in its own precision.

        Args:
            state_dict: From an optimizer of this class with the same groups and layers, of this or an earlier version.

        Raises:
            ValueError: It does not fit; names the parameter or layer. Nothing has been changed.
        """
        lost: list[str] = []

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            fits.check(self.rule, self.param_groups, loaded)
            self._now.loading = loaded
            lost.extend(state.lost_options(loaded))

        before, now = (self.state, self.param_groups), dict(vars(self._now))
        with whole():
            handle = self.register_load_state_dict_pre_hook(check)  # last of the hooks: sees what will be loaded
            try:
                super().load_state_dict(state_dict)
                self._now.loading = None
                self._recognise()
                self._learn()
            except BaseException:  # memory may run out
                self.state, self.param_groups = before
                vars(self._now).update(now)
                raise
            finally:
                handle.remove()
        if lost:
            warn(f"the saved state was trained with {', '.join(lost)}: options that are gone. Training goes on without")
