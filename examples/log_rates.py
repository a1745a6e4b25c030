"""What an optimizer measured, into TensorBoard and a CSV file.

python examples/log_rates.py          # writes runs/rates.csv, and for TensorBoard where that is installed
tensorboard --logdir runs
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW


def main(folder: Path, steps: int = 200) -> None:
    """Train a small network and log every 20 steps; reading the numbers waits for the device once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(2048, 20)
    y = (x.sum(1) > 0).long()
    opt = AdamWLW(model)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder))
    except ModuleNotFoundError:
        board = None
    with open(folder / "rates.csv", "w", newline="") as file:
        table = csv.writer(file)
        for step in range(steps):
            opt.zero_grad()
            index = torch.randint(len(x), (64,))
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            opt.step()
            if step % 20 == 0:
                row = {"step": step, "loss": loss.item(), **opt.log()}
                if step == 0:
                    table.writerow(row)
                table.writerow(row.values())
                for name, value in row.items() if board is not None else ():
                    board.add_scalar(name, value, step)
    print(f"last loss {loss.item():.4f}; {folder / 'rates.csv'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
