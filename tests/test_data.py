"""The loaders read good files right and refuse bad ones by name.

Catches: a header read with the wrong byte order, images and labels mixed up, statistics of the test set
leaking into the normalisation, damaged or foreign files accepted in silence, a message that does not say how
to get what is missing.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

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
