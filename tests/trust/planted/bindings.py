"""Faults of what hands the compiled update torch's tensors.

FAULT is true in the run that must find it.
"""

from __future__ import annotations

FUSED = "update/test_fused.py"
OVER_OPTIONS = f"{FUSED}::test_training_agrees_over_the_table_of_options"
IN_TURNS = f"{FUSED}::test_tensors_of_a_layer_that_step_in_turns_go_by_norms_of_their_own"
IN_PARTS = "update/test_in_parts.py::test_two_ranks_take_the_step_of_one_process"

# Of csrc/bindings.cpp: text, what goes in its stead, and tests that must find it with such an extension.
BINDINGS: dict[str, tuple[str, str, str]] = {
    "maximize is forgotten": (
        "call.sign = a.maximize ?",
        "call.sign = a.maximize && !FAULT ?",
        OVER_OPTIONS,
    ),
    "ramp and warm-up's rate change places": (
        "control(1), control(2),",
        "control(FAULT ? 2 : 1), control(FAULT ? 1 : 2),",
        OVER_OPTIONS,
    ),
    "cap and largest rate change places": (
        "control(4), control(5),",
        "control(FAULT ? 5 : 4), control(FAULT ? 4 : 5),",
        OVER_OPTIONS,
    ),
    "floor and slack change places": (
        "control(6), control(7)}",
        "control(FAULT ? 7 : 6), control(FAULT ? 6 : 7)}",
        "update/test_bounds.py",
    ),
    "a multiplier on the device is ignored": (
        'scalar_pointer(a.lr, "lr_tensor", a.table)',
        'scalar_pointer(FAULT ? OptionalTensor() : a.lr, "lr_tensor", a.table)',
        "update/test_bounds.py",
    ),
    "grad_scale is ignored": (
        "call.grad_scale = scalar_pointer(a.grad_scale,",
        "call.grad_scale = scalar_pointer(FAULT ? OptionalTensor() : a.grad_scale,",
        f"{FUSED}::test_what_a_grad_scaler_sets",
    ),
    "found_inf is ignored": (
        "call.found_inf = scalar_pointer(a.found_inf,",
        "call.found_inf = scalar_pointer(FAULT ? OptionalTensor() : a.found_inf,",
        f"{FUSED}::test_what_a_grad_scaler_sets",
    ),
    "decay of every tensor": ("where[4 * i + 2] != 0,", "FAULT || where[4 * i + 2] != 0,", OVER_OPTIONS),
    "step counts of other tensors": (
        "int32_t(where[4 * i + 1])",
        "int32_t(FAULT ? i : where[4 * i + 1])",
        IN_TURNS,
    ),
    "a tensor's elements for its layer's": (
        "where[4 * i + 3], int32_t(where[4 * i])",
        "FAULT ? param.numel() : where[4 * i + 3], int32_t(where[4 * i])",
        f"{FUSED}::test_not_finite_gradients_leave_their_elements_alone",
    ),
    "gradients in an order of their own": (
        "memory.read(a.grads[i], param).const_data_ptr()",
        "(FAULT ? a.grads[i] : memory.read(a.grads[i], param)).const_data_ptr()",
        f"{FUSED}::test_memory_orders",
    ),
    "what was copied is not written back": (
        "for (auto& [original, copy] : changed_) const_cast",
        "for (auto& [original, copy] : changed_) if (!FAULT) const_cast",
        f"{FUSED}::test_memory_orders",
    ),
    "a parameter with gaps is taken for dense": (
        "if (tensor.is_contiguous() || tensor.is_non_overlapping_and_dense())",
        "if (FAULT || tensor.is_contiguous() || tensor.is_non_overlapping_and_dense())",
        f"{FUSED}::test_memory_orders",
    ),
    "autograd does not see that weights changed": (
        "if (!tensor.is_inference())",
        "if (!FAULT && !tensor.is_inference())",
        "update/test_operators.py::test_versions_go_up",
    ),
    "the average's share is beta2": (
        "log_or_infinity(beta1), log_or_infinity(beta2), beta1};",
        "log_or_infinity(beta1), log_or_infinity(beta2), FAULT ? beta2 : beta1};",
        OVER_OPTIONS,
    ),
    "SGD does not decay": (
        "float(1 - momentum), 1, 0, float(weight_decay)",
        "float(1 - momentum), 1, 0, float(FAULT ? 0 : weight_decay)",
        OVER_OPTIONS,
    ),
    "AdamW always has momentum": (
        "schedule_free ? lwas::Rule::kFreeAdamW",
        "schedule_free && !FAULT ? lwas::Rule::kFreeAdamW",
        OVER_OPTIONS,
    ),
    "the second part is the first again": (
        "call.settles = a.settles;",
        "call.settles = a.settles && !FAULT;",
        IN_PARTS,
    ),
    "the last chunk of all is left out": (
        "at::parallel_for(0, count, grain, body);",
        "at::parallel_for(0, count - FAULT, grain, body);",
        OVER_OPTIONS,
    ),
}
