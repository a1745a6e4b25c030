"""The loaders read good files right and refuse bad ones by name.

Catches: a header read with the wrong byte order, images and labels mixed up, statistics of the test set
leaking into the normalisation, damaged or foreign files accepted in silence, a message that does not say how
to get what is missing; a pickle that runs code; channels mixed up; an edge in one direction only.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lwas_fast import data

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like Fashion-MNIST's: 3 training and 2 test images, pixel i of image n is (n + i) % 256."""
    for part, count in (("train", 3), ("t10k", 2)):
        images = bytes((n + i) % 256 for n in range(count) for i in range(28 * 28))
        write(tmp_path, f"{part}-images-idx3-ubyte", idx((count, 28, 28), images))
        write(tmp_path, f"{part}-labels-idx1-ubyte", idx((count,), bytes(range(count))))
    return tmp_path


def test_fashion_mnist_pixels_labels_and_normalisation(folder: Path) -> None:
    images = data.load_fashion_mnist(folder)
    assert images.x_train.shape == (3, 1, 28, 28) and images.x_train.dtype == torch.float32
    assert images.x_test.shape == (2, 1, 28, 28)
    assert images.y_train.tolist() == [0, 1, 2] and images.y_train.dtype == torch.int64
    assert images.y_test.tolist() == [0, 1] and images.classes == 3
    pixels = torch.tensor([[(n + i) % 256 for i in range(28 * 28)] for n in range(3)]).double()
    std, mean = torch.std_mean(pixels)
    torch.testing.assert_close(images.x_train.flatten(1).double() * std + mean, pixels, atol=1e-3, rtol=0)
    # The test images are the first two training images: one mean and one scale must serve both.
    torch.testing.assert_close(images.x_test, images.x_train[:2], atol=0, rtol=0)


def test_files_may_be_unzipped_and_paths_may_be_strings(folder: Path) -> None:
    zipped = data.load_fashion_mnist(str(folder))
    for file in folder.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    for a, b in zip(zipped[1:], data.load_fashion_mnist(str(folder))[1:], strict=True):
        assert torch.equal(a, b)


def test_digits() -> None:
    pytest.importorskip("sklearn")
    images = data.load_images("digits")
    assert images.x_train.shape == (1438, 1, 8, 8) and images.x_test.shape == (359, 1, 8, 8)
    assert images.classes == 10 and set(images.y_test.tolist()) == set(range(10))
    assert abs(images.x_train.mean()) < 1e-5 and abs(images.x_train.std() - 1) < 1e-5
    assert torch.equal(images.x_train, data.load_digits().x_train)  # the split is the same every time


def test_auto_takes_what_is_pointed_to_then_debian_then_digits(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.delenv("LWAS_FAST_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", folder / "nowhere")
    assert data.load_images().name == "digits"
    assert data.load_images(path=folder).name == "fashion-mnist"
    monkeypatch.setattr(data, "DEBIAN_FOLDER", folder)
    assert len(data.load_images().y_train) == 3
    root = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("LWAS_FAST_DATA", str(root))
    with pytest.raises(FileNotFoundError, match="fashion-mnist"):  # named, so not passed over
        data.load_images()
    (root / "fashion-mnist").symlink_to(folder)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", folder / "nowhere")
    assert data.load_images().name == "fashion-mnist"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(TRAIN_IMAGES, idx((3,), bytes(3)), "starts with 00 00 08 01", id="labels as images"),
        pytest.param(TRAIN_LABELS, b"<!DOCTYPE html>", "starts with 3c 21 44 4f", id="web page"),
        pytest.param(TRAIN_LABELS, b"", "starts with ,", id="empty"),
        pytest.param(TRAIN_IMAGES, idx((3, 28, 28), b"")[:9], "ends within its header, after 9", id="header"),
        pytest.param(TRAIN_IMAGES, idx((3, 28, 28), bytes(99)), "99 bytes of data, .* 2352", id="cut short"),
        pytest.param(TRAIN_LABELS, idx((3,), bytes(4)), "4 bytes of data, .* says 3", id="too long"),
        pytest.param(TRAIN_IMAGES, idx((3, 8, 8), bytes(192)), "8x8 pixels, expected 28x28", id="other size"),
        pytest.param(TRAIN_LABELS, idx((2,), bytes(2)), "2 labels, .* has 3 images", id="counts differ"),
        pytest.param(TRAIN_LABELS, idx((3,), b"\0\1\x0a"), "label 10, expected 0 to 9", id="no such label"),
        pytest.param(TRAIN_LABELS, idx((0,), b""), "holds no data", id="nothing"),
    ],
)
def test_bad_file_is_refused_by_name(folder: Path, name: str, content: bytes, message: str) -> None:
    write(folder, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        data.load_fashion_mnist(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b"no" + b[2:], lambda b: b[:20] + b"x" * 20 + b[40:]],
    ids=["cut short", "not gzip", "overwritten"],
)
def test_damaged_gzip_is_refused_by_name(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / f"{TRAIN_IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{TRAIN_IMAGES}.gz: damaged gzip file"):
        data.load_fashion_mnist(folder)


def test_what_is_missing_is_named_with_the_way_to_get_it(folder: Path) -> None:
    (folder / f"{TRAIN_LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {TRAIN_LABELS}.gz nor.*apt install dataset-fash"):
        data.load_fashion_mnist(folder)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*apt install"):
        data.load_fashion_mnist(folder / "nowhere")


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        data.load_images("cifar")
    with pytest.raises(ValueError, match="take no path"):
        data.load_images("digits", folder)


@pytest.mark.skipif(not data.DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_debian_package_is_whole() -> None:
    images = data.load_fashion_mnist(data.DEBIAN_FOLDER)
    assert images.y_train.bincount().tolist() == [6000] * 10
    assert images.y_test.bincount().tolist() == [1000] * 10
    assert images.x_train.shape == (60_000, 1, 28, 28)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like CIFAR-10's: 5 training and 2 test images of one colour each, red rising, blue 200."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(data, "CIFAR10_SIZES", {"train": 5, "test": 2})
    for part, count in (("train", 5), ("test", 2)):
        files = []
        for i in range(count):
            buffer = io.BytesIO()
            image.new("RGB", (32, 32), (20 * i, 0, 200)).save(buffer, "JPEG", quality=100, subsampling=0)
            files.append(buffer.getvalue())
        write_cifar(tmp_path, part, files, list(range(count)))
    return tmp_path


def write_cifar(folder: Path, part: str, files: list[bytes], labels: list[int], cut: int = 0) -> None:
    jpeg = np.frombuffer(b"".join(files)[: -cut or None], dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    classes = np.array([f"class {i}" for i in range(10)])
    np.savez(folder / f"cifar10_{part}.npz", jpeg=jpeg, offsets=offsets, labels=np.array(labels), classes=classes)


def test_cifar10_from_jpegs(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = data.load_cifar10(cifar)
    assert images.x_train.shape == (5, 3, 32, 32) and images.x_train.dtype == torch.uint8
    assert images.y_train.tolist() == [0, 1, 2, 3, 4] and images.y_train.dtype == torch.int64
    expected = torch.tensor([[20.0 * i, 0, 200] for i in range(5)])
    assert (images.x_train.float().mean((2, 3)) - expected).abs().max() < 4  # JPEG rounds
    assert torch.equal(images.x_test, images.x_train[:2])
    monkeypatch.setenv("LWAS_FAST_DATA", str(cifar))
    assert torch.equal(data.load_cifar10().x_train, images.x_train)


def test_cifar10_from_torchvisions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CIFAR10_SIZES", {"train": 10, "test": 2})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {
            b"data": pixels[2 * i : 2 * i + 2],
            b"labels": [i, 9 - i],
            b"batch_label": b"x",
            b"filenames": [b"y"],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    for path in (tmp_path, folder):
        images = data.load_cifar10(path)
        assert torch.equal(images.x_train.flatten(1), torch.from_numpy(pixels[:10]))
        assert torch.equal(images.x_test, torch.from_numpy(pixels[10:]).view(2, 3, 32, 32))
        assert images.y_train.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and images.y_test.tolist() == [5, 4]

    class Bad:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Bad(), b"labels": [0]}))
    with pytest.raises(ValueError, match="data_batch_3: damaged.*system, which is no array"):
        data.load_cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()
    (folder / "data_batch_3").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_3: damaged"):
        data.load_cifar10(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="no .*data_batch_3.*cifar-10-python.tar.gz"):
        data.load_cifar10(tmp_path)


def test_bad_cifar10_is_refused_by_name(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content = cifar / "cifar10_test.npz", dict(np.load(cifar / "cifar10_test.npz"))
    files = [content["jpeg"][: content["offsets"][1]].tobytes()] * 2
    cases: list[tuple[list[bytes], list[int], int, str]] = [
        (files[:1], [0], 0, "1 images and 1 labels for test, expected 2"),
        (files, [0, 10], 0, "labels from 0 to 10, expected 0 to 9"),
        (files, [0, 1], 5, "3 offsets up to .* 2 labels"),
        ([files[0], b"no JPEG"], [0, 1], 0, "image 1 is damaged"),
    ]
    for parts, labels, cut, message in cases:
        write_cifar(cifar, "test", parts, labels, cut)
        with pytest.raises(ValueError, match=f"cifar10_test.npz: {message}"):
            data.load_cifar10(cifar)
    file.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match="cifar10_test.npz: damaged"):
        data.load_cifar10(cifar)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither cifar10_test.npz nor.*download=True"):
        data.load_cifar10(cifar)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        data.load_cifar10(cifar / "nowhere")
    monkeypatch.delenv("LWAS_FAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="not pointed to.*LWAS_FAST_DATA"):
        data.load_cifar10()


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Cora's arrays for 4 papers of 3 words: paper 0 has words 0 and 2, paper 1 none, 2 word 1, 3 word 0."""
    monkeypatch.setattr(data, "CORA_SHAPE", (4, 3))
    lists = {
        "indptr": [0, 2, 2, 3, 4], "indices": [0, 2, 1, 0], "shape": [4, 3], "edges": [[0, 1], [2, 2], [1, 3]],
        "labels": [6, 0, 1, 2], "train": [0], "val": [1], "test": [3, 2],
    }  # fmt: skip
    return {name: np.array(values, dtype=np.int16) for name, values in lists.items()} | {"data": np.ones(4, np.float32)}


def test_cora(papers: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "cora.npz", **papers)
    monkeypatch.setenv("LWAS_FAST_DATA", str(tmp_path))
    graph = data.load_cora()
    assert graph.features.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert sorted(map(tuple, graph.edges.T.tolist())) == [(0, 1), (1, 0), (1, 3), (3, 1)]  # and no loop
    assert graph.labels.tolist() == [6, 0, 1, 2] and graph.classes == 7
    assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([0], [1], [3, 2])
    assert graph.features.dtype == torch.float32 and graph.test.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("shape", [4, 4], r"shape \(4, 4\), expected \(4, 3\)"),
        ("indptr", [0, 2, 2, 3], "do not make a sparse matrix of 4 rows"),
        ("indptr", [0, 2, 1, 3, 4], "do not make a sparse matrix"),
        ("indices", [0, 2, 3, 0], "indices is empty or holds numbers outside 0 to 2"),
        ("edges", [[0, 4]], "edges is empty or holds numbers outside 0 to 3"),
        ("edges", [0, 1], r"edges of shape \(2,\)"),
        ("labels", [7, 0, 1, 2], "labels is empty or holds numbers outside 0 to 6"),
        ("train", [], "train is empty"),
        ("test", [3, 0], "a node is in two of"),
    ],
)
def test_bad_cora_is_refused(
    papers: dict[str, np.ndarray], tmp_path: Path, name: str, values: list[int], message: str
) -> None:
    np.savez(tmp_path / "cora.npz", **(papers | {name: np.array(values, dtype=np.int16)}))
    with pytest.raises(ValueError, match=f"cora.npz: .*{message}"):
        data.load_cora(tmp_path)


def test_missing_or_foreign_cora(papers: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .*cora.npz.*Planetoid"):
        data.load_cora(tmp_path)
    np.savez(tmp_path / "cora.npz", indptr=papers["indptr"])
    with pytest.raises(ValueError, match="cora.npz: damaged, or not the file it should be"):
        data.load_cora(tmp_path)


@pytest.mark.skipif(not Path(os.environ.get("LWAS_FAST_DATA", ""), "cora.npz").is_file(), reason="no Cora here")
def test_the_real_cora_is_whole() -> None:
    graph = data.load_cora()
    assert graph.features.shape == (2708, 1433) and graph.edges.shape == (2, 2 * 5278)
    assert (len(graph.train), len(graph.val), len(graph.test)) == (140, 500, 1000)
    assert graph.labels[graph.train].bincount().tolist() == [20] * 7
