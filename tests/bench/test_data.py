"""The suite's own data, CIFAR-10 and Cora: good files are read right, bad ones refused by name.

Catches: channels mixed up, an edge in one direction only, a split that trains on what it tests, damaged or foreign
files accepted in silence, a pickle that runs code, a message that does not say how to get what is missing.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
image = pytest.importorskip("PIL.Image")
from bench import data  # noqa: E402
from bench.quality import sources  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the data is looked for; empty, and the sizes those of the little sets below."""
    monkeypatch.setenv("LWAS_FAST_DATA", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR10_SIZES", {"train": 10, "test": 2})
    monkeypatch.setattr(data, "CORA_SHAPE", (4, 3))
    return tmp_path


def jpeg(i: int, side: int = 32) -> bytes:
    """An image of one colour, red rising with i, blue 200."""
    buffer = io.BytesIO()
    image.new("RGB", (side, side), (20 * i, 0, 200)).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def write_jpegs(folder: Path, part: str, files: list[bytes]) -> None:
    content, offsets = np.frombuffer(b"".join(files), dtype=np.uint8), np.cumsum([0, *map(len, files)])
    np.savez(folder / f"cifar10_{part}.npz", jpeg=content, offsets=offsets, labels=np.arange(len(files)))


def test_cifar10_from_jpegs(folder: Path) -> None:
    for part, size in data.CIFAR10_SIZES.items():
        write_jpegs(folder, part, [jpeg(i) for i in range(size)])
    images = data.load_cifar10()
    assert images.x_train.shape == (10, 3, 32, 32) and images.x_train.dtype == torch.uint8
    assert images.y_train.tolist() == list(range(10)) and images.y_train.dtype == torch.int64
    expected = torch.tensor([[20.0 * i, 0, 200] for i in range(10)])
    assert (images.x_train.float().mean((2, 3)) - expected).abs().max() < 4  # JPEG rounds
    assert torch.equal(images.x_test, images.x_train[:2])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([jpeg(0)] * 9, "cifar10_train.npz: 9 images and 9 labels for train, expected 10"),
        ([jpeg(0), b"no JPEG"], "cifar10_train.npz: image 1 is damaged"),
        ([jpeg(0), jpeg(0, side=16)], "cifar10_train.npz: image 1 is damaged"),
    ],
)
def test_bad_jpegs_are_refused_by_name(folder: Path, files: list[bytes], message: str) -> None:
    write_jpegs(folder, "train", files)
    with pytest.raises(ValueError, match=message):
        data.load_cifar10()


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


def test_cifar10_from_torchvisions_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {b"data": pixels[2 * i : 2 * i + 2], b"labels": [i, 9 - i], b"batch_label": b"x"}
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    images = data.load_cifar10()
    assert torch.equal(images.x_train.flatten(1), torch.from_numpy(pixels[:10]))
    assert torch.equal(images.x_test, torch.from_numpy(pixels[10:]).view(2, 3, 32, 32))
    assert images.y_train.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and images.y_test.tolist() == [5, 4]

    monkeypatch.chdir(folder)
    (batches / "data_batch_3").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": [0]}))
    with pytest.raises(ValueError, match="data_batch_3: damaged.*mkdir, which is no array"):
        data.load_cifar10()
    assert not (folder / "ran").exists()
    (batches / "data_batch_3").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_3: damaged"):
        data.load_cifar10()


CORA = {
    # Four papers of three words: paper 0 has words 0 and 2, paper 1 none, 2 word 1, 3 word 0.
    "data": [1, 1, 1, 1], "indices": [0, 2, 1, 0], "indptr": [0, 2, 2, 3, 4], "shape": [4, 3],
    "edges": [[0, 1], [2, 2], [1, 3]], "labels": [6, 0, 1, 2], "train": [0], "val": [1], "test": [3, 2],
}  # fmt: skip


def write_cora(folder: Path, **changed: list) -> None:
    np.savez(folder / "cora.npz", **{name: np.array(values, np.int16) for name, values in (CORA | changed).items()})


def test_cora(folder: Path) -> None:
    write_cora(folder)
    graph = data.load_cora()
    assert graph.features.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert sorted(map(tuple, graph.edges.T.tolist())) == [(0, 1), (1, 0), (1, 3), (3, 1)]  # and no loop
    assert graph.labels.tolist() == [6, 0, 1, 2] and graph.classes == 7
    assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([0], [1], [3, 2])
    assert graph.features.dtype == torch.float32 and graph.test.dtype == torch.int64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": [4, 4]}, r"of shapes \(\(4, 4\).* expected \(4, 3\)"),
        ({"indptr": [0, 2, 1, 3, 4]}, "indptr"),
        ({"indices": [0, 2, 3, 0]}, "ind"),
        ({"edges": [0, 1]}, r"expected \(4, 3\), pairs"),
        ({"edges": [[0, 4]]}, "edges holds numbers outside 0 to 3"),
        ({"labels": [7, 0, 1]}, r"\(3,\)\), expected .* \(4,\)"),
        ({"train": [-1]}, "train holds numbers outside 0 to 3"),
        ({"test": [3, 0]}, "a node is in two of"),
    ],
)
def test_bad_cora_is_refused(folder: Path, changed: dict[str, list], message: str) -> None:
    write_cora(folder, **changed)
    with pytest.raises(ValueError, match=f"cora.npz: .*{message}"):
        data.load_cora()


def test_shakespeare_is_read_as_it_is_and_no_other_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tinyshakespeare.txt").write_bytes("Ay,\r\nthé".encode())
    with pytest.raises(ValueError, match="tinyshakespeare.txt: 8 characters, expected 1115394"):
        data.load_shakespeare()
    monkeypatch.setattr(data, "SHAKESPEARE_SIZE", 8)
    assert data.load_shakespeare() == "Ay,\r\nthé"
    first, last, kinds = sources.encoded("abcab" * 4)
    assert first.tolist() == [0, 1, 2, 0, 1] * 3 + [0, 1, 2] and last.tolist() == [0, 1] and kinds == 3


def test_foreign_files_are_refused_by_name(folder: Path) -> None:
    for name, load in (("cora", data.load_cora), ("cifar10_train", data.load_cifar10)):
        np.savez(folder / f"{name}.npz", indptr=[0])
        with pytest.raises(ValueError, match=f"{name}.npz: damaged, or not the file it should be"):
            load()


@pytest.mark.parametrize(
    ("load", "how"),
    [(data.load_cifar10, "download=True"), (data.load_cora, "Planetoid"), (data.load_shakespeare, "char-rnn")],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[], object], how: str
) -> None:
    for value, said in ((folder, "there is no"), (folder / "nowhere", "nowhere, which is no folder"), ("", "not set")):
        monkeypatch.setenv("LWAS_FAST_DATA", str(value))
        with pytest.raises(FileNotFoundError, match=f"{said}.*{how}"):
            load()


@pytest.mark.skipif(not Path(os.environ.get("LWAS_FAST_DATA", ""), "cora.npz").is_file(), reason="no Cora here")
def test_the_real_cora_is_whole() -> None:
    graph = data.load_cora()
    assert graph.features.shape == (2708, 1433) and graph.edges.shape == (2, 2 * 5278)
    assert (len(graph.train), len(graph.val), len(graph.test)) == (140, 500, 1000)
    assert graph.labels[graph.train].bincount().tolist() == [20] * 7
