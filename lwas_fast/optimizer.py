"""The base class: what happens in `backward` and in `step`, in that order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, ParamsT

from lwas_fast import follow, groups, measure, options, rates, state, update
from lwas_fast.layers import Grouping, Layout
from lwas_fast.rule import Rule, Scaling
from lwas_fast.says import warn
from lwas_fast.table import COUNTERS, Column


class LayerwiseOptimizer(Optimizer):
    """What `SGDLW` and `AdamWLW` share: layers, measurements, guards and PyTorch's optimizer interface.

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
        hvp (str): ``"autograd"`` (default) or ``"finite_difference"``. ``step(closure)`` uses the latter anyway.
        warmup_steps (int): Steps without measurement, at ``warmup_rate``. Default 0.
        maximize (bool): Ascend. Default False.
        foreach (bool | None): Given at all, plain torch takes the place of compiled code; True and False do the same.
        fused (bool | None): True insists on a compiled update. Default: used where there is one.
        seed (int): Of the signs that ``"signs"`` draws; equal on all replicas of a distributed run. Default 0.

    Raises:
        TypeError: An unknown keyword, an option of an earlier version, or a parameter that is no tensor.
        ValueError: A hyperparameter out of range; a sparse or complex parameter; an impossible ``layers=``.
    """

    rule: Rule  # the subclass's formulae

    def __init__(self, params: ParamsT | nn.Module, own: dict[str, Any], layers: Grouping, common: options.Common):
        options.check_names(common, type(self).__name__)
        chosen: dict[str, Any] = {**own, **options.DEFAULTS, **common}
        model = params if isinstance(params, nn.Module) else None
        if model is not None:
            params, chosen["weight_decay_on"] = follow.named_parameters(model), "matrices"
            chosen |= common
        options.check(chosen)
        options.warn_of_lr(chosen["lr"])
        self._how = {name: chosen.pop(name) for name in options.WHOLE}
        self._layer_rule = layers
        self._following: follow.Following | None = None
        self._reset()
        super().__init__(params, chosen)  # type: ignore[arg-type]
        # GradScaler then sets grad_scale and found_inf instead of waiting for the device; as in torch, if asked for.
        self._step_supports_amp_scaling = bool(chosen["fused"])
        if model is not None:
            self.follow(model)

    def _reset(self) -> None:
        self._forget_layout()
        self._patience = 1  # steps after which to warn that no measurement was made
        self._failure: Exception | None = None  # why none could be made, at the last try
        self._warned_of_layers = False
        self._outcome: rates.Outcome | None = None
        self._loading: dict[str, Any] | None = None
        self._unplaced: list[tuple[dict[str, Any], list[list[float]]]] = []
        self._micro_batches = 0  # of the last window that was measured
        self._close_window()

    def _forget_layout(self) -> None:
        self._known_layout: Layout | None = None
        self._plans: rates.Plans = {}

    def _close_window(self) -> None:
        self._window = measure.Window()
        self._measured: rates.Measured | None = None

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
        update.check_fused({**self.defaults, **group})
        super().add_param_group(group)
        self._forget_layout()
        self._measured = None

    @property
    def _layout(self) -> Layout:
        known = self._known_layout
        if known is not None and (known.state is not self.state or known.groups is not self.param_groups):
            self._forget_layout()  # somebody put others there; what was measured is of the old rows
            self._measured = None
        if self._known_layout is None:
            self._known_layout = Layout(self.param_groups, self.state, self.rule.buffers)
        return self._known_layout

    def _subject(self) -> measure.Subject:
        due = [number for number, group in enumerate(self.param_groups) if rates.is_due(group)]
        return measure.Subject(self._layout, self.rule, self._how, due, self._window)

    @property
    def curvature_due(self) -> bool:
        """Whether the next `backward` or `step(closure)` measures the curvature.

        In the step after a measurement this waits until the device has made it: if it has no number for a layer, the
        layer's group is measured again at once, up to three times in a row.
        """
        self._hear_outcome()
        return any(map(rates.is_due, self.param_groups))

    def rates(self) -> dict[str, float]:
        """Each layer's present rate, as measured (`diagnostics` tells what was applied: after gain, cap, `lr`, ramp).

        Reads from the device, and so waits for it.
        """
        found: dict[str, float] = {}
        for bucket in self._layout.buckets:
            now = rates.current(bucket.table, self.param_groups[bucket.group]["warmup_rate"])
            found.update(zip(bucket.names, now.tolist(), strict=True))
        return found

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the last measurement and step found, and how often each guard acted.

        Returns:
            For each layer: ``rate``; ``applied`` (rate after lr, ramp and cap in the last step); ``descent`` and
            ``curvature`` of the last measurement; and counts: ``refreshes`` (those used), ``negative``, ``nonfinite``,
            ``no_descent`` and ``growth`` of measurements, ``capped`` and ``skipped`` of steps; ``length`` of the
            directions (root mean square over about five steps) and ``size`` of the weights before the last (Euclidean
            norms). Waits for the device.
        """
        shown = [column for column in Column if Column.DESCENT <= column <= Column.SIZE]
        now = self.rates()
        found: dict[str, dict[str, float]] = {}
        for bucket in self._layout.buckets:
            for name, row in zip(bucket.names, bucket.table.tolist(), strict=True):
                numbers = {c.name.lower(): int(row[c]) if c in COUNTERS else row[c] for c in shown}
                found[name] = {"rate": now[name], **numbers}
        return found

    def follow(self, model: nn.Module) -> None:
        """Follow a module, as an optimizer does from the start if it is given one: ``AdamWLW(model)``.

        Then its evaluation-mode calls and its ``state_dict()`` see the average of the weights, and its training-mode
        calls the weights to train on. When a measurement is due, a plain ``loss.backward()`` of a loss made from the
        module's output measures. It works by hooks on the module, which go with the optimizer or by `unfollow`; a copy
        of the module is not followed. A module that is trained in evaluation mode should not be followed.

        Args:
            model: The module whose parameters these are, compiled or in DistributedDataParallel as it may be.

        Raises:
            ValueError: It has none of the parameters.
        """
        mine = {param for group in self.param_groups for param in group["params"]}
        if mine.isdisjoint(param for _, param in follow.named_parameters(model)):
            raise ValueError(f"follow({type(model).__name__}): this optimizer has none of the module's parameters")
        self.unfollow()
        owner = {"hold": self._hold, "place": self._place, "due": self._due, "see": self._see}
        owner |= {"average_of": self._average_of, "restart": self._restart}
        self._following = follow.Following(model, self, owner)
        self._following.trained = all(group["train_mode"] for group in self.param_groups)

    def unfollow(self) -> None:
        """Follow no module any more; its parameters hold what they hold (see `train`)."""
        if self._following is not None:
            self._following.stop()
        self._following = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average in the parameters inside, whatever a followed module's mode."""
        following, training = self._following, all(group["train_mode"] for group in self.param_groups)
        self.eval()
        pinned = following is not None and following.pinned
        if following is not None:
            following.pinned = True
        try:
            yield
        finally:
            if following is not None:
                following.pinned = pinned
            self.train(training)

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with the average of the weights, in memory of its own."""
        with self.averaged():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in model.state_dict().items()
            }

    def _hold(self, training: bool) -> None:
        self._place()
        update.swap(self.param_groups, self.state, self.rule, training)
        if self._following is not None:
            self._following.trained = training

    def _due(self) -> bool:
        return self._how["hvp"] == "autograd" and self.curvature_due

    def _average_of(self, param: Tensor) -> Tensor | None:
        group = self._layout.home.get(param)
        return None if group is None else update.average_of(self.rule, group, self.state, param)

    def _restart(self, param: Tensor) -> None:
        """Take a parameter's weights, which were just loaded, for iterate and average at once."""
        if (offset := self.state.get(param, {}).get("offset")) is not None:
            offset.zero_()

    def eval(self) -> None:
        """Put the average of the iterates into the parameters: before evaluating the model, and before saving it.

        Schedule-free optimizers train on other weights than those that are best (see the class). BatchNorm's running
        statistics are those of the weights trained on: run some training batches through the model before it is
        evaluated (``torch.optim.swa_utils.update_bn``). With ``schedule_free=False`` parameters stay as they are, but
        training on asks for `train` all the same.

        Nothing needs it where a module is followed (see `follow`).
        """
        self._hold(training=False)

    def train(self, mode: bool = True) -> None:
        """Put the weights to train on back into the parameters, after `eval`.

        Args:
            mode: False does what `eval` does.
        """
        self._hold(training=mode)

    def backward(
        self,
        loss: Tensor | Callable[[], Tensor],
        *,
        last: bool = True,
        scaler: Any = None,
        ddp: DistributedDataParallel | None = None,
    ) -> Tensor:
        """``loss.backward()``, and the curvature pass when one is due.

        Gradient accumulation: pass ``last=False`` for every micro-batch but the last. That one is measured, on its own
        gradient and curvature, taken times the number of micro-batches (the window's loss is about that many times the
        last one's, whether it was divided by it or not). Gradients may be clipped or unscaled between `backward` and
        `step`; rates are measured before that, so clipping shortens the step as it does with any optimizer.

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
        if self._window.complete and any(p.grad is not None for g in self.param_groups for p in g["params"]):
            raise RuntimeError(
                "opt.backward() was called twice without opt.step() or opt.zero_grad() between. To accumulate "
                "gradients, pass last=False for every micro-batch but the last; to add losses, call it on their sum."
            )
        if self._window.complete:  # gradients were dropped behind our back (model.zero_grad(), GradScaler)
            self._close_window()
        measures = last and self.curvature_due
        value, found = measure.backward(self._subject, loss, self._how["hvp"], measures, scaler, ddp)
        if found is not None:
            self._measured = rates.refreshed(found, self.param_groups, self._plans)
        self._window.micro_batches += 1
        self._window.complete = last
        return value

    def _see(self, loss: Tensor, scaler: Any, ddp: DistributedDataParallel | None, keep: bool) -> bool:
        """Measure at somebody else's ``loss.backward()``; whether gradients have been accumulated by that.

        Nobody tells which micro-batch is a window's last. As many as the last window had are waited for, and where that
        is not known or there are more, each is measured, and the last measurement counts.
        """
        if self._window.complete or not any(p.grad is not None for p in self._layout.params):
            self._close_window()
        number = self._window.micro_batches + 1
        waits = number < self._micro_batches or (ddp is not None and not ddp.require_backward_grad_sync)
        accumulated = False
        if not waits and self._due():
            self._measured = None
            found, accumulated = measure.in_passing(self._subject, loss, scaler, ddp, keep)
            if isinstance(found, Exception):
                self._say(found)
            else:
                self._measured = rates.refreshed(found, self.param_groups, self._plans)
        self._window.micro_batches = number
        return accumulated

    def _say(self, failure: Exception) -> None:
        if self._failure is None:
            warn(f"{type(self).__name__} could not measure the curvature, and goes on at present rates: {failure}")
        self._failure = failure

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as in torch, and whatever `backward` measured on them."""
        self._close_window()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a measurement into the rates, if there is one, and update the parameters.

        Args:
            closure: Clears the gradients, evaluates the loss, calls backward and returns the loss. When a measurement
                is due it is called a second time at displaced parameters (finite differences); it must use the same
                batch both times.

        Returns:
            What the closure returned.

        Raises:
            TypeError: The closure returned no tensor, or a gradient is sparse. Nothing has been updated.
            RuntimeError: ``fused=True``, and the compiled update cannot serve; or `eval` was called, but not `train`.
                Nothing has been updated.
        """
        if closure is None:
            value = None
        else:
            self._place()
            value = self._evaluate(closure)
        self._check_training()  # the closure may have called eval()
        parts = update.prepare(self._layout, self.rule)
        scales = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaling = Scaling(*(scale if isinstance(scale, Tensor) else None for scale in scales))
        if self._measured is None:
            self._warn_if_overdue()
        else:
            measured, self._measured = self._measured, None  # once, even if the update fails
            measured = rates.of_this_step(measured, self._layout, self.rule, scaling)
            self._outcome = rates.take_in(measured, self.param_groups, scaling.found_inf)
            self._patience, self._failure = 1, None
            self._micro_batches = self._window.micro_batches
        update.run(self._layout, self.rule, parts, scaling)
        self._close_window()
        if self._following is not None:
            self._following.after_step(self._outcome is not None or any(map(rates.is_due, self.param_groups)))
        return value

    def _check_training(self) -> None:
        self._place()
        update.check_training(self.param_groups, self._following is not None)

    def _evaluate(self, closure: Callable[[], Tensor | None]) -> Tensor | None:
        replay = measure.Replay(self._layout.params) if self.curvature_due else None
        value = measure.evaluate(closure)
        # The closure may have measured, by opt.backward or by the loss of a followed model.
        if replay is not None and self._measured is None and value is not None:
            found = measure.again(self._subject(), closure, value, replay)
            self._measured = rates.refreshed(found, self.param_groups, self._plans)
        return value

    def _hear_outcome(self) -> None:
        outcome, self._outcome = self._outcome, None
        layers = outcome.tell() if outcome is not None else []
        if layers and not self._warned_of_layers:
            self._warned_of_layers = True
            warn(
                f"{type(self).__name__} could not use three measurements in a row of {len(layers)} layer(s), the first "
                f"of them {layers[0]!r}: the gradient was 0, or the curvature 0 or not finite. Such a layer keeps its "
                "step size until a measurement can be used; opt.diagnostics() counts no_descent and nonfinite."
            )

    def _warn_if_overdue(self) -> None:
        late = max(map(rates.overdue, self.param_groups), default=0)
        if late < self._patience:
            return
        self._patience = 10 * late
        name = type(self).__name__
        if self._failure is not None:
            why = f"At the last try: {self._failure}"
        elif self._following is None:
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

    def state_dict(self) -> dict[str, Any]:
        """As in torch; what is due next stands in the groups, so a measurement on its way is waited for.

        It belongs beside a state of the model with the average in it where a module is followed (or after `eval`), and
        else beside one with the weights trained on. `load_state_dict` notices which of the two the model has.
        """
        self._hear_outcome()
        self._place()
        if self._following is not None:
            update.settle(self.param_groups, self.state, self.rule)
        saved = super().state_dict()
        for group, mine in zip(saved["param_groups"], self.param_groups, strict=True):
            if any("offset" in self.state.get(param, {}) for param in mine["params"]):
                group["samples"] = update.samples(self.rule, mine, self.state)
            group["train_mode"] = mine["train_mode"] and self._following is None
        return saved

    def _recognise(self) -> None:
        """After loading: find out which weights the model holds, if it was loaded before; else `_place` does so."""
        meant = [group["train_mode"] for group in self.param_groups]
        for group in self.param_groups:
            if known := group.pop("samples", None):
                training, average = update.holds(group, self.state, known)
                if training != average:
                    group["train_mode"] = training
                elif not training and self._following is not None:
                    self._unplaced.append((group, known))
        if self._following is not None:
            self._following.trained = all(group["train_mode"] for group in self.param_groups)
            self._following.due = True
            return
        for group, training in zip(self.param_groups, meant, strict=True):
            update.swap([group], self.state, self.rule, training)

    def _place(self) -> None:
        """Find out the same at last, before the weights are needed."""
        unplaced, self._unplaced = self._unplaced, []
        for group, known in unplaced:
            training, average = update.holds(group, self.state, known)
            if training or average:
                group["train_mode"] = training and not average
                continue
            for param in group["params"]:
                self._restart(param)
            warn(
                f"the model's weights are not those that the loaded state of {type(self).__name__} was saved with: "
                "their average starts anew from here. Load the model's and the optimizer's states of one checkpoint"
            )
        if unplaced and self._following is not None:
            self._following.trained = all(group["train_mode"] for group in self.param_groups)

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
        loading = self.__dict__.get("_loading")
        super().__setstate__(values)
        if loading is not None:
            state.fit(self.param_groups, self.state, loading)
        state.upgrade(self.param_groups, self.state, self.defaults)
        self.__dict__.setdefault("_following", None)
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
            state.check(self.rule, self.param_groups, loaded)
            self._loading = loaded
            lost.extend(state.lost_options(loaded))

        handle = self.register_load_state_dict_pre_hook(check)  # last of the hooks: sees what will be loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None
        self._recognise()
        if lost:
            warnings.warn(
                f"the saved state was trained with {', '.join(lost)}: options that are gone. Training goes on without",
                stacklevel=2,
            )
