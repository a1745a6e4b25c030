"""The demo as its users run it: in a process of its own, without a terminal, then its table and picture.

Catches: a demo that only works where it was written, that hides an error behind a traceback, that finds out after
minutes of training that it cannot write its picture, or that leaves half a picture in the place of a whole one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed)
from examples.demo import __main__ as demo  # noqa: E402
from examples.demo import data  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_quick_run_ends_with_a_table_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--data", "digits", "--threads", "1", "--out", out]
    env = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "digits, small CNN, 60 steps of 128 images, seed 0" in done.stdout
    for name in demo.OPTIMIZERS:
        number = r" +([\d.]+)"
        row = re.search(rf"^ *{re.escape(name)}{number}%{number * 4} *$", done.stdout, re.M)
        assert row, done.stdout
        accuracy, test_loss, train_loss, *_ = map(float, row.groups())
        assert 50 < accuracy <= 100 and 0 < test_loss < 2 and 0 < train_loss < 2  # chance: 10 % and 2.3
    assert re.search(r"MuonLW: step 60 of 60, loss [\d.]+, rates \de[-+]\d\d to \de[-+]\d\d", done.stdout)
    picture = out.read_bytes()
    assert picture.startswith(b"\x89PNG") and 20_000 < len(picture) < 1_000_000
    assert int.from_bytes(picture[16:20], "big") > 1000  # its width in pixels


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, not 0"),
        (["--data", "cifar"], "--data: invalid choice: 'cifar'"),
        (["--out", "nowhere/picture.png"], r"cannot be written \(No such file or directory\)"),
        (["--out", f"{'long' * 70}.png"], r"cannot be written \(File name too long\)"),
        (["--out", "folder.png"], "folder.png: is a folder"),
        (["--out", "picture.txt"], r"must end in \.png, \.svg or \.pdf"),
        (["--device", "abacus"], "--device abacus: "),
        (["--path", "nowhere"], "error: .*no folder nowhere.*apt install"),
        (["--data", "digits", "--path", "."], "error: .*take no path"),
        (["--data", "digits", "--batch-size", "5000"], "error: --batch-size 5000, .* 1438 images"),
    ],
)
def test_bad_arguments_end_at_once_with_one_message(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "compare", lambda *args: pytest.fail("trained all the same"))
    with pytest.raises(SystemExit) as caught:
        demo.main(args)
    assert caught.value.code not in (0, None)
    assert re.search(message, f"{capsys.readouterr().err}{caught.value.code}", re.S)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_half_way(self: object, out: Path, **options: object) -> None:
        Path(out).write_text("half")
        raise OSError("no space left")

    picture = tmp_path / "picture.png"
    picture.write_text("of the last run")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails_half_way)
    with pytest.raises(OSError, match="no space left"):
        demo.main(["--data", "digits", "--steps", "1", "--out", str(picture)])
    assert picture.read_text() == "of the last run" and list(tmp_path.iterdir()) == [picture]


def test_digits_take_the_place_of_what_is_absent_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LWAS_FAST_DATA", str(tmp_path))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    demo.main(["--steps", "1", "--out", str(tmp_path / "picture.pdf")])
    said = "".join(capsys.readouterr().out.split("\n"))
    assert f"No Fashion-MNIST in {tmp_path}/fashion-mnist or {tmp_path}/debian: training on scikit-learn's" in said
    assert "digits, small CNN, 1 steps" in said


@pytest.mark.parametrize("module", ["rich", "matplotlib", "sklearn"])
def test_missing_module_is_named_with_the_way_to_get_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the picture would be
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "examples.demo.report", raising=False)
    with pytest.raises(SystemExit, match=f"needs {module}: pip install rich matplotlib scikit-learn"):
        demo.main(["--data", "digits"])


def test_both_optimizers_see_every_image_once_a_pass() -> None:
    batches = demo.make_batches(10, 3, steps=7, seed=0)
    assert [len(batch) for batch in batches] == [3] * 7
    for first in (0, 3):
        assert len(set(torch.cat(batches[first : first + 3]).tolist())) == 9
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:6]))
