"""Image data that is read from this machine and never downloaded: Fashion-MNIST and scikit-learn's digits.

Each loader checks what it reads (magic numbers, sizes, labels), names the file when something is wrong, and
says how to get what is missing. Images come back as float32 of shape (N, 1, height, width), shifted and
scaled to mean 0 and variance 1 over the training set; labels as int64.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
HOW_TO_GET = (
    "On Debian or Ubuntu: apt install dataset-fashion-mnist. Elsewhere, give the folder that holds its four "
    "IDX files (path=..., or --path of the demo), or set LWAS_FAST_DATA to the folder above one named "
    "fashion-mnist."
)
NAMES = ("auto", "fashion-mnist", "digits")
UNSIGNED_BYTE = 0x08  # IDX's code for the only element type these files use


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


def load_images(name: str = "auto", path: str | os.PathLike[str] | None = None) -> Images:
    """Load a data set by name.

    Args:
        name: "fashion-mnist", "digits", or "auto": Fashion-MNIST if it was pointed to (by `path` or
            LWAS_FAST_DATA) or if its Debian package is installed, else digits.
        path: The folder of Fashion-MNIST's files. Digits come with scikit-learn and have none.

    Raises:
        ValueError: Unknown name, `path` given for digits, or a file that is damaged.
        FileNotFoundError: A file is missing; the message says how to get it.
        ModuleNotFoundError: Digits without scikit-learn.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if name == "auto":
        # A place that was named must be right: falling back to digits would hide a typing error.
        named = path is not None or os.environ.get("LWAS_FAST_DATA")
        name = "fashion-mnist" if named or DEBIAN_FOLDER.is_dir() else "digits"
    if name == "fashion-mnist":
        return load_fashion_mnist(path)
    if path is not None:
        raise ValueError("digits come with scikit-learn and take no path")
    return load_digits()


def load_fashion_mnist(path: str | os.PathLike[str] | None = None) -> Images:
    """Load Fashion-MNIST (60,000 + 10,000 grey images of 28x28 pixels, 10 classes) from its four IDX files.

    Args:
        path: Their folder; the files may be gzipped, as published, or not. None stands for
            `$LWAS_FAST_DATA/fashion-mnist` if that variable is set, else for the Debian package's folder.
    """
    folder = Path(path) if path is not None else _default_folder()
    x_train, y_train = _read_part(folder, "train")
    x_test, y_test = _read_part(folder, "t10k")
    return _normalised(Images("fashion-mnist", x_train, y_train, x_test, y_test))


def load_digits() -> Images:
    """Load scikit-learn's digits (1797 grey images of 8x8 pixels, 10 classes), which its wheel contains.

    They have no published split: a fixed fifth, drawn at random, is the test set.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("digits come with scikit-learn: pip install scikit-learn") from error
    bunch = datasets.load_digits()
    x, y = torch.from_numpy(bunch.images).unsqueeze(1), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    return _normalised(Images("digits", x[train], y[train], x[test], y[test]))


def _default_folder() -> Path:
    root = os.environ.get("LWAS_FAST_DATA")
    return Path(root) / "fashion-mnist" if root else DEBIAN_FOLDER


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_file = _find(folder, f"{part}-images-idx3-ubyte")
    labels_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = _read_idx(images_file, dims=3), _read_idx(labels_file, dims=1)
    if images.shape[1:] != (28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"{images_file}: images of {size} pixels, expected 28x28")
    if len(images) != len(labels):
        raise ValueError(f"{labels_file}: {len(labels)} labels, {images_file.name} has {len(images)} images")
    if int(labels.max()) > 9:
        raise ValueError(f"{labels_file}: label {int(labels.max())}, expected 0 to 9")
    return images.unsqueeze(1), labels.long()


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"Fashion-MNIST: there is no folder {folder}. {HOW_TO_GET}")
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise FileNotFoundError(f"Fashion-MNIST: {folder} holds neither {name}.gz nor {name}. {HOW_TO_GET}")


def _read_idx(file: Path, dims: int) -> Tensor:
    """Read an IDX file of bytes: 0, 0, type, number of dimensions, each size (big-endian), the elements."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged gzip file ({error}); get it again. {HOW_TO_GET}") from error
    magic, header = bytes([0, 0, UNSIGNED_BYTE, dims]), 4 + 4 * dims
    if content[:4] != magic:
        found = content[:4].hex(" ")
        raise ValueError(f"{file}: starts with {found}, an IDX file of these starts with {magic.hex(' ')}")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) < header:
        raise ValueError(f"{file}: ends within its header, after {len(content)} bytes")
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{file}: {len(content) - header} bytes of data, its header says {math.prod(shape)}")
    if math.prod(shape) == 0:
        raise ValueError(f"{file}: holds no data (shape {tuple(shape)})")
    # bytearray: frombuffer warns about memory that it may not write to.
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def _normalised(images: Images) -> Images:
    x_train, x_test = images.x_train.float(), images.x_test.float()
    std, mean = torch.std_mean(x_train)
    return images._replace(x_train=(x_train - mean) / std, x_test=(x_test - mean) / std)
