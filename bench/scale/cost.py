"""From what was recorded of a step to seconds: the arithmetic, and the constants that it is made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.scale.recorded import Message, Step
from lwas_fast.rates import when

LOGITS = 6  # more float32 tensors of the logits' size, where a measured model returns them; a test counts them
GATHERED, REDUCED = 2, 4  # bytes a parameter when gathered (bfloat16) and when its gradient is reduced (float32)


class Machine(NamedTuple):
    """What a training run runs on.

    Attributes:
        flops: Most floating-point operations of a rank in a second.
        share: How much of that training gets (MFU).
        memory: Bytes a second between a rank and its memory.
        latency: Seconds that a short all-reduce takes for each doubling of the ranks.
        node: Ranks of one node.
        inside: Bytes a second of a collective within a node.
        outside: Bytes a second of each rank's link to other nodes.
    """

    flops: float
    share: float
    memory: float
    latency: float
    node: int
    inside: float
    outside: float

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second of a collective; over several nodes it uses all links of a node side by side."""
        return self.inside if ranks <= self.node else min(self.inside, self.node * self.outside)

    def all_reduce(self, message: Message, ranks: int) -> float:
        """Seconds of a short all-reduce."""
        return self.latency * math.log2(ranks) + 2 * message.size * (1 - 1 / ranks) / self.bandwidth(ranks)

    def model_pass(self, parameters: int, tokens: int, ranks: int) -> float:
        """Seconds of forward and backward of so many tokens on each rank, FSDP2's messages at the same time."""
        computing = 6 * parameters * tokens / (self.flops * self.share)
        sent = (2 * GATHERED + REDUCED) * parameters * (1 - 1 / ranks)
        return max(computing, sent / self.bandwidth(ranks))

    def update(self, moved: float) -> float:
        """Seconds to read and write so many bytes."""
        return moved / self.memory


class Cost(NamedTuple):
    """Seconds of steps on each rank.

    Attributes:
        torch: Of a step with torch's fused optimizer.
        ordinary: What an ordinary step takes more.
        measuring: What a step that measures takes, beyond an ordinary one.
        mean: What all that adds to a step, on average over a run.
    """

    torch: float
    ordinary: float
    measuring: float
    mean: float


def fused_bytes(local: int, buffers: int) -> int:
    """Bytes that torch's fused optimizer moves: weights and `buffers` like them read and written, gradients read."""
    return 4 * local * (2 * (1 + buffers) + 1)


def cost(
    machine: Machine,
    parameters: int,
    in_torch: int,
    ranks: int,
    tokens: int,
    steps: tuple[Step, Step],
    measurements: float,
) -> Cost:
    """What steps cost, where `measurements` of one step measure.

    Args:
        machine: What on.
        parameters: How many the model has.
        in_torch: Bytes that torch's fused optimizer moves on this rank.
        ranks: How many share the parameters.
        tokens: Of each rank in a step.
        steps: An ordinary one, and one that measures.
        measurements: Share of the steps that measure.
    """
    ordinary, measuring = steps
    once = machine.model_pass(parameters, tokens, ranks)
    sent, sent_measuring = (sum(machine.all_reduce(m, ranks) for m in step.messages) for step in steps)
    adds = sent + machine.update(ordinary.moved - in_torch)
    more = once + sent_measuring - sent + machine.update(measuring.moved - ordinary.moved)
    return Cost(once + machine.update(in_torch), adds, more, adds + measurements * more)


def measured_steps(group: dict[str, Any], steps: int) -> Sequence[int]:
    """Which of the first steps of a parameter group measure, if each measurement can be used."""
    group, found = {**group, "steps": 0, "last_refresh": None, "next_refresh": 0}, []
    for step in range(steps):
        group["steps"] = step
        if when.is_due(group):
            found.append(step)
            when.schedule(group, True)
    return found
