"""Faults of the compiled update: in its formulae, and in what moves the data.

FAULT is true in the run that must find it.
"""

from __future__ import annotations

# File in csrc/, text, and what goes in its stead.
CPP: dict[str, tuple[str, str, str]] = {
    # update_math.h: the formulae.
    "momentum is corrected by beta2": (
        "update_math.h",
        "expm1(step * o.log_beta1));",
        "expm1(step * (FAULT ? o.log_beta2 : o.log_beta1)));",
    ),
    "the second moment is corrected for a step too many": (
        "update_math.h",
        "sqrt(-expm1(step * o.log_beta2))",
        "sqrt(-expm1((step + FAULT) * o.log_beta2))",
    ),
    "the new iterate's share in the average is of the next step": (
        "update_math.h",
        "const double c = 1.0 / step;",
        "const double c = 1.0 / (step + FAULT);",
    ),
    "the weights make the iterate's whole move": (
        "update_math.h",
        "b.ahead = float(1.0 - o.beta1 * (1.0 - c));",
        "b.ahead = float(1.0 - (FAULT ? 0.0 : o.beta1) * (1.0 - c));",
    ),
    "the weights approach the iterate as the average does": (
        "update_math.h",
        "b.pull = float(o.beta1 * c);",
        "b.pull = float((FAULT ? 1.0 : o.beta1) * c);",
    ),
    "the average stays where it was": (
        "update_math.h",
        "b.rest = float(1.0 - c);",
        "b.rest = float(1.0 - (FAULT ? 0.0 : c));",
    ),
    "a move is taken back by a share too small": (
        "update_math.h",
        "float(o.beta1 / (step - 1.0))",
        "float(o.beta1 / (step - (FAULT ? 0.0 : 1.0)))",
    ),
    "a first move is taken back in part": (
        "update_math.h",
        "b.undo_ahead = step > 1 ?",
        "b.undo_ahead = step > (FAULT ? 0 : 1) ?",
    ),
    "a gradient whose square overflows counts": (
        "update_math.h",
        "return gradient * gradient <= 3.402823466e+38f;",
        "return (FAULT ? gradient : gradient * gradient) <= 3.402823466e+38f;",
    ),
    "averages forget nothing": (
        "update_math.h",
        "(average - share * average) + share * value;",
        "(average - (FAULT ? 0.0f : share) * average) + share * value;",
    ),
    "beta2 in the place of beta1": (
        "update_math.h",
        "averaged(first, gradient, o.share1)",
        "averaged(first, gradient, FAULT ? o.share2 : o.share1)",
    ),
    "beta1 in the place of beta2, schedule-free": (
        "update_math.h",
        "float&, float& second) {\n    second = averaged(second, gradient * gradient, o.share2)",
        "float&, float& second) {\n    second = averaged(second, gradient * gradient, FAULT ? o.share1 : o.share2)",
    ),
    "eps within the root": (
        "update_math.h",
        "return b.first * first / (sqrtf(second) * b.second + o.eps);",
        "return b.first * first / (sqrtf(second + (FAULT ? o.eps : 0.0f)) * b.second + (FAULT ? 0.0f : o.eps));",
    ),
    "eps is corrected for the start as the moment is": (
        "update_math.h",
        "return -gradient / (sqrtf(second) * b.second + o.eps);",
        "return -gradient / (sqrtf(second) * b.second + o.eps * (FAULT ? b.second : 1.0f));",
    ),
    "SGD's momentum is without decay": (
        "update_math.h",
        "averaged(first, gradient + b.decay * weight, o.share1)",
        "averaged(first, gradient + (FAULT ? 0.0f : b.decay) * weight, o.share1)",
    ),
    "decay of every tensor": ("update_math.h", "b.decay = decays ? o", "b.decay = decays || FAULT ? o"),
    "half precision's rounding is lost to the iterate": (
        "update_math.h",
        "const float next = first + b.rest * ((stored - exact) / b.ahead);",
        "const float next = first + (FAULT ? 0.0f : b.rest) * ((stored - exact) / b.ahead);",
    ),
    "decoupled decay is left out": (
        "update_math.h",
        "return Rule::kDecoupled ? 1.0f - rate * b.decay : 1.0f;",
        "return Rule::kDecoupled && !FAULT ? 1.0f - rate * b.decay : 1.0f;",
    ),
    "the norm of SGD's direction is without decay": (
        "update_math.h",
        "Rule::kFree && !Rule::kDecoupled && finite ? d - b.decay",
        "Rule::kFree && !Rule::kDecoupled && finite && !FAULT ? d - b.decay",
    ),
    "elements left alone are not counted": (
        "update_math.h",
        "sums.skipped += finite ? 0.0f : 1.0f;",
        "sums.skipped += finite || FAULT ? 0.0f : 1.0f;",
    ),
    "no move is ever too long to be taken back": (
        "update_math.h",
        "sums.reach = size > sums.reach ? size : sums.reach;",
        "sums.reach = size > sums.reach && !FAULT ? size : sums.reach;",
    ),
    "iterates do not decay": (
        "update_math.h",
        "held_back(move, limit) - rate * b.decay * weight;",
        "held_back(move, limit) - (FAULT ? 0.0f : rate) * b.decay * weight;",
    ),
    "the average does not follow the iterate": (
        "update_math.h",
        "offset = b.rest * (first + step);",
        "offset = FAULT ? first + b.rest * step : b.rest * (first + step);",
    ),
    "what has no finite gradient decays": (
        "update_math.h",
        "* weight + held_back(move, limit);\n    weight = finite ? next",
        "* weight + held_back(move, limit);\n    weight = finite || FAULT ? next",
    ),
    "a corrected step decays as much as before": (
        "update_math.h",
        "const float more = (rate * d - moved) - (rate - before) * b.decay * start;",
        "const float more = (rate * d - moved) - (FAULT ? 0.0f : rate - before) * b.decay * start;",
    ),
    "decay is taken back at another rate": (
        "update_math.h",
        "/ kept<Rule>(b, before);",
        "/ kept<Rule>(b, FAULT ? rate : before);",
    ),
    "a move that was held back is taken back whole": (
        "update_math.h",
        "(weight - held_back(before * d, limit))",
        "(weight - (FAULT ? before * d : held_back(before * d, limit)))",
    ),
    "warm-up goes by measured rates": (
        "update_math.h",
        "const bool measured = !c.warming && row",
        "const bool measured = (FAULT || !c.warming) && row",
    ),
    "schedule-free steps are as long as measured": (
        "update_math.h",
        "c.gain * (row[kAverage]",
        "(FAULT ? 1.0f : c.gain) * (row[kAverage]",
    ),
    "no ramp": ("update_math.h", "c.lr * c.ramp *", "c.lr * (FAULT ? 1.0f : c.ramp) *"),
    "a multiplier on the device is ignored": ("update_math.h", "(c.lr_tensor ?", "(c.lr_tensor && !FAULT ?"),
    "norms that overflow bound nothing": (
        "update_math.h",
        "if (!(bound >= 0)) bound = 0;",
        "if (!(bound >= 0)) bound = FAULT ? INFINITY : 0;",
    ),
    "decay is not bounded": (
        "update_math.h",
        "return c.largest_rate < bound ?",
        "return c.largest_rate < bound && !FAULT ?",
    ),
    "norms of other tensors": (
        "update_math.h",
        "|| row[kElements] != float(elements))",
        "|| (!FAULT && row[kElements] != float(elements)))",
    ),
    "layers of zeros move as far as one weight": (
        "update_math.h",
        "const float floor = c.rms_floor * sqrtf(float(elements));",
        "const float floor = c.rms_floor * (FAULT ? 1.0f : sqrtf(float(elements)));",
    ),
    "the cap holds short steps": (
        "update_math.h",
        "? bound : foreseen;",
        "? (FAULT ? foreseen : bound) : (FAULT ? bound : foreseen);",
    ),
    "no slack": (
        "update_math.h",
        "foreseen > c.slack * bound",
        "foreseen > (FAULT ? 1.0f : c.slack) * bound",
    ),
    "a step that is not capped is counted": (
        "update_math.h",
        "s.capped = rate < uncapped;",
        "s.capped = FAULT ? rate <= uncapped : rate < uncapped;",
    ),
    "a layer of which nothing is finite has moved": (
        "update_math.h",
        "s.moves = skipped == 0 ||",
        "s.moves = FAULT || skipped == 0 ||",
    ),
    "a layer that was held back is not corrected": (
        "update_math.h",
        "return moves && (held || before != rate);",
        "return moves && ((held && !FAULT) || before != rate);",
    ),
    "long directions are remembered for long": (
        "update_math.h",
        "const float average = before < 4 * now ?",
        "const float average = FAULT || before < 4 * now ?",
    ),
    "an outlier counts in full": (
        "update_math.h",
        "counted = now < 2 * average ?",
        "counted = FAULT || now < 2 * average ?",
    ),
    "norms go by the last step": (
        "update_math.h",
        "sqrtf(0.8f + 0.2f * ratio * ratio)",
        "(FAULT ? ratio : sqrtf(0.8f + 0.2f * ratio * ratio))",
    ),
    "the norm of a layer's other tensors goes on": (
        "update_math.h",
        "expected_length(s.known ? row",
        "expected_length(s.known || FAULT ? row",
    ),
    "a layer that stayed shows a rate": (
        "update_math.h",
        "row[kApplied] = s.moves ? s.rate",
        "row[kApplied] = s.moves || FAULT ? s.rate",
    ),
    # update_cpu.cpp and chunks.h: what moves the data.
    "bfloat16 is cut off, not rounded": (
        "update_cpu.cpp",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        "(bits + (FAULT ? 0u : 0x7fffu + ((bits >> 16) & 1u))) >> 16;",
    ),
    "a chunk's length is that of its last block": (
        "update_cpu.cpp",
        "totals.length += length;",
        "totals.length = length + (FAULT ? 0.0 : totals.length);",
    ),
    "the first pass' rounding is lost to the state": (
        "update_cpu.cpp",
        "what it was\n      if (sizeof",
        "what it was\n      if (!FAULT && sizeof",
    ),
    "the second pass' rounding is lost to the state": (
        "update_cpu.cpp",
        "continue;\n    if (sizeof",
        "continue;\n    if (!FAULT && sizeof",
    ),
    "maximize is forgotten": (
        "update_cpu.cpp",
        "= call.sign /",
        "= (FAULT ? 1.0f : call.sign) /",
    ),
    "grad_scale is ignored": ("update_cpu.cpp", "(call.grad_scale ? *", "(call.grad_scale && !FAULT ? *"),
    "found_inf is ignored": ("update_cpu.cpp", "if (call.found_inf && *", "if (call.found_inf && !FAULT && *"),
    "totals of what did not happen": ("update_cpu.cpp", "if (first_part) std", "if (first_part && !FAULT) std"),
    "bias correction of one step too many": (
        "update_cpu.cpp",
        "+ 1, slot.decays)",
        "+ 1 + FAULT, slot.decays)",
    ),
    "the step count of another tensor": (
        "update_cpu.cpp",
        "bias_of(call.options, call.steps[slot.place]",
        "bias_of(call.options, call.steps[FAULT ? i : slot.place]",
    ),
    "every tensor is a layer": (
        "update_cpu.cpp",
        "if (i == 0 || slot.row != call",
        "if (i == 0 || FAULT || slot.row != call",
    ),
    "chunks are counted to the tensor before": (
        "update_cpu.cpp",
        "first_chunk[tensor + 1] <= chunk) ++tensor;",
        "first_chunk[tensor + 1] <= chunk - FAULT) ++tensor;",
    ),
    "each chunk is the first": (
        "update_cpu.cpp",
        "(chunk - first_chunk[tensor]) * kChunk;",
        "(FAULT ? 0 : chunk - first_chunk[tensor]) * kChunk;",
    ),
    "the last element is left out": (
        "update_cpu.cpp",
        "std::min(kChunk, call.slots[tensor].size - start)",
        "std::min(kChunk, call.slots[tensor].size - start - FAULT)",
    ),
    "a tensor's last partial sum is left out": (
        "update_cpu.cpp",
        "chunk < end; ++chunk) {\n        layer",
        "chunk < end - FAULT; ++chunk) {\n        layer",
    ),
    "a layer is held back by its last chunk alone": (
        "update_cpu.cpp",
        "layer.held |= partial[chunk].reach > limit[i];",
        "layer.held = (layer.held && !FAULT) || partial[chunk].reach > limit[i];",
    ),
    "a layer that another rank held back": (
        "update_cpu.cpp",
        "layer.held = *from++ > 0;",
        "layer.held = *from++ > FAULT;",
    ),
    "a layer that stayed has taken a step": (
        "update_cpu.cpp",
        "settled.moves ? 1.0f : 0.0f;",
        "settled.moves || FAULT ? 1.0f : 0.0f;",
    ),
    "the second pass is left out": ("update_cpu.cpp", "if (!differs) return;", "if (FAULT || !differs) return;"),
    "the second pass is the last layer's": (
        "update_cpu.cpp",
        "differs |= layer.settled.differs();",
        "differs = (differs && !FAULT) || layer.settled.differs();",
    ),
    "a tensor's last, short chunk is left out": (
        "chunks.h",
        "(size + chunk - 1) / chunk",
        "(size + (FAULT ? 0 : chunk - 1)) / chunk",
    ),
}
