"""The demo's images: good files are read right, bad ones refused by name, and what is absent is replaced or named.

Catches: a header read with the wrong byte order, statistics of the test set leaking into the normalisation, damaged or
foreign files accepted in silence, a demo that fails where Fashion-MNIST is absent, a message that does not say how to
get what is missing.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from examples.demo import data

pytest.importorskip("sklearn")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like Fashion-MNIST's: 3 training and 2 test images, pixel i of image n is (n + i) % 256."""
    monkeypatch.delenv("LWAS_FAST_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(data, "SIZES", {"train": 3, "t10k": 2})
    for part, count in data.SIZES.items():
        images = idx((count, 28, 28), bytes((n + i) % 256 for n in range(count) for i in range(28 * 28)))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((count,), bytes([3, 1, 2][:count]))))
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_pixels_labels_and_normalisation(folder: Path, zipped: bool) -> None:
    for file in [] if zipped else folder.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    images = data.load_fashion_mnist(folder)
    assert images.x_train.shape == (3, 1, 28, 28) and images.x_train.dtype == torch.float32
    assert images.y_train.tolist() == [3, 1, 2] and images.y_train.dtype == torch.int64
    assert images.y_test.tolist() == [3, 1] and images.classes == 4
    pixels = torch.tensor([[(n + i) % 256 for i in range(28 * 28)] for n in range(3)]).double()
    std, mean = torch.std_mean(pixels)
    torch.testing.assert_close(images.x_train.flatten(1).double() * std + mean, pixels, atol=1e-3, rtol=0)
    # The test images are the first two training images: one mean and one scale must serve both.
    torch.testing.assert_close(images.x_test, images.x_train[:2], atol=0, rtol=0)


def test_digits() -> None:
    images = data.load_digits()
    assert images.x_train.shape == (1438, 1, 8, 8) and images.x_test.shape == (359, 1, 8, 8)
    assert images.classes == 10 and set(images.y_test.tolist()) == set(range(10))
    assert abs(images.x_train.mean()) < 1e-5 and abs(images.x_train.std() - 1) < 1e-5
    assert torch.equal(images.x_train, data.load_digits().x_train)  # the split is the same every time


def test_auto_takes_fashion_mnist_where_it_is_else_digits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.load_images().name == "digits"
    assert data.load_images(path=folder).name == "fashion-mnist"
    monkeypatch.setenv("LWAS_FAST_DATA", str(folder))  # of other data sets
    assert data.load_images().name == "digits"
    (folder / "fashion-mnist").symlink_to(folder)
    assert data.load_images().name == "fashion-mnist"
    monkeypatch.delenv("LWAS_FAST_DATA")
    monkeypatch.setattr(data, "DEBIAN_FOLDER", folder)
    assert data.load_images().name == "fashion-mnist"


WHOLE = gzip.compress(idx((3, 28, 28), bytes(2352)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, gzip.compress(idx((28, 28, 3), bytes(2352))), "2368 bytes that start with 00 00 08 03 00 00 00 1c"),
        (IMAGES, gzip.compress(idx((3, 28, 28), bytes(99))), "115 bytes .*, but Fashion-MNIST's are 2368"),
        (LABELS, gzip.compress(b""), "0 bytes that"),
        (LABELS, b"<!DOCTYPE html>", "damaged gzip file"),
        (IMAGES, WHOLE[:-9], "damaged gzip file"),
        (IMAGES, WHOLE[:12] + b"xx" + WHOLE[14:], "damaged gzip file"),
    ],
    ids=["shape", "short", "empty", "a page", "cut off", "spoilt"],  # the content has the time in it
)
def test_bad_file_is_refused_by_name(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / f"{name}.gz").write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}.*get it again.*apt install dataset-fashion-mnist"):
        data.load_fashion_mnist(folder)


def test_what_is_missing_is_named_with_the_way_to_get_it(folder: Path) -> None:
    (folder / f"{LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"neither .*{LABELS}.gz nor.*apt install dataset-fash"):
        data.load_fashion_mnist(folder)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*apt install"):
        data.load_fashion_mnist()


@pytest.mark.skipif(not data.DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_debian_package_is_whole() -> None:
    images = data.load_fashion_mnist(data.DEBIAN_FOLDER)
    assert images.y_train.bincount().tolist() == [6000] * 10
    assert images.y_test.bincount().tolist() == [1000] * 10
    assert images.x_train.shape == (60_000, 1, 28, 28)
