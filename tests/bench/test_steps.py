"""Steps to the same training loss are what hand-made curves say.

Catches: a crossing read off the wrong check or the wrong scale; a loss taken for reached that never was, or the other
way round; a ratio that a collapse makes disappear; seeds compared with others; a rival weaker than the best; seconds
that are not a step's; old curves of six checks misread; a table that hides a loss.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no package that one installs
from bench.quality import pages, results, steps, store  # noqa: E402
from bench.quality.optimizers import Name  # noqa: E402


def made_up(*losses: float, name: str = "adamw", seed: int = 0, seconds: float = 1.0) -> store.Run:
    """A run of 120 steps with these losses at its checks."""
    curve = store.Curve([], [], {"train": list(losses)}, {})
    end = losses[-1]
    return store.Run(
        task="tiny", name=Name.parse(name), seed=seed, steps=120, taken=120, full=False, parameters=178,
        weight_decay=5e-4, start=losses[0], train=end, test=end, accuracy=0.5, collapsed=not end <= losses[0],
        seconds=seconds, peak_mib=1, commit="abc", environment=1, curve=curve,
    )  # fmt: skip


def test_checks_are_where_their_number_says():
    assert store.checked(made_up(*[1.0] * 7)) == [0, 20, 40, 60, 80, 100, 120]  # as runs before November 2026
    assert store.checked(made_up(*[1.0] * 13)) == list(range(0, 121, 10))
    # One that was broken off has a check where it ended: from the same number of them, another step.
    nan = math.nan
    assert store.checked(replace(made_up(9, 8, 7, nan), taken=50)) == [0, 20, 40, 50]
    assert store.checked(replace(made_up(9, 8, 7, nan), taken=25)) == [0, 10, 20, 25]
    assert store.checked(replace(made_up(9, nan), taken=7)) == [0, 7]
    assert store.checked(replace(made_up(9, 8, 7, 6), steps=3, taken=3)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 checks in 90 of 120 steps"):
        store.checked(replace(made_up(9, 8, 7, 6, nan), taken=90))


def test_a_loss_is_reached_between_checks_on_a_logarithm_and_the_first_time():
    run = made_up(16, 8, 4, 2, 1, 1, 1)
    assert steps.reached(run, 4) == 40 and steps.reached(run, 1) == 80
    assert steps.reached(run, math.sqrt(8)) == pytest.approx(50)  # half way in the logarithm; 3 would be in the loss
    assert steps.reached(run, 0.99) == math.inf
    assert steps.reached(run, 8 * math.sqrt(2)) == 20  # what is before the first check is not resolved
    assert steps.reached(run, 20) == 20
    spiked = made_up(16, 4, 64, 2, 8, 8, 8)
    assert steps.reached(spiked, 4) == 20  # though it is lost again
    assert steps.reached(spiked, math.sqrt(8)) == pytest.approx(50)  # from the least so far, 4, and not from 64
    assert steps.reached(made_up(16, 4, None, 2, 8, 8, 8), math.sqrt(8)) == pytest.approx(50)
    assert steps.reached(made_up(1, 1e-3, 1e-6, 0, 0, 0, 0), 0.0) == 60


def test_the_ratio_is_of_the_one_that_was_first():
    rival = made_up(16, 8, 4, 2, 2, 2, 1)
    assert steps.ratio(made_up(16, 4, 1, 0.5, 0.5, 0.5, 0.5), rival) == 3  # at step 40 of 120
    assert steps.ratio(made_up(16, 4, 1, 3, 3, 3, 3), rival) == 3  # the same, though it ends above
    assert steps.ratio(made_up(16, 8, 8, 8, 8, 8, 4), rival) == pytest.approx(40 / 120)  # never: the rival had 4 at 40
    assert steps.ratio(rival, rival) == 1
    assert steps.ratio(made_up(16, 8, 8, 8, 8, 8, 16), rival) == pytest.approx(1 / 6)
    # From twelve checks against six: each by its own.
    assert steps.ratio(made_up(16, 8, 4, 2, 1, *[1] * 8), rival) == 3


def test_a_collapse_counts_and_is_told():
    rival, nan = made_up(16, 8, 4, 2, 2, 2, 1), math.nan
    broken = replace(made_up(16, 0.5, nan, seed=1), taken=30)  # below the rival's loss, before it broke
    risen = made_up(16, 0.5, 4, 4, 4, 4, 17, seed=1)
    well = made_up(16, 4, 1, 1, 1, 1, 1)
    for collapsed in (broken, risen):
        assert collapsed.collapsed and steps.ratio(collapsed, rival) == pytest.approx(1 / 6)
        found = steps.gain([well, collapsed], [rival, replace(rival, seed=1)])
        assert found.steps == pytest.approx(math.sqrt(3 / 6)) and found.collapsed == 1 and found.seeds == 2
        assert steps.told(found) == "**0.71 ± 1.02** (1/2 collapsed)"
        # The other way round a seed is left out: it would be a gain without end.
        found = steps.gain([well, replace(well, seed=1)], [rival, collapsed])
        assert found.steps == pytest.approx(3) and (found.seeds, found.left_out) == (1, 1)
        assert steps.told(found) == "3.00 (1 of 2 seeds)"
        assert steps.gain([replace(well, seed=1)], [collapsed]) is None


def test_seeds_are_paired_and_averaged_on_the_logarithm():
    rival = made_up(16, 8, 4, 2, 2, 2, 1, seconds=3.0)
    fast, slow = made_up(16, 4, 1, 1, 1, 1, 1, seconds=6.0), made_up(16, 8, 8, 8, 8, 8, 4, seed=1, seconds=6.0)
    third = made_up(16, 1, 1, 1, 1, 1, 1, seed=2)
    found = steps.gain([fast, slow, third], [replace(rival, seed=1), rival, replace(rival, seed=7)])
    assert found.steps == pytest.approx(1) and found.seeds == 2  # 3 and a third; not the third seed's 6
    assert found.error == pytest.approx(math.log(3))  # of +-log 3: a deviation of log 3 * sqrt 2, over sqrt 2
    assert found.time == pytest.approx(0.5)  # a step of ours takes twice as long
    half = replace(fast, taken=60, seconds=3.0)
    assert steps.gain([replace(fast, curve=None), third], [rival]) is None
    assert half.seconds / half.taken == fast.seconds / fast.taken


def rows_of(runs: dict[str, list[store.Run]]) -> results.Rows:
    return {row: {"tiny": of_row} for row, of_row in runs.items()}


def test_the_best_is_of_all_schedules_on_common_seeds():
    def ending(*losses: float) -> list[store.Run]:
        return [made_up(9, loss, seed=seed) for seed, loss in enumerate(losses)]

    rows = rows_of({
        "adamw, best constant": ending(2.0, 2.0, 0.1),  # the third seed, which ours has not, must not count
        "adamw, best cosine": ending(1.5, 2.1),
        "adamw, best warmup": ending(0.1, math.nan),
        "adamw": ending(1.9, 1.9),
        "adamw:betas=(0.9,0.99)": ending(0.1, 0.1),
        "sf_adamw, best constant": ending(0.1, 0.1),
        "sgd, best constant": ending(0.1, 0.1),
    })  # fmt: skip
    ours = ending(1.0, 1.0)
    assert steps.best_of(("adamw",), rows, "tiny", ours) is rows["adamw, best cosine"]["tiny"]
    assert steps.best_of(("muon",), rows, "tiny", ours) is None
    rows["adamw, best cosine"]["tiny"] = ending(1.5)  # on the one seed that all have it is still the best
    assert steps.best_of(("adamw",), rows, "tiny", ours) is rows["adamw, best cosine"]["tiny"]
    rows["adamw, best cosine"]["tiny"] = [made_up(9, 0.5, seed=8)]  # none that ours has
    assert steps.best_of(("adamw",), rows, "tiny", ours) is rows["adamw"]["tiny"]


def test_the_table_shows_the_worst_first_and_losses_bold():
    rival = made_up(16, 8, 4, 2, 2, 2, 1, name="adamw:lr=0.01,schedule=cosine")
    free = made_up(16, 8, 4, 2, 2, 2, 1, name="sf_adamw", seconds=4.0)
    fast, slow = made_up(16, 4, 1, 1, 1, 1, 1, seconds=4.0), replace(made_up(16, 8, 8, 8, 8, 8, 4), accuracy=0.4)
    rows = {
        "adamwlw": {"a": [fast], "b": [slow], "c": [fast]},
        "adamw, best cosine": {"a": [rival], "b": [rival]},
        "sf_adamw": {"a": [free]},
    }
    assert steps.table("adamwlw", rows, {"a": "task A", "b": "task B", "c": "task C", "d": "no runs"}) == [
        "| task | best AdamW | steps, AdamW / ours | by time | test: ours / AdamW "
        "| steps, Schedule-Free / ours | by time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| task B | cosine, 0.01 | **0.33** | **0.33** | **40.0 / 50.0 %** |  |  |",
        "| task A | cosine, 0.01 | 3.00 | **0.75** | 50.0 / 50.0 % | 3.00 | 3.00 |",
        "| geometric mean |  | 1.00 (2 tasks; worst: task B) | **0.50** |  | 3.00 (1 task) | 3.00 |",
    ]
    assert steps.table("sgdlw", rows, {"a": "task A"}) == []
    assert steps.chosen([free], ("other", "sf_adamw")) == "Schedule-Free AdamW, default"


def test_the_readme_hides_no_loss():
    made = pages.tables(results.load(store.OUT), pages.ROOT / "bench" / "results")
    for name in ("results", "steps schedule-free", "steps muon", "steps adamwlw", "steps sgdlw"):
        _, _, *lines, last = made[name]()
        values = [float(line.split("|")[3].split("±")[0].strip(" *")) for line in lines]
        assert values == sorted(values) and len(lines) <= 20
        assert all(("| **" in line) for line, value in zip(lines, values, strict=True) if value < 1)
        assert (
            last.startswith("| geometric mean |")
            and f"({len(lines)} tasks; worst: {lines[0].split(' | ')[0][2:]})" in last
        )
