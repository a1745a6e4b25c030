"""Runs that can be stopped anywhere: what a user's script does to save and to resume, in every order."""

from __future__ import annotations

import io
import random
from typing import Any

import torch
from cases import ALL, OPTIMIZERS, closing, loss_of, small_net
from torch import nn

KINDS, MODES, DTYPES = tuple(OPTIMIZERS), (True, False), (torch.float32, torch.bfloat16)


class Run:
    """A model and its optimizer, which is given the model to follow, or parameters.

    Args:
        kind: A name of the optimizer.
        dtype: The model's.
        follows: Whether the optimizer follows the model.
        options: The optimizer's.
        seed: Of the batches.
    """

    def __init__(self, kind: str, dtype: torch.dtype, follows: bool, options: dict[str, Any], seed: int = 0):
        self.model: nn.Module = small_net(dtype)
        self.follows, self.dtype, self.seed = follows, dtype, seed
        self.opt: Any = ALL[kind](self.model if follows else self.model.named_parameters(), **options)

    def loss(self, k: int) -> torch.Tensor:
        """Of the k-th batch, whichever steps were taken before."""
        made = torch.Generator().manual_seed(1000 * self.seed + k)
        x = torch.randn(16, 3, generator=made)
        y = (x.sum(1) + 0.5 * torch.randn(16, generator=made) > 0).long()
        return loss_of(self.model, (x.to(self.dtype), y))

    def train(self, start: int, stop: int) -> None:
        """Take these steps: by a closure, by one backward, by two accumulated ones."""
        for k in range(start, stop):
            if k % 8 == 3:
                self.opt.step(closing(self.opt, lambda k=k: self.loss(k)))
                continue
            self.opt.zero_grad()
            parts = [k, 100_000 + k] if k % 13 > 9 else [k]
            for part in parts:
                loss = self.loss(part) / len(parts)
                if self.follows:
                    loss.backward()
                else:
                    self.opt.backward(loss, last=part == parts[-1])
            self.opt.step()

    def bits(self) -> list[torch.Tensor]:
        """Weights to train on, and all state."""
        self.opt.train()  # after loading, a followed model holds the average until it is called
        state = self.opt.state
        params = [p.detach().clone() for p in self.model.parameters()]
        return params + [v.clone() for p in self.model.parameters() for v in state[p].values()]

    def counters(self) -> list[Any]:
        """What the groups count, and each layer's numbers."""
        names = ("steps", "next_refresh", "last_refresh", "share", "effective_lr")
        return [[group.get(name) for name in names] for group in self.opt.param_groups] + [repr(self.opt.diagnostics())]


# How to save: what comes first, and which weights the file has.
SAVES = ("model first", "optimizer first", "raw", "evaluated", "evaluated, optimizer first")


def save(run: Run, how: str) -> bytes:
    """A checkpoint as a file's bytes; the run may go on after it."""
    if "evaluated" in how:
        run.model.eval() if run.follows else run.opt.eval()
    if "optimizer first" in how:
        state = run.opt.state_dict()
        weights = run.model.state_dict()
    else:
        weights = run.model.state_dict() if how != "raw" else dict(run.model.named_parameters())
        state = run.opt.state_dict()
    file = io.BytesIO()
    torch.save({"model": {name: value.detach() for name, value in weights.items()}, "optimizer": state}, file)
    if "evaluated" in how:
        run.model.train() if run.follows else run.opt.train()
    return file.getvalue()


def resume(run: Run, file: bytes, model_first: bool) -> None:
    """Load a checkpoint into fresh objects, by tensors alone."""
    saved = torch.load(io.BytesIO(file), weights_only=True)
    for name in ("model", "optimizer") if model_first else ("optimizer", "model"):
        (run.model if name == "model" else run.opt).load_state_dict(saved[name])
    if not run.follows:
        run.opt.train()


def same(one: Run, two: Run) -> bool:
    """Whether two runs stand at the same bits and counts."""
    pairs = list(zip(one.bits(), two.bits(), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs) and one.counters() == two.counters()


def stopped_and_whole(make: Any, steps: int, stops: int, drawn: random.Random) -> tuple[Run, Run, str]:
    """A run stopped so often at random steps and resumed in fresh objects, one that is not, and what was drawn."""
    whole, run, said, at = make(), make(), [], 0
    for stop in sorted(drawn.sample(range(1, steps), stops)):
        run.train(at, stop)
        how, model_first = drawn.choice(SAVES), drawn.random() < 0.5
        file, run, at = save(run, how), make(), stop
        resume(run, file, model_first)
        said.append(f"{stop}: {how}, loaded {'model' if model_first else 'optimizer'} first")
    run.train(at, steps)
    whole.train(0, steps)
    return run, whole, "; ".join(said)
