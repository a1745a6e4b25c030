"""Several processes: a small GPT under DistributedDataParallel, or with its parameters sharded by FSDP2.

    torchrun --standalone --nproc-per-node 2 -m examples.distributed          # every rank has all parameters (DDP)
    torchrun --standalone --nproc-per-node 2 -m examples.distributed --fsdp   # each has a part of every parameter

On tiny Shakespeare where the folder LWAS_FAST_DATA has it, else on Python's own help. Half way it saves a checkpoint,
loads that into a new model and a new optimizer, and goes on with these. Exits with 1 where ranks have other rates.
"""

from __future__ import annotations

import argparse
import os
import sys
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.data import load_shakespeare
from bench.models import GPT
from lwas_fast import AdamWLW

LENGTH = 64  # characters that the model sees


def load_text() -> Tensor:
    """The text, as ASCII codes."""
    try:
        text = load_shakespeare()
    except FileNotFoundError:
        text = "".join(topics.values())
    return torch.tensor(list(text.encode("ascii", "replace")))


def make(device: torch.device, fsdp: bool) -> tuple[nn.Module, AdamWLW]:
    """A model that is the same on all ranks, ready to be trained by them together, and its optimizer."""
    torch.manual_seed(0)
    model: nn.Module = GPT(vocabulary=128, length=LENGTH, width=64, depth=2, heads=4)
    for table in (model.token, model.position):
        nn.init.normal_(table.weight, std=0.02)  # GPT-2's: at torch's 1 the tied output starts far off
    model.to(device)
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)  # the rest: embeddings, which the output is tied to, and the last norm
    else:
        model = DistributedDataParallel(model)
    return model, AdamWLW(model)  # after sharding, which replaces the parameters


def loss_of(model: nn.Module, text: Tensor, starts: Tensor, device: torch.device) -> Tensor:
    """The loss of predicting each character of some pieces of the text from those before it."""
    pieces = text[starts[:, None] + torch.arange(LENGTH + 1)].to(device)
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def average(value: Tensor) -> float:
    """A number, averaged over the ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def validate(model: nn.Module, text: Tensor, device: torch.device) -> float:
    """The loss on pieces that no step sees; in evaluation mode the model holds the average of its weights."""
    model.eval()
    starts = torch.arange(0, len(text) - LENGTH, LENGTH)[:128]
    with torch.no_grad():
        loss = average(loss_of(model, text, starts[dist.get_rank() :: dist.get_world_size()], device))
    model.train()
    return loss


def rates_agree(opt: AdamWLW, device: torch.device) -> bool:
    """Whether all ranks have the same rates, bit for bit."""
    mine = torch.tensor(list(opt.rates().values()), dtype=torch.float64, device=device)
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    return all(torch.equal(mine, other) for other in of_all)


def save(model: nn.Module, opt: AdamWLW, folder: str) -> None:
    """Write a checkpoint; each rank writes what it holds."""
    of_model, of_opt = get_state_dict(model, opt)
    dcp.save({"model": of_model, "optimizer": of_opt}, checkpoint_id=folder)


def load(model: nn.Module, opt: AdamWLW, folder: str) -> None:
    """Read a checkpoint into a model and an optimizer that are new, or not; by as many ranks as there are now."""
    of_model, of_opt = get_state_dict(model, opt)  # tensors that are read into
    dcp.load({"model": of_model, "optimizer": of_opt}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=of_model, optim_state_dict=of_opt)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(prog="python -m examples.distributed", description=__doc__)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters with FSDP2; else DDP")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="pieces of text in a step, of all ranks together")
    parser.add_argument("--every", type=int, default=20, help="steps from one line that is printed to the next")
    parser.add_argument("--folder", default="runs/distributed", help="of the checkpoint; all ranks must reach it")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_, **__: None

    text = load_text()
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model, opt = make(device, args.fsdp)
    due = 0
    for step in range(args.steps):
        if step == args.steps // 2:
            saved = validate(model, test, device)
            save(model, opt, args.folder)
            model, opt = make(device, args.fsdp)
            load(model, opt, args.folder)
            say(f"validation loss {saved:.4f}, of the checkpoint {validate(model, test, device):.4f}")
        # All ranks draw the same and each takes its own. By step number: a resumed run sees what it would have seen.
        starts = torch.randint(len(train) - LENGTH, (args.batch,), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, train, starts[rank::ranks], device)
        due += opt.curvature_due
        loss.backward()  # measures when that is due
        opt.step()
        opt.zero_grad()
        if step % args.every == 0 or step == args.steps - 1:
            mean = average(loss)  # all ranks take part
            say(f"step {step:4d}, loss {mean:.4f}")

    agree = rates_agree(opt, device)
    say(f"validation loss {validate(model, test, device):.4f}")
    say(f"measurements: {due} due, {opt.log()['measurements']:.0f} taken; rates equal on {ranks} ranks: {agree}")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(not agree)  # as Python ends by itself a thread of gloo's may abort it, or never end: pytorch#190489


if __name__ == "__main__":
    main()
