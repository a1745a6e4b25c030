"""Data that is read from this machine and never downloaded: Fashion-MNIST, scikit-learn's digits, CIFAR-10 and Cora.

Each loader checks what it reads (magic numbers, sizes, labels), names the file when something is wrong, and
says how to get what is missing. Grey images come back as float32 of shape (N, 1, height, width), shifted and
scaled to mean 0 and variance 1 over the training set; CIFAR-10 as bytes; labels as int64.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
CIFAR10_SIZES = {"train": 50_000, "test": 10_000}
CIFAR10_HOW_TO_GET = (
    "Give the folder (path=...) or set LWAS_FAST_DATA to it: it holds cifar10_train.npz and cifar10_test.npz (jpeg: "
    "the bytes of all, offsets, labels, classes), or cifar-10-batches-py, which cifar-10-python.tar.gz unpacks to and "
    "which torchvision.datasets.CIFAR10(root, download=True) leaves in its root."
)
CORA_SHAPE, CORA_CLASSES = (2708, 1433), 7
CORA_HOW_TO_GET = (
    "Give the folder (path=...) or set LWAS_FAST_DATA to it: it holds cora.npz with Cora in Planetoid's split (words "
    "of papers as CSR: indptr, indices, data, shape; edges as pairs; labels; the numbers of train, val and test). "
    "torch_geometric.datasets.Planetoid(root, 'Cora', split='public') has what it is made from."
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


class Graph(NamedTuple):
    """A graph whose nodes have features and classes, and which of them are for what."""

    name: str
    features: Tensor  # (nodes, features), float32
    edges: Tensor  # (2, 2 E), int64: every edge in both directions, none from a node to itself
    labels: Tensor
    train: Tensor  # numbers of nodes
    val: Tensor
    test: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1


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


def load_cifar10(path: str | os.PathLike[str] | None = None) -> Images:
    """Load CIFAR-10 (50,000 + 10,000 colour images of 32x32 pixels, 10 classes).

    Args:
        path: The folder that holds the two .npz files or cifar-10-batches-py. None stands for `$LWAS_FAST_DATA`.

    Returns:
        Bytes of shape (N, 3, 32, 32), not normalised: as float32 they would take 740 MB.

    Raises:
        FileNotFoundError: A file is missing; the message says how to get it.
        ModuleNotFoundError: .npz files without Pillow, which decodes them.
        ValueError: A file is damaged.
    """
    folder = _named_folder("CIFAR-10", path, CIFAR10_HOW_TO_GET)
    batches = folder if folder.name == "cifar-10-batches-py" else folder / "cifar-10-batches-py"
    parts: list[Tensor] = []
    for part, size in CIFAR10_SIZES.items():
        file = folder / f"cifar10_{part}.npz"
        if file.is_file():
            x, y = _read_jpegs(file)
        elif batches.is_dir():
            names = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
            read = [_read_batch(batches / name) for name in names]
            x, y = torch.cat([x for x, _ in read]), torch.cat([y for _, y in read])
            file = batches
        else:
            raise FileNotFoundError(
                f"CIFAR-10: {folder} holds neither {file.name} nor cifar-10-batches-py. {CIFAR10_HOW_TO_GET}"
            )
        if len(x) != size or len(y) != size:
            raise ValueError(f"{file}: {len(x)} images and {len(y)} labels for {part}, expected {size} of each")
        if int(y.min()) < 0 or int(y.max()) > 9:
            raise ValueError(f"{file}: labels from {int(y.min())} to {int(y.max())}, expected 0 to 9")
        parts += [x, y]
    return Images("cifar-10", *parts)


def load_cora(path: str | os.PathLike[str] | None = None) -> Graph:
    """Load Cora (2708 papers, 1433 words, 5278 citations, 7 subjects) in Planetoid's split.

    Args:
        path: The folder that holds cora.npz. None stands for `$LWAS_FAST_DATA`.

    Raises:
        FileNotFoundError: It is missing; the message says how to get it.
        ValueError: It is damaged.
    """
    file = _named_folder("Cora", path, CORA_HOW_TO_GET) / "cora.npz"
    if not file.is_file():
        raise FileNotFoundError(f"Cora: there is no {file}. {CORA_HOW_TO_GET}")
    names = ("indptr", "indices", "data", "shape", "edges", "labels", "train", "val", "test")
    held = dict(zip(names, _read_npz(file, names), strict=True))
    if tuple(held["shape"]) != CORA_SHAPE:
        raise ValueError(f"{file}: features of shape {tuple(held['shape'].tolist())}, expected {CORA_SHAPE}")
    nodes, words = CORA_SHAPE
    starts, counts = held["indptr"].astype(np.int64), np.diff(held["indptr"].astype(np.int64))
    columns = held["indices"].astype(np.int64)
    whole = len(columns) == len(held["data"]) and len(starts) == nodes + 1
    if not whole or starts[0] != 0 or starts[-1] != len(columns) or counts.min() < 0:
        raise ValueError(f"{file}: indptr, indices and data do not make a sparse matrix of {nodes} rows")
    edges = held["edges"].astype(np.int64)
    if edges.ndim != 2 or edges.shape[1] != 2 or len(held["labels"]) != nodes:
        raise ValueError(
            f"{file}: edges of shape {edges.shape} and {len(held['labels'])} labels, expected pairs, {nodes}"
        )
    splits = [held[name].astype(np.int64) for name in ("train", "val", "test")]
    for name, numbers, limit in (
        ("indices", columns, words),
        ("edges", edges, nodes),
        ("labels", held["labels"], CORA_CLASSES),
        *zip(("train", "val", "test"), splits, (nodes,) * 3, strict=True),
    ):
        if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= limit:
            raise ValueError(f"{file}: {name} is empty or holds numbers outside 0 to {limit - 1}")
    chosen = np.concatenate(splits)
    if len(np.unique(chosen)) != len(chosen):
        raise ValueError(f"{file}: a node is in two of train, val and test")
    features = np.zeros(CORA_SHAPE, dtype=np.float32)
    features[np.repeat(np.arange(nodes), counts), columns] = held["data"]
    pairs = torch.from_numpy(edges[edges[:, 0] != edges[:, 1]].T.copy())
    labels = torch.from_numpy(held["labels"].astype(np.int64))
    both = torch.cat([pairs, pairs.flip(0)], dim=1)
    return Graph("cora", torch.from_numpy(features), both, labels, *map(torch.from_numpy, splits))


def _named_folder(what: str, path: str | os.PathLike[str] | None, how: str) -> Path:
    named = path if path is not None else os.environ.get("LWAS_FAST_DATA")
    if not named:
        raise FileNotFoundError(f"{what} was not pointed to. {how}")
    folder = Path(named)
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {folder}. {how}")
    return folder


def _read_npz(file: Path, names: tuple[str, ...]) -> list[np.ndarray[Any, Any]]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return [content[name] for name in names]
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged, or not the file it should be ({error})") from error


def _read_jpegs(file: Path) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CIFAR-10's .npz files hold JPEGs: pip install pillow") from error
    jpeg, offsets, labels = _read_npz(file, ("jpeg", "offsets", "labels"))
    ends = offsets.astype(np.int64).tolist()
    if len(ends) != len(labels) + 1 or ends[0] != 0 or ends[-1] != len(jpeg) or ends != sorted(ends):
        raise ValueError(f"{file}: {len(ends)} offsets up to {ends[-1]}, {len(labels)} labels, {len(jpeg)} bytes")
    content, pixels = jpeg.tobytes(), np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        try:
            with Image.open(io.BytesIO(content[start:end])) as image:
                pixel = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{file}: image {i} is damaged ({error})") from error
        if pixel.shape != (32, 32, 3):
            raise ValueError(f"{file}: image {i} has shape {pixel.shape}, expected (32, 32, 3)")
        pixels[i] = pixel
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays, and refuses whatever else a pickle could be made to do."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if (numpy and name in ("_reconstruct", "ndarray", "dtype")) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is no array")


def _read_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Read a file of torchvision's folder: a pickled dictionary of 3072 bytes an image, red first, and labels."""
    if not file.is_file():
        raise FileNotFoundError(f"CIFAR-10: there is no {file}. {CIFAR10_HOW_TO_GET}")
    try:
        content = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pixels, labels = content[b"data"], torch.tensor(content[b"labels"])
        return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), labels
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged, or not the file it should be ({error})") from error
