"""Data of the training-quality suite: CIFAR-10, Cora, a text from the folder LWAS_FAST_DATA, and the demo's images.

Nothing is downloaded. What is missing or damaged is named, with the way to get it.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.demo.data import Images, load_fashion_mnist

__all__ = ["Graph", "Images", "load_cifar10", "load_cora", "load_fashion_mnist", "load_shakespeare"]

CIFAR10_SIZES = {"train": 50_000, "test": 10_000}
CIFAR10_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CIFAR10_HOW_TO_GET = (
    "Set LWAS_FAST_DATA to the folder that holds cifar10_train.npz and cifar10_test.npz (jpeg: the bytes of all "
    "images, offsets, labels) or cifar-10-batches-py, which cifar-10-python.tar.gz unpacks to and which "
    "torchvision.datasets.CIFAR10(root, download=True) leaves in its root."
)
CORA_SHAPE = (2708, 1433)
CORA_HOW_TO_GET = (
    "Set LWAS_FAST_DATA to the folder that holds cora.npz: Cora in Planetoid's split (words of papers as CSR: indptr, "
    "indices, data, shape; edges as pairs; labels; the numbers of train, val and test). "
    "torch_geometric.datasets.Planetoid(root, 'Cora', split='public') has what it is made from."
)

SHAKESPEARE_SIZE = 1_115_394
SHAKESPEARE_HOW_TO_GET = (
    "Set LWAS_FAST_DATA to the folder that holds tinyshakespeare.txt: input.txt of data/tinyshakespeare in the "
    "repository karpathy/char-rnn."
)


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


def load_cifar10() -> Images:
    """Load CIFAR-10 (50,000 + 10,000 colour images of 32x32 pixels, 10 classes).

    Returns:
        Bytes of shape (N, 3, 32, 32), not normalised: as float32 they would take 740 MB.

    Raises:
        FileNotFoundError: A file is missing; the message says how to get it.
        ValueError: A file is damaged.
    """
    folder = _folder("CIFAR-10", CIFAR10_HOW_TO_GET)
    parts: list[Tensor] = []
    for part, size in CIFAR10_SIZES.items():
        file = folder / f"cifar10_{part}.npz"
        if file.is_file():
            x, y = _read_jpegs(file)
        else:
            file = folder / "cifar-10-batches-py"
            read = [_read_batch(file / name) for name in CIFAR10_BATCHES[part]]
            x, y = (torch.cat(several) for several in zip(*read, strict=True))
        if len(x) != size or len(y) != size:
            raise ValueError(f"{file}: {len(x)} images and {len(y)} labels for {part}, expected {size} of each")
        parts += [x, y]
    return Images("cifar-10", *parts)


def load_cora() -> Graph:
    """Load Cora (2708 papers, 1433 words, 5278 citations, 7 subjects) in Planetoid's split.

    Raises:
        FileNotFoundError: cora.npz is missing; the message says how to get it.
        ValueError: It is damaged.
    """
    from scipy import sparse

    file = _folder("Cora", CORA_HOW_TO_GET) / "cora.npz"
    if not file.is_file():
        raise FileNotFoundError(f"Cora: there is no {file}. {CORA_HOW_TO_GET}")
    names = ("data", "indices", "indptr", "shape", "edges", "labels", "train", "val", "test")
    data, indices, indptr, shape, *rest = _read_npz(file, *names)
    edges, labels, *splits = (torch.from_numpy(numbers.astype(np.int64)) for numbers in rest)
    nodes = CORA_SHAPE[0]
    try:
        words = sparse.csr_array((data, indices.astype(np.int64), indptr.astype(np.int64)), shape=tuple(shape))
        words.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if words.shape != CORA_SHAPE or edges.shape[1:] != (2,) or labels.shape != (nodes,):
        found = words.shape, tuple(edges.shape), tuple(labels.shape)
        raise ValueError(f"{file}: words, edges and labels of shapes {found}, expected {CORA_SHAPE}, pairs, ({nodes},)")
    for name, numbers in zip(("edges", "train", "val", "test"), (edges, *splits), strict=True):
        if numbers.min() < 0 or numbers.max() >= nodes:
            raise ValueError(f"{file}: {name} holds numbers outside 0 to {nodes - 1}")
    if torch.cat(splits).bincount().max() > 1:
        raise ValueError(f"{file}: a node is in two of train, val and test")
    edges = edges[edges[:, 0] != edges[:, 1]].T
    features = torch.from_numpy(words.toarray()).float()
    return Graph("cora", features, torch.cat([edges, edges.flip(0)], dim=1), labels, *splits)


def load_shakespeare() -> str:
    """Load tiny Shakespeare, 1,115,394 characters of 65 kinds.

    Raises:
        FileNotFoundError: It is missing; the message says how to get it.
        ValueError: It is another text, or a part of it.
    """
    file = _folder("tiny Shakespeare", SHAKESPEARE_HOW_TO_GET) / "tinyshakespeare.txt"
    if not file.is_file():
        raise FileNotFoundError(f"tiny Shakespeare: there is no {file}. {SHAKESPEARE_HOW_TO_GET}")
    text = file.read_bytes().decode(errors="replace")
    if len(text) != SHAKESPEARE_SIZE:
        raise ValueError(f"{file}: {len(text)} characters, expected {SHAKESPEARE_SIZE}")
    return text


def _folder(what: str, how: str) -> Path:
    named = os.environ.get("LWAS_FAST_DATA")
    if not named or not Path(named).is_dir():
        problem = f"{named}, which is no folder" if named else "not set"
        raise FileNotFoundError(f"{what}: LWAS_FAST_DATA is {problem}. {how}")
    return Path(named)


def _read_npz(file: Path, *names: str) -> list[np.ndarray[Any, Any]]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return [content[name] for name in names]
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged, or not the file it should be ({error})") from error


def _read_jpegs(file: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    jpeg, offsets, labels = _read_npz(file, "jpeg", "offsets", "labels")
    content, pixels = jpeg.tobytes(), np.empty((len(offsets) - 1, 32, 32, 3), dtype=np.uint8)
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        try:
            with Image.open(io.BytesIO(content[start:end])) as image:
                pixels[i] = np.frombuffer(image.convert("RGB").tobytes(), np.uint8).reshape(32, 32, 3)
        except (OSError, ValueError) as error:  # no picture, or one of another size
            raise ValueError(f"{file}: image {i} is damaged ({error})") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays, and refuses whatever else a pickle could be made to do."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if (numpy and name in ("_reconstruct", "ndarray", "dtype")) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is no array")


def _read_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Read a file of cifar-10-batches-py: a pickled dictionary of 3072 bytes an image, red first, and labels."""
    if not file.is_file():
        raise FileNotFoundError(f"CIFAR-10: there is no {file}. {CIFAR10_HOW_TO_GET}")
    try:
        content = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pixels, labels = content[b"data"], torch.tensor(content[b"labels"])
        return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), labels
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged, or not the file it should be ({error})") from error
