"""Faults on the way from a measurement to rates: closed form, averages, guards, when, and the Triton launch."""

from __future__ import annotations

from planted.fault import BOTH, Fault, exact

RATES = "rates/test_rates.py::test_three_refreshes_follow_the_reference"

FAULTS: dict[str, Fault] = {
    "signs are not taken out of the descent": Fault(
        "rates/closed_form.py",
        "sums[:, Sums.DESCENT] *= -upload(probe.signs, dtype, sums.device)",
        "sums[:, Sums.DESCENT] *= -1",
        exact("adamw-defaults"),
    ),
    "a layer has the curvature of its first tensor": Fault(
        "rates/closed_form.py",
        "Sums.CURVATURE: dot(products.tensors),",
        "Sums.CURVATURE: dot([*products.tensors[:1], *[None] * (len(directions) - 1)]),",
        exact("sgd-defaults"),
    ),
    "negative curvature is none": Fault(
        "rates/closed_form.py",
        "curvature = sampled.abs() + upload",
        "curvature = sampled.clamp(min=0) + upload",
        exact("sgd-every_step", "adamw-every_step"),
    ),
    "L2 is no curvature": Fault(
        "rates/closed_form.py",
        "upload(probe.l2, table.dtype, table.device) * square",
        "0 * square",
        exact("sgd-weight_decay"),
    ),
    "the bound by the loss counts in full": Fault(
        "rates/closed_form.py",
        "rate = newton / (1 + 0.5 * promise)",
        "rate = newton / (1 + promise)",
        exact(*BOTH),
    ),
    "the size of the loss is not averaged": Fault(
        "rates/closed_form.py",
        "loss = beta * table[:, Column.LOSS] + (1 - beta) * probe.loss",
        "loss = weight * probe.loss",
        exact("sgd-every_step", "adamw-every_step"),
    ),
    "steps are not divided by what they promise too much": Fault(
        "rates/closed_form.py",
        "rate = steps.rate / excess",
        "rate = steps.rate",
        exact(*BOTH),
    ),
    "each layer promises the whole loss": Fault(
        "rates/closed_form.py",
        "steps.promised.sum().to(found[0].table)",
        "steps.promised.amax().to(found[0].table)",
        exact(*BOTH),
    ),
    "rates grow without limit": Fault(
        "options.py",
        "MAX_GROWTH = 100.0",
        "MAX_GROWTH = 1000.0",
        (f"{RATES}[torch-growth]", "rates/test_bounds_of_rates.py"),
    ),
    "Newton's step may promise anything": Fault(
        "options.py",
        "MOST_PROMISED = 100.0",
        "MOST_PROMISED = 1000.0",
        ("rates/test_bounds_of_rates.py",),
    ),
    "rates fall by averaging alone": Fault(
        "rates/closed_form.py",
        "torch.fmin(table[:, Column.AVERAGE], most)",
        "table[:, Column.AVERAGE]",
        ("rates/test_bounds_of_rates.py",),
    ),
    "averages over a short time": Fault(
        "rates/when.py",
        "HORIZON, HORIZON_REFRESHES = 100, 5",
        "HORIZON, HORIZON_REFRESHES = 50, 5",
        exact("sgd-every_step", "adamw-every_step"),
    ),
    "averages over few measurements": Fault(
        "rates/when.py",
        "HORIZON, HORIZON_REFRESHES = 100, 5",
        "HORIZON, HORIZON_REFRESHES = 100, 3",
        ("test_optimizer.py::test_the_default_schedule_follows_the_reference",),
    ),
    "measurements are never further apart than at first": Fault(
        "rates/when.py",
        "return by_age if fixed is None else fixed",
        "return least if fixed is None else fixed",
        ("test_optimizer.py::test_measurements_come_often_at_first_and_rarely_later",),
    ),
    "measurements come half as often": Fault(
        "rates/when.py",
        "INTERVALS = (10, 100)",
        "INTERVALS = (20, 100)",
        ("test_optimizer.py::test_measurements_come_often_at_first_and_rarely_later",),
    ),
    "warm-up counts as age": Fault(
        "rates/when.py",
        'int(group["steps"] - group["warmup_steps"]) // 10',
        'int(group["steps"]) // 10',
        ("test_optimizer.py::test_measurements_come_often_at_first_and_rarely_later",),
    ),
    "a measurement comes a step late": Fault(
        "rates/when.py",
        'group["steps"] >= group["next_refresh"] and',
        'group["steps"] > group["next_refresh"] and',
        exact("sgd-defaults"),
    ),
    "the time since the last measurement is forgotten": Fault(
        "rates/when.py",
        'group["last_refresh"] = group["steps"]',
        "pass",
        ("test_optimizer.py::test_the_default_schedule_follows_the_reference",),
    ),
    "a lost measurement is not made up for": Fault(
        "rates/when.py",
        'return any(count < TRIES for count in group.get("tries", {}).values())',
        "return False",
        ("test_robust.py::test_a_layer_without_a_number_is_measured_again_at_the_next_step",),
    ),
    "a retry is a measurement a step after another": Fault(
        "rates/when.py",
        "if last is None or tries_again(group) else",
        "if last is None else",
        ("test_robust.py::test_a_retry_counts_as_the_measurement_it_stands_for",),
    ),
    "groups measured together part": Fault(
        "rates/refresh.py",
        "if any(when.tries_again(group) for _, group, _ in self._due):",
        "if False:",
        ("test_robust.py::test_groups_that_are_measured_together_stay_together",),
    ),
    "rates are of gradients before clipping": Fault(
        "rates/refresh.py",
        "if not rule.normalizes or untouched:",
        "if True:",
        ("test_against_reference.py::test_clipping_shortens_the_step_but_not_the_rate",),
    ),
    "a clipped direction's curvature is not squared": Fault(
        "rates/refresh.py",
        "sums[:, Sums.CURVATURE] *= square\n",
        "sums[:, Sums.CURVATURE] *= square.sqrt()\n",
        ("test_against_reference.py::test_clipping_shortens_the_step_but_not_the_rate",),
    ),
    "a measurement of a step that the scaler skips counts": Fault(
        "rates/refresh.py",
        "rows = torch.where(found_inf.to(rows.device) == 0, rows, bucket.table[selection.rows])",
        "pass",
        ("update/test_plain.py::test_what_a_scaler_sets",),
    ),
    "a step that the scaler skips is a try": Fault(
        "rates/refresh.py",
        'group["last_refresh"], group["next_refresh"] = last_refresh, group["steps"]',
        "pass",
        ("test_robust.py::test_a_step_that_is_skipped_by_what_the_scaler_sets_is_no_try",),
    ),
    "the launch: another sign of the descent": Fault(
        "rates/launch.py",
        "rows = [[sign, scale, l2, *common] for",
        "rows = [[1.0, scale, l2, *common] for",
        (f"{RATES}[triton-defaults]",),
        "triton",
    ),
    "the launch: a tensor's last chunk is left out": Fault(
        "rates/launch.py",
        "starts = range(0, max(count, 1), chunk)",
        "starts = range(0, max(count - chunk, 1), chunk)",
        (f"{RATES}[triton-full_chunks]",),
        "triton",
    ),
    "the launch: the excess of a block of layers": Fault(
        "../triton_kernels/layer_rates.py",
        "        promised += more\n",
        "        promised = more\n",
        ("rates/test_rates.py::test_more_layers_than_the_last_program_takes_at_a_time",),
        "triton",
    ),
    "the launch: the last element of a chunk is left out": Fault(
        "../triton_kernels/layer_rates.py",
        "start + (i + lanes), i + lanes < count, dtype",
        "start + (i + lanes), i + lanes < count - 1, dtype",
        (f"{RATES}[triton-defaults]",),
        "triton",
    ),
    "the launch: arrivals of the launch before": Fault(
        "../triton_kernels/layer_rates.py",
        "tl.store(arrivals + count_of_layers, 0)",
        "pass",
        (f"{RATES}[triton-defaults]",),
        "triton",
    ),
    "replicas take the bound from a loss of their own": Fault(
        "rates/refresh.py",
        "probe.loss = loss.to(probe.loss)",
        "pass",
        ("parallel/test_ddp.py",),
    ),
    "a direction that does not descend has a rate": Fault(
        "rates/closed_form.py",
        "usable = finite & (descent > 0) & torch.isfinite(rate)",
        "usable = finite & torch.isfinite(rate)",
        ("rates/test_rates.py::test_what_is_not_finite_is_told_apart_alike", "rates/test_bounds_of_rates.py"),
    ),
    "the launch: tensors in other orders": Fault(
        "rates/launch.py",
        "if all(t.is_contiguous(memory_format=form) for t in tensors):",
        "if True:",
        ("rates/test_rates.py::test_any_layout",),
        "triton",
    ),
    "the launch: the numbers of the one before": Fault(
        "rates/launch.py",
        "if self._sent is None or self._sent[0] != content:",
        "if self._sent is None:",
        (f"{RATES}[triton-defaults]",),
        "triton",
    ),
    "a group without gradients waits for its turn": Fault(
        "rates/when.py",
        "(interval(group) if measured else 1)",
        "interval(group)",
        ("test_optimizer.py::test_a_group_without_gradients_is_measured_as_soon_as_it_has_taken_a_step",),
    ),
    "tries never end": Fault(
        "rates/when.py",
        "{name: tries.get(name, 0) + 1 for name in lost}",
        "{name: 1 for name in lost}",
        ("test_robust.py::test_after_three_tries_it_is_said_once_and_waits",),
    ),
}
