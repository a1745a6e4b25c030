"""Published trainings in their recipes' own setting, as tasks of the quality suite.

What a recipe says of the optimizer is in `Workload.recipe`; data, model, clipping and evaluation are in the task. Where
a setting differs from the publication, `differs` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from bench.quality import models, sources
from bench.quality.problem import Problem, Task
from bench.quality.tasks import characters, cifar, cora_gcn


@dataclass(frozen=True)
class Workload:
    """A published training.

    Attributes:
        task: What is trained.
        metric: What is published: `test` or `accuracy` of a run.
        published: Its value there.
        source: Where.
        recipe: An optimizer's options there, by its name; those that are given on the command line have priority.
        differs: From the publication.
    """

    task: Task
    metric: str
    published: float
    source: str
    recipe: dict[str, str] = field(default_factory=dict)
    differs: str = ""


def language(
    sizes: tuple[int, int, int, int], batch: int, dropout: float, windows: int, seed: int, device: str
) -> Problem:
    """nanoGPT on tiny Shakespeare: no biases, gradients clipped at 1, weight decay for matrices alone.

    Args:
        sizes: Characters in a window, width, depth, heads.
        batch: Windows in a mini-batch.
        dropout: Its share.
        windows: On which each part is evaluated.
        seed: Of the problem.
        device: Where.
    """

    def make(alphabet: int, full: bool) -> nn.Module:
        return models.gpt(alphabet, *sizes, bias=False, dropout=dropout)

    problem = characters(
        make, sizes[0], batch, seed, False, device, text=sources.shakespeare, windows=windows
    )  # full=False: the sizes are those given
    return replace(problem, clip=1.0, only_matrices=True)


def nanogpt(seed: int, full: bool, device: str) -> Problem:
    return language((64, 128, 4, 4), 12, 0.0, 1024, seed, device)


def nanogpt_full(seed: int, full: bool, device: str) -> Problem:
    return language((256, 384, 6, 6), 64, 0.2, 1024, seed, device)


def resnet20(seed: int, full: bool, device: str, batch: int = 128) -> Problem:
    """He et al.'s ResNet-20: shortcuts without weights, their initialization, crops and flips."""

    def make(full: bool) -> nn.Module:
        model = models.resnet(16, 3, project=False)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        return model

    return cifar(make, seed, full, device, batch)


NANOGPT = {"adamw": "betas=(0.9,0.99),lr=0.001,schedule=nanogpt"}
ALL = (
    Workload(
        Task("nanogpt", "nanoGPT on a CPU, tiny Shakespeare", 2000, 2000, nanogpt, 0.1, checks=8, best=True),
        "test", 1.88, "karpathy/nanoGPT, README, 'I only have a macbook'", NANOGPT,
        "1024 fixed windows of the last tenth instead of 20 random mini-batches",
    ),
    Workload(
        Task("nanogpt_full", "nanoGPT on a GPU, tiny Shakespeare", 5000, 5000, nanogpt_full, 0.1, checks=20, best=True),
        "test", 1.4697, "karpathy/nanoGPT, README, 'I have a GPU'", NANOGPT,
        "1024 fixed windows instead of 200 random mini-batches; float32, not compiled, attention written out",
    ),
    Workload(
        Task("gcn", "GCN, Cora", 200, 200, cora_gcn, 0.0),
        "accuracy", 0.815, "Kipf & Welling, arXiv 1609.02907, table 2: the mean of 100 starts",
        {"adamw": "lr=0.01"},  # without weight decay this is Adam
        "judged after 200 epochs, without early stopping; biases, as in the authors' PyTorch version",
    ),
    Workload(
        Task("resnet20_full", "ResNet-20, CIFAR-10", 64_000, 64_000, resnet20, 1e-4, checks=20),
        "accuracy", 0.9125, "He et al., arXiv 1512.03385, table 6",
        {"sgd": "lr=0.1,schedule=two_drops"},
        "channels' mean and deviation instead of each pixel's mean; statistics of BatchNorm gathered anew",
    ),
)  # fmt: skip
WORKLOADS = {workload.task.name: workload for workload in ALL}
