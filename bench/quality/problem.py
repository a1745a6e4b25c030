"""What a task is: a model with its mini-batches and evaluation sets, made anew from a seed for every run.

A mini-batch, its crops and its dropout depend on the run's seed and the step's number alone, so every optimizer sees
the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
CHECKS = 12  # evaluations in a run, after the one at the start
IGNORED = -100  # cross_entropy's label of what does not count


@dataclass(frozen=True)
class Problem:
    """A task made ready for one run.

    Attributes:
        model: With the initial weights of this seed.
        seed: Of everything random.
        draw: The mini-batch of a step.
        criterion: The mean loss from the model's outputs and the targets.
        parts: Inputs and targets of the fixed evaluation sets, by name, as batches.
        accuracy: Whether the targets are classes.
        penalty: Part of the objective that depends on the weights alone.
        clip: Largest norm that a gradient keeps.
        only_matrices: Whether weight decay is for matrices (and what has more dimensions) alone.
    """

    model: nn.Module
    seed: int
    draw: Callable[[int], Batch]
    criterion: Callable[[Tensor, Tensor], Tensor]
    parts: dict[str, list[Callable[[], Batch]]]
    accuracy: bool = True
    penalty: Callable[[nn.Module], Tensor] | None = None
    clip: float | None = None
    only_matrices: bool = False

    def batch(self, step: int) -> Batch:
        """A step's mini-batch; sets torch's random state."""
        torch.manual_seed(1_000_003 * self.seed + step)
        return self.draw(step)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The training loss of a step's mini-batch; sets torch's random state, for dropout."""
        x, y = self.batch(step)
        loss = self.criterion(model(x), y)
        return loss if self.penalty is None else loss + self.penalty(model)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, test: bool = True) -> dict[str, float]:
        """Mean loss on the evaluation sets, and where targets are classes the test accuracy; or without `test`."""
        training = model.training
        model.eval()
        found: dict[str, float] = {}
        for name, batches in self.parts.items():
            if name == "test" and not test:
                continue
            total, right, count, classes = 0.0, 0, 0, 0
            for batch in batches:
                x, y = batch()
                out = model(x)
                total += self.criterion(out, y).item() * len(y)
                count += len(y)
                if self.accuracy:
                    right += int((out.argmax(-1) == y).sum())
                    classes += int((y != IGNORED).sum())
            found[name] = total / count
            if self.accuracy and name == "test":
                found["accuracy"] = right / classes
        model.train(training)
        return found


@dataclass(frozen=True)
class Task:
    """An entry of the registry.

    Attributes:
        name: On the command line.
        about: What is trained on what.
        steps: Of the CPU size.
        full_steps: Of the GPU size.
        make: From seed, full and device to a problem.
        weight_decay: The same for every optimizer, each in its own kind: decoupled, or in the gradient.
        checks: Evaluations in a run, after the one at the start.
        best: Whether a run is judged at the evaluation of lowest test loss, as some published numbers are.
    """

    name: str
    about: str
    steps: int
    full_steps: int
    make: Callable[[int, bool, str], Problem]
    weight_decay: float = 5e-4
    checks: int = CHECKS
    best: bool = False

    def build(self, seed: int, full: bool = False, device: str = "cpu") -> Problem:
        """Make model and mini-batches from a seed."""
        torch.manual_seed(seed)
        return self.make(seed, full, device)


def sampler(count: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Indices of a step's mini-batch: whole batches of one shuffled pass over the data after another."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))

    def indices(step: int) -> Tensor:
        epoch, place = divmod(step, count // batch)
        return order(epoch)[place * batch : (place + 1) * batch]

    return indices


def chunks(x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor], size: int = 500) -> list[Callable[[], Batch]]:
    """A set in parts that fit into memory, each prepared only when asked for."""
    pairs = zip(x.split(size), y.split(size), strict=True)
    return [lambda a=a, b=b: (prepare(a), b) for a, b in pairs]


def same(x: Tensor) -> Tensor:
    """No preparation."""
    return x
