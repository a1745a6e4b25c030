"""Fashion-MNIST and scikit-learn's digits, read from this machine and never downloaded.

Images come back as float32 of shape (N, 1, height, width), shifted and scaled to mean 0 and variance 1 over the
training set; labels as int64.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("auto", "fashion-mnist", "digits")
SIZES = {"train": 60_000, "t10k": 10_000}  # images of Fashion-MNIST's two parts
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
HOW_TO_GET = (
    "On Debian or Ubuntu: apt install dataset-fashion-mnist. Elsewhere, give the folder that holds its four "
    "IDX files (path=..., or --path of the demo), or set LWAS_FAST_DATA to the folder above one named "
    "fashion-mnist."
)


class Images(NamedTuple):
    """A labelled image data set, split into training and test parts."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y_train.max()) + 1

    def to(self, device: torch.device | str) -> Images:
        """Return the same data on a device."""
        return Images(self.name, *(part.to(device) for part in self[1:]))


def load_images(name: str = "auto", path: Path | None = None) -> Images:
    """Load a data set by name.

    Args:
        name: "fashion-mnist", "digits", or "auto": Fashion-MNIST if it is found or `path` is given, else digits.
        path: The folder of Fashion-MNIST's files. Digits come with scikit-learn and have none.

    Raises:
        ValueError: `path` given for digits, or a file that is damaged.
        FileNotFoundError: A file is missing; the message says how to get it.
        ModuleNotFoundError: Digits without scikit-learn.
    """
    if name == "digits" and path is not None:
        raise ValueError("digits come with scikit-learn and take no path")
    if name == "digits" or (name == "auto" and path is None and not any(place.is_dir() for place in places())):
        return load_digits()
    return load_fashion_mnist(path)


def places() -> list[Path]:
    """Return the folders in which Fashion-MNIST is looked for: `$LWAS_FAST_DATA/fashion-mnist`, then Debian's."""
    named = os.environ.get("LWAS_FAST_DATA")
    return [Path(named) / "fashion-mnist", DEBIAN_FOLDER] if named else [DEBIAN_FOLDER]


def load_fashion_mnist(path: Path | None = None) -> Images:
    """Load Fashion-MNIST (60,000 + 10,000 grey images of 28x28 pixels, 10 classes) from its four IDX files.

    Args:
        path: Their folder; the files may be gzipped, as published, or not. None: the first of `places()` that is there.
    """
    looked = places() if path is None else [path]
    folder = next((place for place in looked if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"Fashion-MNIST: there is no folder {' or '.join(map(str, looked))}. {HOW_TO_GET}")
    parts: list[Tensor] = []
    for part, count in SIZES.items():
        parts.append(_read_idx(folder / f"{part}-images-idx3-ubyte", count, 28, 28).unsqueeze(1))
        parts.append(_read_idx(folder / f"{part}-labels-idx1-ubyte", count).long())
    return _normalised(Images("fashion-mnist", *parts))


def load_digits() -> Images:
    """Load scikit-learn's digits (1797 grey images of 8x8 pixels, 10 classes), which its wheel contains.

    They have no published split: a fixed fifth, drawn at random, is the test set.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    x, y = torch.from_numpy(bunch.images).unsqueeze(1), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    return _normalised(Images("digits", x[train], y[train], x[test], y[test]))


def _read_idx(file: Path, *shape: int) -> Tensor:
    """Read bytes in IDX: 0, 0, their type (8), how many sizes, the sizes (big-endian), the bytes."""
    zipped = file.with_name(f"{file.name}.gz")
    if not zipped.is_file() and not file.is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST: {file.parent} holds neither {zipped.name} nor {file.name}. {HOW_TO_GET}"
        )
    try:
        content = gzip.decompress(zipped.read_bytes()) if zipped.is_file() else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{zipped}: damaged gzip file ({error}); get it again. {HOW_TO_GET}") from error
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    start, length = content[: len(header)], len(header) + math.prod(shape)
    if start != header or len(content) != length:
        raise ValueError(
            f"{file}: {len(content)} bytes that start with {start.hex(' ')}, but Fashion-MNIST's are {length} "
            f"that start with {header.hex(' ')}; get it again. {HOW_TO_GET}"
        )
    # bytearray: frombuffer warns about memory that it may not write to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).reshape(shape)


def _normalised(images: Images) -> Images:
    x_train, x_test = images.x_train.float(), images.x_test.float()
    std, mean = torch.std_mean(x_train)
    return images._replace(x_train=(x_train - mean) / std, x_test=(x_test - mean) / std)
