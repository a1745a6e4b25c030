"""The training-quality suite reports what it trained.

Catches: a report that picks another rate than the best or hides collapses; seeds compared with others; a loss read
where there is none; seconds that another process, and not the optimizer, took.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is no package that one installs
from bench.quality import report, results, run, tables, tasks  # noqa: E402
from bench.quality.optimizers import PARAMETER_FREE, Name  # noqa: E402

TINY = tasks.EVERY_TASK["tiny"]


def test_report_picks_the_best_rate_and_hides_nothing(tmp_path, capsys):
    base = run.finite_only(run.train((TINY, Name.parse("adamw:lr=0.01"), 0), 10, False, "cpu"))

    def put(name: str, losses: list[float | None], first_seed: int = 0) -> None:
        parsed = Name.parse(name)
        for seed, loss in enumerate(losses, first_seed):
            last = {**base["evaluations"][-1], "train": loss}
            content = {**base, "optimizer": str(parsed), "base": parsed.base, "options": dict(parsed.options)}
            content |= {"seed": seed, "evaluations": [*base["evaluations"][:-1], last], "collapsed": loss is None}
            run.write(run.path_of(tmp_path, (TINY, parsed, seed)), content)

    put("adamw:lr=0.001", [0.5, 0.7])
    put("adamw:lr=0.01", [0.3, 0.5])
    put("adamw:lr=0.03", [0.1, None])  # best seed of all, and a collapse
    put("adamw:lr=0.1", [0.05])  # better still, on one seed only
    put("adamw:lr=0.01,schedule=cosine", [0.2, 0.2])
    put("adamwlw", [0.25, 0.35, None])
    put(PARAMETER_FREE[0], [0.6, 0.6])
    report.main([str(tmp_path), "--out", str(tmp_path / "pictures")])
    lines = (tmp_path / "pictures" / "quality.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("## Final training loss"))
    assert lines[start + 4 : start + 8] == [
        "| adamw, best constant | 0.4000 ± 0.1000 (lr 0.01, best of 4) | 0 of 2 |",
        "| adamw, best cosine | 0.2000 (lr 0.01, best of 1) | 0 of 2 |",
        f"| {PARAMETER_FREE[0]} | 0.6000 | 0 of 2 |",
        "| adamwlw | 0.3000 ± 0.0500 (1/3 collapsed) | 1 of 3 |",
    ]
    assert (tmp_path / "pictures" / "tiny.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "tiny" / "adamwlw-seed0.json").read_text())
    run.write(tmp_path / "tiny" / "adamwlw-seed0.json", {**content, "steps": 11})
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "empty")])
    assert "different sizes" in (told := capsys.readouterr().err) and "holds no runs" in told


def made_up(loss: float, seconds: float = 4.0, **options) -> dict:
    """A run of four points whose loss falls by one a second, to `loss` + 3 at its end."""
    curve = {"step": [1, 2, 3, 4], "seconds": [seconds * i / 4 for i in (1, 2, 3, 4)], "loss": [9.0, 8.0, 7.0, 6.0]}
    ends = {"step": 4, "seconds": seconds, "train": loss}
    run = {"options": options, "seconds": seconds, "steps": 4, "steps_taken": 4, "collapsed": False, "seed": 0}
    return run | {"curve": curve, "evaluations": [ends]}


def test_the_loss_at_a_time_is_between_points_and_not_made_up_outside():
    slow = made_up(1.0, 8.0)
    assert results.loss_after(slow, 4.0) == 8.0 and results.loss_after(slow, 5.0) == 7.5
    assert results.loss_after(slow, 8.0) == 6.0 and results.loss_after(slow, 30.0) == 6.0
    assert math.isnan(results.loss_after(slow, 1.0))
    assert math.isnan(results.loss_after({**slow, "steps_taken": 3}, 30.0))


def test_tables_compare_seed_by_seed_and_options_with_the_default():
    other = {"seed": 1}
    rows = {
        "adamw, best constant": {
            "a": [made_up(2.0, 2.0, lr=0.1), made_up(1.0, 2.0, lr=0.1) | other],
            "b": [made_up(1.0, 16.0)],
        },
        "prodigy": {"a": [made_up(math.nan)], "b": [made_up(1.0), made_up(math.nan) | other]},
        "adamwlw": {
            "a": [made_up(1.0), made_up(2.0) | other, made_up(90.0) | {"seed": 2}],
            "b": [made_up(1.2), made_up(1.0) | other],
        },
        "adamwlw:cap=0.4": {"a": [made_up(1.1, cap=0.4)], "b": [made_up(0.6, cap=0.4)]},
    }
    plain = {row: of_task for row, of_task in rows.items() if not results.is_variant(row)}
    assert tables.against("adamwlw", plain)[4:] == [
        "| --- | --- | --- | --- |",
        "| adamw, best constant | +0.0 ± 66.7 | +20.0 | 1 of 2 |",  # the third seed is not AdamW's
        "| prodigy | collapsed | +20.0 (1/2) | 0 of 1 |",
    ]
    assert tables.equal_time("adamwlw", plain)[3:] == [
        "|  | a, 4 s | b, 4 s |",
        "| --- | --- | --- |",
        "| adamw, best constant | +0.0 ± 0.0 (over at 50%) | -33.3 |",
        "| prodigy | +0.0 | +0.0 ± 0.0 |",
    ]
    assert tables.variants("adamwlw", rows)[3:] == [
        "|  | a | b | median |",
        "| --- | --- | --- | --- |",
        "| `cap=0.4` | +10.0 | -50.0 | -20.0 |",
    ]
    assert tables.variants("sgdlw", rows) == tables.against("sgdlw", plain) == tables.equal_time("sgdlw", plain) == []


def test_losses_have_four_digits():
    assert [f"{x:.{tables.decimals(x)}f}" for x in (0.0001234567, 0.2332, 1.6852, 0.0, 153.21, 4321.0)] == [
        "0.0001235", "0.2332", "1.685", "0.0000", "153.2", "4321",
    ]  # fmt: skip


def test_every_run_gets_the_pace_of_the_fastest_with_the_same_work():
    fast, slow = made_up(1.0, 2.0, lr=0.1), made_up(1.0, 8.0, lr=0.3, schedule="cosine", betas=(0.9, 0.9))
    more, broken = made_up(1.0, 8.0, update_every=1), made_up(1.0, 8.0, lr=9.0) | {"steps_taken": 2}
    for run_ in (fast, slow, more, broken):
        run_["base"] = "adamw"
    results.undisturb([[fast, slow], [more], [broken]])
    assert [run_["seconds"] for run_ in (fast, slow, more, broken)] == [2.0, 2.0, 8.0, 1.0]
    assert slow["curve"]["seconds"] == [0.5, 1.0, 1.5, 2.0]
