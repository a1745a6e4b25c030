"""The training-quality suite reports what it trained, and the pages' tables are what it reports.

Catches: a report that picks another rate than the best or hides collapses; seeds compared with others; a loss read
where there is none; seconds that another process, and not the optimizer, took; a number in a page that no run has
given; results that outgrow the repository.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # bench is no package that one installs
from bench.quality import costs, pages, pictures, report, results, store, tables  # noqa: E402
from bench.quality.optimizers import Name  # noqa: E402


def made_up(loss: float, seconds: float = 4.0, name: str = "adamw", seed: int = 0) -> store.Run:
    """A run of four points, whose mini-batches' loss falls from 9 to 6."""
    curve = store.Curve([seconds * i / 4 for i in (1, 2, 3, 4)], [9.0, 8.0, 7.0, 6.0], {}, {"1": [1.0, 2.0, 3.0, 4.0]})
    return store.Run(
        task="tiny", name=Name.parse(name), seed=seed, steps=4, taken=4, full=False, parameters=178, weight_decay=5e-4,
        start=9.0, train=loss, test=loss, accuracy=0.5, collapsed=math.isnan(loss), seconds=seconds, peak_mib=1,
        commit="abc", environment=1, curve=curve,
    )  # fmt: skip


def put(folder: Path, runs: dict[str, list[float]]) -> None:
    for name, losses in runs.items():
        for seed, loss in enumerate(losses):
            run = made_up(loss, name=name, seed=seed)
            store.add(folder, run, {"device": "CPU", "torch": "2", "threads": "1"})


def test_report_picks_the_best_rate_and_hides_nothing(tmp_path, capsys):
    runs = {
        "adamw:lr=0.001": [0.5, 0.7],
        "adamw:lr=0.01": [0.3, 0.5],
        "adamw:lr=0.03": [0.1, math.nan],  # best seed of all, and a collapse
        "adamw:lr=0.1": [0.05],  # better still, on one seed only
        "adamw:lr=0.01,schedule=cosine": [0.2, 0.2],
        "adamwlw": [0.25, 0.35, math.nan],
        "adamwlw:update_every=5": [0.2],
        "adamwlw:update_every=25": [0.2],
        "adamwlw:update_every=5,cap=0.1": [0.2],
        "prodigy": [0.6, 0.6],
    }
    put(tmp_path, runs)
    out = tmp_path / "pictures"
    report.main([str(tmp_path), "--out", str(out), "--draw", "adamw, best constant", "adamwlw:update_every=5"])
    lines = (out / "quality.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("## Final training loss"))
    assert lines[start + 4 : start + 8] == [
        "| AdamW, best constant rate | 0.4000 ± 0.1000 (0.01) | 0 of 2 |",
        "| AdamW, best rate + cosine | 0.2000 (0.01) | 0 of 2 |",
        "| Prodigy | 0.6000 | 0 of 2 |",
        "| **AdamWLW** | 0.3000 ± 0.0500 (1/3 collapsed) | 1 of 3 |",
    ]
    drawn = {path.name: path.stat().st_size for path in out.glob("*.png")}
    assert set(drawn) == {
        "tiny.png", "tiny-adamwlw_update_every=5-rates.png", "tiny-adamw_lr=0.01-rates.png", "tiny-costs.png",
    } and min(drawn.values()) > 10_000  # fmt: skip
    # Curves that nothing needs go, of single seeds of a sweep and of options; the tables stay.
    capsys.readouterr()
    report.main([str(tmp_path), "--thin"])
    kept = store.read_curves(tmp_path)
    assert sorted({name for _, name, _ in kept}) == [
        "adamw:lr=0.01",
        "adamw:lr=0.01,schedule=cosine",
        "adamwlw",
        "prodigy",
    ]
    assert not any(curve.rates for curve in kept.values())
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == "\n".join([*lines, "", ""])
    for arguments, message in (
        ([str(tmp_path), "--draw", "dog", "adam"], "no row is named adam, dog"),
        ([str(tmp_path / "empty")], "holds no runs"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert message in capsys.readouterr().err
    store.add(tmp_path, replace(made_up(0.2, seed=9), steps=5), {})
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "different sizes" in capsys.readouterr().err


def test_warmups_and_averages_have_rows_and_the_best_of_all_is_found(tmp_path):
    runs = {
        "adamw:lr=0.001": [0.5],
        "adamw:lr=0.001,schedule=warmup": [0.4],
        "adamw:lr=0.01,schedule=warmup": [0.45],
        "adamw:lr=0.001,schedule=warmup_cosine": [0.6],
        "adamw:average=0.05,lr=0.01": [0.3],
        "adamw:average=0.1,lr=0.03": [0.2],
        "adamw:average=0.05,lr=0.01,schedule=cosine": [math.nan],
        "adamw:betas=(0.9,0.95),lr=0.01": [0.01],  # of no sweep
        "sgd:lr=0.1": [0.01],
        "muon:lr=0.01,schedule=warmup": [0.1],
        "sf_refined:lr=0.01,schedule=warmup": [0.1],
        "sf_plus": [0.1],
    }
    put(tmp_path, runs)
    rows = results.rows_of(results.load(tmp_path))
    assert {row: str(of["tiny"][0].name) for row, of in rows.items() if "adamw, " in row} == {
        "adamw, best constant": "adamw:lr=0.001",
        "adamw, best constant, averaged": "adamw:average=0.1,lr=0.03",
        "adamw, best cosine, averaged": "adamw:average=0.05,lr=0.01,schedule=cosine",
        "adamw, best warmup": "adamw:lr=0.001,schedule=warmup",
        "adamw, best warmup_cosine": "adamw:lr=0.001,schedule=warmup_cosine",
    }
    assert tables.finals("train", results.without_variants(rows), ["tiny"])[2:] == [
        "| AdamW, best constant rate | 0.5000 (0.001) | 0 of 1 |",
        "| AdamW, best constant rate, averaged | 0.2000 (0.03, average 0.1) | 0 of 1 |",
        "| AdamW, best rate + cosine, averaged | (1/1 collapsed) | 1 of 1 |",
        "| AdamW, best rate + warm-up | 0.4000 (0.001) | 0 of 1 |",
        "| AdamW, best rate + warm-up and cosine | 0.6000 (0.001) | 0 of 1 |",
        "| SGD-m, best constant rate | 0.01000 (0.1) | 0 of 1 |",
        "| Muon + AdamW, best rate + warm-up | 0.1000 (0.01) | 0 of 1 |",
        "| Refined Schedule-Free AdamW, best rate + warm-up | 0.1000 (0.01) | 0 of 1 |",
        "| ScheduleFree+ | 0.1000 | 0 of 1 |",
    ]


def test_the_loss_at_a_time_is_between_points_and_not_made_up_outside():
    slow = made_up(1.0, 8.0)
    assert results.loss_after(slow, 4.0) == 8.0 and results.loss_after(slow, 5.0) == 7.5
    assert results.loss_after(slow, 8.0) == 6.0 and results.loss_after(slow, 30.0) == 6.0
    assert math.isnan(results.loss_after(slow, 1.0))
    assert math.isnan(results.loss_after(replace(slow, taken=3), 30.0))


def test_tables_compare_seed_by_seed_and_options_with_the_default():
    rows = {
        "adamw, best constant": {"a": [made_up(2.0, 2.0), made_up(1.0, 2.0, seed=1)], "b": [made_up(1.0, 16.0)]},
        "prodigy": {"a": [made_up(math.nan)], "b": [made_up(1.0), made_up(math.nan, seed=1)]},
        "adamwlw": {
            "a": [made_up(1.0), made_up(2.0, seed=1), made_up(90.0, seed=2)],
            "b": [made_up(1.2), made_up(1.0, seed=1)],
        },
        "adamwlw:betas=(0.8,0.9),cap=0.4": {"a": [made_up(1.1)], "b": [made_up(0.6)]},
        "adamwlw:cap=0.4": {"a": [made_up(2.2)]},
    }
    plain = results.without_variants(rows)
    assert tables.against("adamwlw", plain, "ab")[2:] == [
        "| AdamW, best constant rate | +0.0 ± 66.7 | +20.0 | 1 of 2 |",  # the third seed is not AdamW's
        "| Prodigy | collapsed | +20.0 (1/2) | 0 of 1 |",
    ]
    rows["prodigy"]["c"] = rows["adamwlw"]["c"] = [replace(made_up(1.0), curve=None)]
    assert tables.equal_time("adamwlw", plain, "abc") == [
        "|  | a, 4 s | b, 4 s |",
        "| --- | --- | --- |",
        "| AdamW, best constant rate | +0.0 ± 0.0 | -33.3 |",
        "| Prodigy | +0.0 | +0.0 ± 0.0 |",
    ]
    assert tables.variants("adamwlw", rows, "ab") == [
        "|  | a | b | median |",
        "| --- | --- | --- | --- |",
        "| `betas=(0.8,0.9),cap=0.4` | +10.0 | -50.0 | -20.0 |",
        "| `cap=0.4` | +120.0 |  | +120.0 |",
    ]
    assert tables.variants("adamwlw", rows, "ab", lambda options: options == {"cap"})[2:] == [
        "| `cap=0.4` | +120.0 | +120.0 |"
    ]
    assert tables.variants("adamwlw:cap=0.4", rows, "ab")[2:] == ["| `betas=(0.8,0.9)` | -50.0 | -50.0 |"]
    for empty in (tables.variants, tables.against, tables.equal_time):
        assert empty("sgdlw", plain, "ab") == []


def test_losses_have_four_digits():
    assert [f"{x:.{tables.decimals(x)}f}" for x in (0.0001234567, 0.2332, 1.6852, 0.0, 153.21, 4321.0)] == [
        "0.0001235", "0.2332", "1.685", "0.0000", "153.2", "4321",
    ]  # fmt: skip


def test_every_run_gets_the_pace_of_the_fastest_with_the_same_work():
    fast, slow = made_up(1.0, 2.0, "adamw:lr=0.1"), made_up(1.0, 8.0, "adamw:lr=0.3,schedule=cosine,betas=(0.9,0.9)")
    more, broken = made_up(1.0, 8.0, "adamw:update_every=1"), replace(made_up(1.0, 8.0, "adamw:lr=9"), taken=2)
    results.undisturb([fast, slow, more, broken])
    assert [run.seconds for run in (fast, slow, more, broken)] == [2.0, 2.0, 8.0, 1.0]
    assert slow.curve.seconds == [0.5, 1.0, 1.5, 2.0]


@pytest.fixture(scope="module")
def made() -> dict:
    return pages.tables(results.load(store.OUT), ROOT / "bench" / "results")


def test_the_pages_are_what_the_results_say(made, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "results.md").read_text()
    assert not pages.stale(ROOT, made), "python -m bench.quality.report"
    assert text.count(pages.START) >= 17
    # One digit of any table is enough.
    place = re.search(r"\d\.\d+", text[text.index("| **AdamWLW** |") :]).start() + text.index("| **AdamWLW** |")
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    monkeypatch.setattr(pages, "tables", lambda *_: made)
    with pytest.raises(SystemExit):
        report.main(["--check"], tmp_path)
    assert "+| **AdamWLW** |" in capsys.readouterr().out and page.read_text() != text
    report.main([], tmp_path)
    assert page.read_text() == text and "written: docs/results.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: no such -->\n<!-- end of table -->\n", "no table is named 'no such'"),
        ("<!-- table: train -->\n", "lacks its other"),
        (
            "<!-- table: train -->\n<!-- table: test -->\n<!-- end of table -->\n<!-- end of table -->\n",
            "lacks its other",
        ),
    ],
)
def test_a_marker_that_is_wrong_is_an_error(made, tmp_path, page, message):
    (tmp_path / "README.md").write_text(page)
    with pytest.raises(ValueError, match=f"README.md: .*{message}"):
        pages.stale(tmp_path, made)


def test_every_table_can_be_made(made):
    assert all(len(table()) > 2 for table in made.values())


def test_the_update_alone_is_told_where_it_was_measured(tmp_path):
    path = ROOT / "bench" / "results" / "step-cpu.json"
    content = json.loads(path.read_text())
    for benchmark in content["benchmarks"]:
        del benchmark["extra_info"]["ratio_update"]
    (tmp_path / "step.json").write_text(json.dumps(content))
    assert "alone" not in costs.short(tmp_path / "step.json")[0]
    for value, benchmark in enumerate(content["benchmarks"]):
        benchmark["extra_info"]["ratio_update"] = 1 + value
    (tmp_path / "step.json").write_text(json.dumps(content))
    assert costs.short(tmp_path / "step.json")[0].endswith("| `opt.step()` alone |")
    assert costs.short(tmp_path / "step.json")[2].endswith("| 1.00 to 19.00 |")
    assert "| 1.00 |" in costs.steps(tmp_path / "step.json")[2]


def test_pictures_of_the_docs_are_drawn_from_the_results(tmp_path):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    report.main(["--pictures"], tmp_path)
    drawn = {path.name for path in tmp_path.rglob("*.png")}
    shown = {
        name for page in pages.pages(ROOT) for name in re.findall(r"images/(quality-[\w-]+\.png)", page.read_text())
    }
    assert drawn == set(pictures.PICTURES) >= shown


def test_results_stay_small():
    files = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file() and path.name != "latest.json"]
    files = [path for path in files if path.suffix in (".csv", ".json", ".jsonl")]
    assert len(files) < 40 and sum(path.stat().st_size for path in files) < 2e6, "report --thin drops curves"
