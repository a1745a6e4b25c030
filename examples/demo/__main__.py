"""A small CNN trained with MuonLW, no learning rate given, beside AdamW: ``python -m examples.demo`` in a clone.

Both start from the same weights and see the same batches; AdamW takes its default learning rate, 1e-3, and no
schedule. It ends with a table of what was measured and a picture of the losses and of each layer's rate. One
seed and one task: a look at how it behaves, not a benchmark.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.data import HOW_TO_GET, NAMES, Images, load_images, places
from examples.demo.model import SmallCNN
from lwas_fast import MuonLW, refresh_norms

if TYPE_CHECKING:
    from examples.demo.report import Bars, Run

STEPS = {"fashion-mnist": 900, "digits": 300}
QUICK_STEPS, WARM_UP_STEPS = 60, 3
BATCHES_FOR_NORM = 50
EVALUATED = 10_000  # images of the training set on which the training loss is measured at the end
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "MuonLW": MuonLW,
    "AdamW (lr=1e-3)": lambda model: torch.optim.AdamW(model.parameters()),
}


def take_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Train on one batch; `run` takes the loss, the time and, where they were measured anew, the rates."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    measures = isinstance(optimizer, MuonLW) and optimizer.curvature_due
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    value = loss.item()  # waits for the device, so the time is that of the whole step
    run.add_step(value, time.perf_counter() - start)
    if isinstance(optimizer, MuonLW) and measures:  # rates() waits too, and until the next measurement they stay
        run.add_rates(optimizer.rates(), optimizer.diagnostics())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    scores = torch.cat([model(part) for part in torch.split(x, 1000)])
    return F.cross_entropy(scores, y).item(), (scores.argmax(1) == y).float().mean().item()


def make_batches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Draw the indices of each batch: whole batches of one shuffled pass over the data after another."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(count, generator=generator)
        batches += torch.split(order[: count - count % batch_size], batch_size)
    return batches[:steps]


def compare(data: Images, batches: Sequence[Tensor], seed: int, bars: Bars) -> list[Run]:
    """Train the same model on the same batches with each optimizer, and measure.

    They take turns at every step, so that whatever else the machine does slows both alike.
    """
    from examples.demo.report import Run

    torch.manual_seed(seed)
    initial = SmallCNN(data.x_train.shape[-1], data.classes).to(data.x_train.device)
    for warm_up in (True, False):
        # PyTorch sets much up on first use, and whoever came first would pay for it.
        models = [copy.deepcopy(initial) for _ in OPTIMIZERS]
        optimizers = [make(model) for make, model in zip(OPTIMIZERS.values(), models, strict=True)]
        runs = [Run(name) for name in OPTIMIZERS]
        for batch in batches[:WARM_UP_STEPS] if warm_up else batches:
            x, y = data.x_train[batch], data.y_train[batch]
            for run, model, optimizer in zip(runs, models, optimizers, strict=True):
                take_step(run, model, optimizer, x, y)
                if not warm_up:
                    bars.advance(run)
    for run, model in zip(runs, models, strict=True):
        # BatchNorm has gathered no statistics with an average, and late ones with weights that move: anew, for both.
        refresh_norms(model, (data.x_train[batch] for batch in batches[-BATCHES_FOR_NORM:]))
        run.train_loss, _ = evaluate(model, data.x_train[:EVALUATED], data.y_train[:EVALUATED])
        run.test_loss, run.test_accuracy = evaluate(model, data.x_test, data.y_test)
    return runs


def partial(out: Path) -> Path:
    """Return the name under which the picture is written before it takes its own."""
    return out.with_stem(f"{out.stem}.partial")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what could fail only after minutes of training is refused here."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
        return value

    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train a small CNN with MuonLW, no learning rate given, and with AdamW beside it.",
    )
    parser.add_argument("--data", choices=NAMES, default="auto", help="Fashion-MNIST if found, else digits")
    parser.add_argument("--path", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--steps", type=positive, help="default: 900, on digits 300")
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("lwas_fast_demo.png"), help="picture")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: does it run at all?")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {args.out}: the name must end in .png, .svg or .pdf")
    try:
        partial(args.out).touch()
        partial(args.out).unlink()
        if args.out.is_dir():
            parser.error(f"--out {args.out}: is a folder")
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written ({error.strerror})")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = parse(argv)
    try:
        from examples.demo.report import Bars, draw, print_table, say

        data = load_images(args.data, args.path)
    except ModuleNotFoundError as error:
        sys.exit(f"the demo needs {error.name}: pip install rich matplotlib scikit-learn, or use `make demo`")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.batch_size > len(data.y_train):
        sys.exit(f"error: --batch-size {args.batch_size}, but {data.name} has {len(data.y_train)} images")
    if data.name == "digits" and args.data == "auto":
        looked = " or ".join(map(str, places()))
        say(f"No Fashion-MNIST in {looked}: training on scikit-learn's small digits instead. {HOW_TO_GET}")
    torch.set_num_threads(args.threads)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS[data.name])
    batches = make_batches(len(data.y_train), args.batch_size, steps, args.seed)
    with Bars(steps) as bars:
        runs = compare(data.to(args.device), batches, args.seed, bars)
    what = f"{data.name}, small CNN, {steps} steps of {args.batch_size} images, seed {args.seed}"
    where = args.device if args.device != "cpu" else f"the CPU ({args.threads} threads)"
    print_table(runs, what, where)
    unfinished = partial(args.out)
    try:
        draw(runs, what, unfinished)
        unfinished.replace(args.out)
    finally:
        unfinished.unlink(missing_ok=True)
    say(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
