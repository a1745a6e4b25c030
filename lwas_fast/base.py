"""The layers of an optimizer and their numbers: what they are now, and where a user sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import Optimizer

from lwas_fast import measure, options, rates
from lwas_fast.follow import Following
from lwas_fast.interrupts import whole
from lwas_fast.layers import Layout
from lwas_fast.rule import Rule
from lwas_fast.says import warn
from lwas_fast.table import COUNTERS, Column


@dataclass
class Now:
    """What passes from call to call, in one object: trainers wrap an optimizer and copy its attributes, to share this.

    Attributes:
        layout: The layers, laid out when first asked for.
        checked: The groups' options, as they were last checked.
        plans: See `rates.launch`.
        window: The micro-batches since the last step.
        micro_batches: How many there were in the last window that was measured.
        measured: What the next step is to take in.
        repeats: See `measure.Subject`.
        outcome: Which layers the last measurement had no number for, on its way from the device.
        route: What the last measurement came by.
        failure: Why none could be made, at the last try.
        patience: Steps after which to warn that none was made.
        warned_of_layers: Whether it was said that a layer has none.
        warned_of_lr: Whether `lr` was said to look like a learning rate.
        following: The hooks on the model.
        loading: The state that `load_state_dict` is taking in.
        unplaced: Groups of a loaded state, with its samples, of which the model holds neither set of weights yet.
    """

    layout: Layout | None = None
    checked: options.Checked = field(default_factory=options.Checked)
    plans: rates.Plans = field(default_factory=dict)
    window: measure.Window = field(default_factory=measure.Window)
    micro_batches: int = 0
    measured: rates.Measured | None = None
    repeats: bool = False
    outcome: rates.Outcome | None = None
    route: str | None = None
    failure: str | None = None
    patience: int = 1
    warned_of_layers: bool = False
    warned_of_lr: bool = False
    following: Following | None = None
    loading: dict[str, Any] | None = None
    unplaced: list[tuple[dict[str, Any], Any]] = field(default_factory=list)


class WithLayers(Optimizer):
    """An optimizer's layers, rates and counters."""

    rule: Rule  # the subclass's formulae
    _now: Now
    _how: dict[str, Any]  # the options that hold for all groups

    def _forget_layout(self) -> None:
        self._now.layout, self._now.plans = None, {}

    @property
    def _layout(self) -> Layout:
        known = self._now.layout
        if known is not None and not known.is_of(self.param_groups, self.state):
            self._forget_layout()  # somebody put others there; what was measured is of the old rows
            self._now.measured = None
        if self._now.layout is None:
            self._now.layout = Layout(self.param_groups, self.state, self.rule.buffers, self.rule.scalars)
        return self._now.layout

    def _fitting_layout(self) -> Layout:
        """The layout, after somebody may have cast parameters."""
        layout = self._layout
        if self.rule.whole:
            layout.check_whole(self.rule.name)
        if layout.fits():
            return layout
        layout.recast()
        self._forget_layout()
        self._now.measured = None
        return self._layout

    def rates(self) -> dict[str, float]:
        """Each layer's present rate, as measured (`diagnostics` tells what was applied: after gain, cap, `lr`, ramp).

        Reads from the device, and so waits for it.
        """
        self._now.checked.check(self.param_groups)  # `warmup_rate` stands for what was never measured
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

    @property
    def measured_by(self) -> str | None:
        """What the last measurement came by; None if there was none.

        ``"loss.backward"`` and ``"replay"`` (the model was called once more) of a followed model, ``"opt.backward"``,
        ``"opt.step"`` (with a closure).
        """
        return self._now.route

    def log(self) -> dict[str, float]:
        """One flat dictionary for TensorBoard, Weights & Biases or a CSV file; waits for the device.

        Returns:
            ``applied/<layer>``, what multiplied the layer's direction in the last step; ``measurements``, how many the
            layer with the fewest has had; and shares in [0, 1]: ``share_unusable`` of measurements, ``share_capped``
            of steps.
        """
        rows = self.diagnostics()
        found = {f"applied/{layer}": row["applied"] for layer, row in rows.items()}
        lost = sum(row["nonfinite"] + row["no_descent"] for row in rows.values())
        steps = sum(group["steps"] * len(set(group["layer_names"])) for group in self.param_groups)
        found["measurements"] = min(row["refreshes"] for row in rows.values())
        found["share_unusable"] = lost / max(1, lost + sum(row["refreshes"] for row in rows.values()))
        found["share_capped"] = sum(row["capped"] for row in rows.values()) / max(1, steps)
        return found

    @property
    def curvature_due(self) -> bool:
        """Whether the next `backward` or `step(closure)` measures the curvature.

        In the step after a measurement this waits until the device has made it: if it has no number for a layer, the
        layer's group is measured again at once, up to three times in a row.
        """
        self._hear_outcome()
        return any(map(rates.is_due, self.param_groups))

    def _hear_outcome(self) -> None:
        if self._now.outcome is None:
            return
        with whole():
            layers, self._now.outcome = self._now.outcome.tell(), None
        if layers and not self._now.warned_of_layers:
            self._now.warned_of_layers = True
            warn(
                f"{type(self).__name__} could not use three measurements in a row of {len(layers)} layer(s), the first "
                f"of them {layers[0]!r}: the gradient was 0, or the curvature 0 or not finite. Such a layer keeps its "
                "step size until a measurement can be used; opt.diagnostics() counts no_descent and nonfinite."
            )

    def _due(self) -> bool:
        return self._how["hvp"] == "autograd" and self.curvature_due
