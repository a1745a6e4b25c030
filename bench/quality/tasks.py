"""The tasks: what is trained on what. The sizes are for one CPU core; `full` asks for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.quality import models, sources
from bench.quality.problem import IGNORED, Batch, Problem, Task, chunks, same, sampler
from examples.demo.model import SmallCNN


def tokens_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def crop_and_flip(x: Tensor) -> Tensor:
    """Shift by up to 4 pixels, zeros moving in, and mirror half the images; the draws are torch's random state's."""
    n, side = len(x), x.shape[-1]
    rows, columns = (torch.randint(0, 9, (n, 1)) + torch.arange(side) for _ in range(2))
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns).to(x.device)
    padded = F.pad(x, (4, 4, 4, 4))
    image = torch.arange(n, device=x.device).view(n, 1, 1)
    return padded[image, :, rows.to(x.device).unsqueeze(2), columns.unsqueeze(1)].movedim(3, 1)


def classify(
    model: nn.Module,
    train: Batch,
    test: Batch,
    seed: int,
    batch: int,
    device: str,
    prepare: Callable[[Tensor], Tensor] = same,
    augment: Callable[[Tensor], Tensor] = same,
    evaluated: int = 5000,
) -> Problem:
    """A classification problem, its training loss evaluated on the first so many images."""
    (x, y), (x_test, y_test) = ((a.to(device), b.to(device)) for a, b in (train, test))
    indices = sampler(len(x), batch, seed)

    def draw(step: int) -> Batch:
        chosen = indices(step).to(device)
        return augment(prepare(x[chosen])), y[chosen]

    parts = {"train": chunks(x[:evaluated], y[:evaluated], prepare), "test": chunks(x_test, y_test, prepare)}
    return Problem(model.to(device), seed, draw, F.cross_entropy, parts)


def reconstruct(
    widths: tuple[int, ...],
    pixels: Callable[[], tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    seed: int,
    full: bool,
    device: str,
    small: tuple[int, ...] | None = None,
    start: Callable[[nn.Module], object] = same,
) -> Problem:
    """An autoencoder's problem; the loss is a mean over pixels and images."""
    x, x_test = (part.to(device) for part in pixels())
    model = models.autoencoder(widths if full or small is None else small)
    start(model)
    model.to(device)
    indices = sampler(len(x), batch, seed)

    def draw(step: int) -> Batch:
        chosen = x[indices(step).to(device)]
        return chosen, chosen

    held = {"train": x[:2000], "test": x_test[:2000]}
    parts = {name: chunks(part, part, same) for name, part in held.items()}
    return Problem(model, seed, draw, criterion, parts, accuracy=False)


def fashion_mlp(seed: int, full: bool, device: str, batch: int = 128) -> Problem:
    data = sources.fashion()
    model = models.mlp((784, 1000, 1000, 10) if full else (784, 256, 128, 10))
    return classify(model, (data.x_train, data.y_train), (data.x_test, data.y_test), seed, batch, device)


def fashion_cnn(seed: int, full: bool, device: str, images: int = 60_000, batch: int = 128) -> Problem:
    data = sources.fashion()
    train = data.x_train[:images], data.y_train[:images]
    return classify(SmallCNN(28, 10), train, (data.x_test, data.y_test), seed, batch, device)


def fashion_mixer(seed: int, full: bool, device: str, batch: int = 32) -> Problem:
    """MLP-Mixer on pixels in 0..1, whose black background is zeros; evaluated on as many images as `cifar` is."""
    data = sources.fashion()
    x, x_test = sources.unit_range(data.x_train), sources.unit_range(data.x_test)
    tested = len(x_test) if full else 2000
    model = models.mixer(4, 256, 8) if full else models.mixer(7, 192, 4)
    test = x_test[:tested], data.y_test[:tested]
    return classify(model, (x, data.y_train), test, seed, batch, device, evaluated=tested)


def cifar(
    make: Callable[[bool], nn.Module], seed: int, full: bool, device: str, batch: int = 128, tested: int = 2000
) -> Problem:
    """CIFAR-10 with crop and flip; in the CPU size 2000 images each evaluate, for time."""
    data = sources.cifar10()
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=device).view(3, 1, 1) * 255  # of the training images
    std = torch.tensor([0.2470, 0.2435, 0.2616], device=device).view(3, 1, 1) * 255

    def prepare(x: Tensor) -> Tensor:
        return (x - mean) / std

    tested = len(data.y_test) if full else tested
    train, test = (data.x_train, data.y_train), (data.x_test[:tested], data.y_test[:tested])
    return classify(make(full), train, test, seed, batch, device, prepare, crop_and_flip, tested)


def hide(text: Tensor, mask: int, share: float = 0.15) -> Batch:
    """Put `mask` in place of a share of characters; these alone are the targets; draws from torch's random state."""
    hidden = (torch.rand(text.shape) < share).to(text.device)
    return text.masked_fill(hidden, mask), text.masked_fill(~hidden, IGNORED)


def characters(
    make: Callable[[int, bool], nn.Module],
    length: int,
    batch: int,
    seed: int,
    full: bool,
    device: str,
    masked: bool = False,
    text: Callable[[], tuple[Tensor, Tensor, int]] = sources.bible,
    windows: int = 256,
) -> Problem:
    """Predict a text's next character, or the ones hidden, from windows drawn anew at every step.

    Each part is evaluated on so many fixed windows, spread evenly over it.
    """
    train, test, alphabet = text()
    length, batch = (256, 64) if full else (length, batch)
    window = torch.arange(length + 1)

    def cut(text: Tensor, starts: Tensor) -> Batch:
        found = text[starts.unsqueeze(1) + window].to(device)
        return hide(found[:, :-1], alphabet) if masked else (found[:, :-1], found[:, 1:])

    def draw(step: int) -> Batch:
        return cut(train, torch.randint(0, len(train) - length, (batch,)))  # Problem.loss has seeded it

    def part(text: Tensor) -> list[Callable[[], Batch]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is hidden is the same for every seed
            batches = [cut(text, some) for some in torch.linspace(0, len(text) - length - 1, windows).long().split(64)]
        return [lambda batch=batch: batch for batch in batches]

    parts = {"train": part(train), "test": part(test)}
    return Problem(make(alphabet + masked, full).to(device), seed, draw, tokens_loss, parts)


def transformer(alphabet: int, full: bool, causal: bool = True) -> nn.Module:
    return models.CharTransformer(alphabet, *((256, 384, 6, 6) if full else (64, 64, 2, 4)), causal)


def gpt(alphabet: int, full: bool) -> nn.Module:
    return models.gpt(alphabet, *((256, 384, 6, 6) if full else (64, 128, 3, 4)))


def lstm(alphabet: int, full: bool) -> nn.Module:
    return models.CharLSTM(alphabet, 512 if full else 128)


def cora_gcn(seed: int, full: bool, device: str) -> Problem:
    """Kipf & Welling's GCN, full batch; its L2 term on the first layer is part of the objective for every optimizer."""
    data = sources.cora()
    nodes = len(data.labels)
    adjacent = torch.eye(nodes)
    adjacent[data.edges[0], data.edges[1]] = 1
    scale = adjacent.sum(1).rsqrt()
    graph = scale.unsqueeze(1) * adjacent * scale
    x = (data.features / data.features.sum(1, keepdim=True).clamp(min=1)).to(device)

    def labelled(chosen: Tensor) -> Tensor:
        y = torch.full((nodes,), IGNORED)
        y[chosen] = data.labels[chosen]
        return y.to(device)

    batches = {"train": (x, labelled(data.train)), "test": (x, labelled(data.test))}
    parts = {name: [lambda batch=batch: batch] for name, batch in batches.items()}
    model = models.GCN(graph, x.shape[1], 16, data.classes).to(device)

    def penalty(model: nn.Module) -> Tensor:
        return 0.5 * 5e-4 * model.hidden.weight.square().sum()

    return Problem(model, seed, lambda step: batches["train"], F.cross_entropy, parts, penalty=penalty)


def tiny(seed: int, full: bool, device: str) -> Problem:
    """Two noisy classes on 8 features: no data needed, for tests of the suite itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] + 0.1 * torch.randn(600, generator=generator) > 0).long()
    return classify(models.mlp((8, 16, 2)), (x[:400], y[:400]), (x[400:], y[400:]), seed, 32, device)


BCE = F.binary_cross_entropy_with_logits  # mean over pixels: summed over pixels and divided by their number
ALL = (
    Task("cnn", "small CNN, Fashion-MNIST", 700, 5000, fashion_cnn),
    Task("mlp", "784-256-128-10 (784-1000-1000-10), Fashion-MNIST", 2000, 5000, fashion_mlp),
    Task("mlp_long", "the same, three times the steps", 6000, 15_000, fashion_mlp),
    *(Task(f"mlp_{size}", f"the same from mini-batches of {size}, as many images", 256_000 // size, 640_000 // size,
           partial(fashion_mlp, batch=size)) for size in (32, 512, 1024)),
    Task("few", "small CNN, 1000 images of Fashion-MNIST", 600, 2000, partial(fashion_cnn, images=1000, batch=100)),
    Task(
        "ae_fashion", "784-256-64-16 (784-1000-500-250-30) autoencoder, Fashion-MNIST, BCE", 2000, 10_000,
        partial(
            reconstruct, (784, 1000, 500, 250, 30), sources.fashion_pixels, BCE, 128, small=(784, 256, 64, 16)
        ),
        1e-5,
    ),
    Task(
        "ae_curves", "784-400-200-100-50-25-6 autoencoder, curves-style images, BCE", 2000, 10_000,
        partial(reconstruct, (784, 400, 200, 100, 50, 25, 6), sources.curves, BCE, 128), 1e-5,
    ),
    Task(
        "ae_curves_init", "the same, started sparsely as Martens (2010) does", 2000, 10_000,
        partial(
            reconstruct, (784, 400, 200, 100, 50, 25, 6), sources.curves, BCE, 128, start=models.sparse_start
        ),
        1e-5,
    ),
    Task(
        "ae_faces", "625-250-125-62-30 (625-2000-1000-500-30) autoencoder, ORL faces, squared error", 3000, 10_000,
        partial(reconstruct, (625, 2000, 1000, 500, 30), sources.faces, F.mse_loss, 64, small=(625, 250, 125, 62, 30)),
        1e-5,
    ),
    Task("transformer", "2 layers of 64, King James Bible", 700, 5000, partial(characters, transformer, 64, 32)),
    Task("gpt", "3 layers of 128 (6 of 384), started as GPT-2, tiny Shakespeare", 3000, 5000,
         partial(characters, gpt, 64, 12, text=sources.shakespeare)),
    Task("masked", "the transformer, but of hidden characters (15 %)", 700, 5000,
         partial(characters, partial(transformer, causal=False), 64, 32, masked=True)),
    Task("lstm", "128 units, King James Bible", 1000, 5000, partial(characters, lstm, 64, 32)),
    Task("gcn", "2 layers of 16, Cora", 200, 200, cora_gcn, 0.0),
    Task("vgg11", "VGG11 at a quarter's width, CIFAR-10", 300, 20_000,
         partial(cifar, lambda full: models.vgg(11, 1 if full else 4))),
    Task("vgg16", "VGG16 with BatchNorm at an eighth's width, CIFAR-10", 300, 20_000,
         partial(cifar, lambda full: models.vgg(16, 1 if full else 8))),
    Task("resnet", "ResNet-8 of width 8 (ResNet-32 of 16), CIFAR-10", 300, 20_000,
         partial(cifar, lambda full: models.resnet(16, 5) if full else models.resnet(8, 1))),
    Task("bn", "ResNet-8 of width 42 on half the pixels (ResNet-14 of 64), mini-batches of 32, CIFAR-10", 3000, 20_000,
         partial(cifar, lambda full: models.resnet(64, 2) if full else models.resnet(42, 1, stride=2), batch=32)),
    Task("mixer", "MLP-Mixer, 4 blocks of 192 on 16 patches (8 of 256 on 49), mini-batches of 32, Fashion-MNIST", 3000,
         20_000, fashion_mixer),
    Task("vit", "2 layers of 48 (6 of 192), CIFAR-10", 300, 20_000,
         partial(cifar, lambda full: models.ViT(4, 192, 6, 6) if full else models.ViT(4, 48, 2, 4))),
)  # fmt: skip
HIDDEN = (Task("tiny", "MLP on made-up data, for tests", 60, 60, tiny),)
TASKS = {task.name: task for task in ALL}
EVERY_TASK = TASKS | {task.name: task for task in HIDDEN}
