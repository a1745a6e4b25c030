"""The base class: what happens in `backward` and in `step`, in that order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, ParamsT

from lwas_fast import averaging, backends, checkpoint, fused_rates, groups, measure, options, rates
from lwas_fast.curvature import Here
from lwas_fast.layers import Bucket, LayerRule, Selection, make_buckets, state_dtype
from lwas_fast.measure import Measured
from lwas_fast.profiling import span
from lwas_fast.rates import Column
from lwas_fast.update import Moving, Scaling, step_selection


class LayerwiseOptimizer(Optimizer):
    """What `SGDLW` and `AdamWLW` share: layers, refreshes, guards and PyTorch's optimizer interface.

    Every so many steps the curvature of the loss along each layer's own descent direction is measured and
    turned into that layer's rate; in between rates are held. All of this but ``curvature``, ``hvp``, ``seed`` and
    ``layers`` can be set for each parameter group.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or group dictionaries.
        own: The subclass's hyperparameters and their defaults.
        layers: Which tensors share a rate: a callable from parameter name to layer name, a mapping likewise, or a
            module. Default: parameters of one module (``conv1.weight``, ``conv1.bias``) where names are given, else
            each tensor. A layer never spans two groups.
        common: The keywords below.

    Keyword Args:
        update_every (int | None): Steps from one refresh to the next (the paper's T). Default: a tenth of the steps
            since warm-up, but at least 10 and at most 100.
        curvature (str): ``"signs"`` (default; one product, unbiased), ``"joint"`` (one product, with cross terms),
            ``"blocks"`` (exact, one product a layer).
        probe (str): Direction measured: ``"gradient"`` (default; the one this gradient gives alone) or ``"update"``
            (with momentum).
        hvp (str): ``"autograd"`` (default) or ``"finite_difference"``. ``step(closure)`` uses the latter anyway.
        rate_horizon (float | None): Steps over which rates are averaged; 0: no averaging. Default: 100, and at least 5
            refreshes.
        max_growth (float): Most that a measured rate may exceed the present one, as a factor. Default 10.
        warmup_steps (int): Steps without measurement, at ``warmup_rate``. Default 0.
        damping (float): Added to the curvature, times the squared norm of the direction. Default 0.
        negative_curvature (str): ``"abs"`` (default; its size is the scale) or ``"skip"`` (no refresh).
        self_concordance (float): M of the closed form. Default 2.
        maximize (bool): Ascend. Default False.
        foreach (bool | None): False updates one layer at a time, with less temporary memory. Default: all at once.
        fused (bool | None): True insists on a compiled update. Default: used where there is one.
        seed (int): Of the signs that ``"signs"`` draws; equal on all replicas of a distributed run. Default 0.

    Raises:
        TypeError: An unknown keyword, or a parameter that is no tensor.
        ValueError: A hyperparameter out of range; a sparse or complex parameter; an impossible ``layers=``.
    """

    _buffers: tuple[str, ...]  # names of the state tensors shaped like the parameter, with momentum
    _free_buffers: tuple[str, ...]  # and schedule-free
    _by_mode: dict[str, tuple[Any, Any]]  # options' defaults that differ: schedule-free, with momentum
    _step_supports_amp_scaling = True  # GradScaler: sets grad_scale and found_inf instead of waiting for the device
    _average: str  # which of them is the average of the gradient
    _decoupled: bool  # whether weight decay acts on the weights rather than through the gradient

    def __init__(self, params: ParamsT, own: dict[str, Any], layers: LayerRule, common: options.Common):
        if unknown := set(common) - set(options.DEFAULTS):
            raise TypeError(f"{type(self).__name__} has no keyword {sorted(unknown)[0]!r}")
        chosen: dict[str, Any] = {**own, **options.DEFAULTS, **common}
        options.check(chosen)
        self._whole = {name: chosen.pop(name) for name in options.WHOLE}
        self._layer_rule = layers
        self._reset()
        super().__init__(params, chosen)

    def _reset(self) -> None:
        self._forget_layout()
        self._warned = False
        self._loading: dict[str, Any] | None = None
        self._close_window()

    def _forget_layout(self) -> None:
        self._layout: list[Bucket] | None = None
        self._plans: fused_rates.Plans = {}

    def _close_window(self) -> None:
        self._micro_batches = 0
        self._complete = False
        self._measured: Measured | None = None

    # ---- layers -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training; its first refresh comes with the next `backward`.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; ``"layers"`` overrides the optimizer's.

        Raises:
            TypeError: No dictionary, or a parameter that is no tensor.
            ValueError: See the class.
        """
        group = groups.prepare(param_group, self.param_groups, self.defaults, self._by_mode, self._layer_rule)
        super().add_param_group(group)
        self._forget_layout()
        self._measured = None

    @property
    def _buckets(self) -> list[Bucket]:
        if self._layout is None:  # late: a model may move to its device after the optimizer was made
            self._layout = make_buckets(self.param_groups, self.state)
        return self._layout

    def _due(self, group: dict[str, Any]) -> bool:
        return group["steps"] >= group["next_refresh"] and any(p.requires_grad for p in group["params"])

    @property
    def curvature_due(self) -> bool:
        """Whether the next `backward` or `step(closure)` measures the curvature."""
        return any(map(self._due, self.param_groups))

    def rates(self) -> dict[str, float]:
        """Each layer's present rate, as measured (`diagnostics` tells what was applied: after gain, cap, `lr`, ramp).

        Reads from the device, and so waits for it.
        """
        found: dict[str, float] = {}
        for bucket in self._buckets:
            now = rates.current(bucket.table, self.param_groups[bucket.group]["warmup_rate"])
            found.update(zip(bucket.names, now.tolist(), strict=True))
        return found

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the last measurement and step found, and how often each guard acted.

        Returns:
            For each layer: ``rate``; ``applied`` (rate after lr, ramp and cap in the last step); ``descent`` and
            ``curvature`` of the last measurement; and counts: ``refreshes``, ``negative``, ``nonfinite``,
            ``no_descent`` and ``growth`` of refreshes, ``capped`` and ``skipped`` of steps; ``length`` of the direction
            and ``size`` of the weights in the last step (Euclidean norms). Waits for the device.
        """
        shown = [column for column in Column if column >= Column.DESCENT]
        now = self.rates()
        found: dict[str, dict[str, float]] = {}
        for bucket in self._buckets:
            for name, row in zip(bucket.names, bucket.table.tolist(), strict=True):
                found[name] = {"rate": now[name]} | {column.name.lower(): row[column] for column in shown}
                found[name] |= {c.name.lower(): int(row[c]) for c in shown if Column.REFRESHES <= c <= Column.SKIPPED}
        return found

    # ---- the average ---------------------------------------------------------------------------------------------

    def eval(self) -> None:
        """Put the average of the iterates into the parameters: before evaluating the model, and before saving it.

        Schedule-free optimizers train on other weights than those that are best (see the class). BatchNorm's running
        statistics are those of the weights trained on: run some training batches through the model before it is
        evaluated (``torch.optim.swa_utils.update_bn``). With ``schedule_free=False`` parameters stay as they are, but
        training on asks for `train` all the same.
        """
        averaging.swap(self, training=False)

    def train(self, mode: bool = True) -> None:
        """Put the weights to train on back into the parameters, after `eval`.

        Args:
            mode: False does what `eval` does.
        """
        averaging.swap(self, training=mode)

    # ---- backward -----------------------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor | Callable[[], Tensor],
        *,
        last: bool = True,
        scaler: Any = None,
        ddp: DistributedDataParallel | None = None,
    ) -> Tensor:
        """``loss.backward()``, and the curvature pass when one is due.

        Gradient accumulation: pass ``last=False`` for every micro-batch but the last. The refresh happens on the last
        micro-batch, on its own gradient and curvature, taken times the number of micro-batches (the window's loss is
        about that many times the last one's, whether it was divided by it or not). Gradients may be clipped or
        unscaled between `backward` and `step`; rates are measured before that, so clipping shortens the step as it
        does with any optimizer.

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
        averaging.check_training(self)
        if self._complete and any(p.grad is not None for g in self.param_groups for p in g["params"]):
            raise RuntimeError(
                "opt.backward() was called twice without opt.step() or opt.zero_grad() between. To accumulate "
                "gradients, pass last=False for every micro-batch but the last; to add losses, call it on their sum."
            )
        if self._complete:  # gradients were dropped behind our back (model.zero_grad(), GradScaler): a new window
            self._close_window()
        value = measure.backward(self, loss, last and self.curvature_due, scaler, ddp)
        self._micro_batches += 1
        self._complete = last
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as in torch, and whatever `backward` measured on them."""
        self._close_window()
        super().zero_grad(set_to_none)

    # ---- step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a measurement into the rates, if there is one, and update the parameters.

        Args:
            closure: Clears the gradients, evaluates the loss, calls backward and returns the loss. When a refresh is
                due it is called a second time at displaced parameters (finite differences); it must use the same
                batch both times.

        Returns:
            What the closure returned.

        Raises:
            TypeError: The closure returned no tensor, or a gradient is sparse. Nothing has been updated.
            RuntimeError: ``fused=True``, and the compiled update cannot serve; or `eval` was called, but not `train`.
                Nothing has been updated.
        """
        averaging.check_training(self)
        value = None if closure is None else measure.run_closure(self, closure)
        averaging.check_training(self)  # the closure may have called eval()
        groups.check_dense(self.param_groups, attrgetter("grad"))
        moving = []
        for bucket in self._buckets:
            if present := [i for i, p in enumerate(bucket.params) if p.grad is not None]:
                group = self.param_groups[bucket.group]
                averaging.check_state(self, group, bucket.params[present[0]])
                moving.append((bucket, group, present, backends.update_implementation(group, bucket)))
        if self._measured is None:
            self._warn_if_overdue()
        else:
            self._take_in(self._measured)
        averaging.follow(self, {bucket.group for bucket, *_ in moving})
        with span("update"):
            for bucket, group, present, implementation in moving:
                self._update(bucket, group, present, implementation)
        for number in {bucket.group for bucket, *_ in moving}:
            self.param_groups[number]["steps"] += 1
        self._close_window()
        return value

    def _take_in(self, measured: Measured) -> None:
        self._measured = None  # once, even if the update fails
        for probe, rows in measured.rows:
            probe.bucket.table[probe.selection.rows] = rows
        measured_groups = {probe.bucket.group for probe, _ in measured.rows}
        for number in measured.groups:
            group = self.param_groups[number]
            if number in measured_groups:
                group["last_refresh"] = group["steps"]
                group["next_refresh"] = group["steps"] + rates.interval(group)
            else:  # nothing of it had a gradient: due again once it has taken a step
                group["next_refresh"] = group["steps"] + 1

    def _update(self, bucket: Bucket, group: dict[str, Any], present: list[int], implementation: str) -> None:
        if implementation == "single":
            parts = [[i for i in present if bucket.row[i] == row] for row in sorted({bucket.row[i] for i in present})]
        else:
            parts = [present]
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for part in parts:
            selection = bucket.select(part)
            states = [self._state_of(bucket, i) for i in selection.indices]
            for param, state in zip(selection.params, states, strict=True):
                self.state[param] = state
            if implementation == "fused":
                self._fused(bucket, selection, group, states, scaling)
            else:
                step_selection(
                    bucket, selection, group, states, scaling, self._advance, self._decoupled, self._decay(group)
                )

    def _buffers_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._free_buffers if group["schedule_free"] else self._buffers

    def _state_of(self, bucket: Bucket, i: int) -> dict[str, Any]:
        """The state of a bucket's i-th parameter; zeros, not yet entered in `state`, before its first step."""
        param, count = bucket.params[i], bucket.counts[i]
        if state := self.state.get(param):
            if state["step"] is not count:  # somebody put another one there
                state["step"] = count.copy_(state["step"])
            return state  # type: ignore[no-any-return]
        count.zero_()  # of a state that was thrown away
        zeros = {
            name: torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
            for name in self._buffers_of(self.param_groups[bucket.group])
        }
        # Views of the bucket's: a layer's numbers travel with its parameters.
        return {"step": count, **zeros, "layer": bucket.table[bucket.row[i]]}

    def _warn_if_overdue(self) -> None:
        late = [g for g in self.param_groups if self._due(g) and g["steps"] >= g["next_refresh"] + rates.interval(g)]
        if late and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} has taken {late[0]['steps'] - late[0]['next_refresh']} steps since a "
                "refresh of its rates was due. Call opt.backward(loss) instead of loss.backward(), or "
                "opt.step(closure).",
                stacklevel=3,
            )

    # ---- the optimizers' own formulae ---------------------------------------------------------------------------

    def _decay(self, group: dict[str, Any]) -> float:
        """The decay of the gradient's average, or the average's share in schedule-free weights."""
        raise NotImplementedError

    def _directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """Give what a measurement goes along, changing nothing.

        Args:
            group: The hyperparameters.
            here: The tensors that have a gradient.

        Returns:
            The gradients with L2 (None where they are minus the directions without their signs), and the directions.
        """
        raise NotImplementedError

    def _advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """Update the states in place and return the directions to step along."""
        raise NotImplementedError

    def _fused(
        self,
        bucket: Bucket,
        selection: Selection,
        group: dict[str, Any],
        states: list[dict[str, Any]],
        scaling: Scaling,
    ) -> None:
        """Take a whole step in compiled code."""
        raise NotImplementedError

    # ---- saving and restoring -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep; a ``layers=`` rule has done its work and may not be picklable."""
        return {**super().__getstate__(), "_whole": self._whole, "_layer_rule": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle, deepcopy or `load_state_dict`; options that an old state lacks get their defaults."""
        loading = self.__dict__.get("_loading")
        super().__setstate__(state)
        self.defaults.setdefault("schedule_free", False)
        for group in self.param_groups:
            group.setdefault("schedule_free", False)  # of a version that knew nothing else
            for name in options.RULES.keys() & self.defaults.keys():  # torch's __setstate__ adds defaults of its own
                group.setdefault(name, self.defaults[name])
            groups.fill_by_mode(group, self.defaults, self._by_mode)
            for name, value in (("last_refresh", None), ("train_mode", True), ("share", None)):
                group.setdefault(name, value)
        if loading is not None:
            checkpoint.fit_state(self.param_groups, self.state, loading)
        self._reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, onto any device and parameter dtype, state kept in its own precision.

        Args:
            state_dict: From an optimizer of this class with the same groups and layers.

        Raises:
            ValueError: It does not fit; names the parameter or layer. Nothing has been changed.
        """

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            self._loading = checkpoint.checked(self, loaded)

        handle = self.register_load_state_dict_pre_hook(check)  # last of the hooks: sees what will be loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None
