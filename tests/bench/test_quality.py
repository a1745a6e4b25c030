"""The training-quality suite trains what it says, and reports what it trained.

Catches: a task that no longer fits the package (no second derivative, say); mini-batches or dropout that depend on more
than seed and step; an evaluation that changes the model; an optimizer driven wrongly; a run done twice, or taken for
one of another length; half a line after a crash, or two processes' lines in one; a divergence that stops the suite or
passes for a result.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no package that one installs
from bench.quality import models, report, run, store, tasks  # noqa: E402
from bench.quality.kfac import KFAC  # noqa: E402
from bench.quality.optimizers import BATCHES_FOR_NORM, RULES, Name, Trainer, sweep  # noqa: E402

TINY = tasks.EVERY_TASK["tiny"]


def go(out: Path, *arguments: str) -> None:
    run.main(["--tasks", "tiny", "--device", "cpu", "--out", str(out), *arguments])


def trained(name: str, steps: int, seed: int = 0) -> store.Run:
    return run.train((TINY, Name.parse(name), seed), steps, False, "cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", tasks.EVERY_TASK)
def test_task_trains_two_steps_and_depends_on_seed_and_step_alone(name):
    task = tasks.EVERY_TASK[name]
    try:
        problem, again, other = task.build(0), task.build(0), task.build(1)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    trainer = Trainer(Name("adamwlw"), problem, 2, task.weight_decay)
    losses = [trainer.step().item() for _ in range(2)]
    assert all(map(math.isfinite, losses))
    assert all(math.isfinite(rate) and rate > 0 for rate in trainer.optimizer.rates().values())
    counts = [layer["refreshes"] for layer in trainer.optimizer.diagnostics().values()]
    assert all(counts), "a layer was not measured"
    torch.rand(7)  # must not matter
    again.loss(again.model, 5)
    assert again.loss(again.model, 0).item() == losses[0]
    assert again.loss(again.model, 1).item() != losses[0]
    assert other.loss(other.model, 0).item() != losses[0]
    assert other.loss(again.model, 0).item() != losses[0]  # not the weights alone


def test_the_long_tasks_are_long():
    for name in ("gpt", "bn", "mixer"):
        assert tasks.TASKS[name].steps >= 3000
    for model in (tasks.gpt(65, False), models.resnet(42, 1, stride=2), models.mixer(7, 192, 4)):
        assert sum(p.numel() for p in model.parameters()) >= 500_000


def test_sparse_start_has_fifteen_weights_a_unit_of_variance_1():
    model = models.autoencoder((784, 400, 200, 100, 50, 25, 6))
    models.sparse_start(model)
    for layer in (layer for layer in model if isinstance(layer, torch.nn.Linear)):
        assert not layer.bias.any() and ((layer.weight != 0).sum(1) == min(15, layer.in_features)).all()
    first = model[1].weight
    assert first[first != 0].std().item() == pytest.approx(1, abs=0.05)
    assert (first[0] != 0).nonzero().tolist() != (first[1] != 0).nonzero().tolist()


def test_a_black_patch_gives_the_mixers_first_norm_zeros():
    model = models.mixer(7, 192, 4)
    patches = model[:2](torch.zeros(2, 1, 28, 28))
    assert patches.shape == (2, 16, 192) and not patches.any()
    image = torch.zeros(1, 1, 28, 28)
    image[..., :7, 7:14] = 1  # the second patch, row by row
    assert model[:2](image)[0].any(1).tolist() == [False, True, *[False] * 14]
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_evaluation_changes_nothing():
    problem = TINY.build(0)
    problem.model.add_module("drop", torch.nn.Dropout(0.5))
    problem.model.train()
    first = problem.evaluate(problem.model)
    assert problem.model.training and problem.evaluate(problem.model) == first
    x, y = problem.parts["test"][0]()
    out = problem.model.eval()(x)
    assert len(y) == 200
    assert first["test"] == pytest.approx(F.cross_entropy(out, y).item())
    assert first["accuracy"] == pytest.approx((out.argmax(1) == y).float().mean().item())


def test_batches_are_whole_passes_and_crops_are_shifts_and_flips():
    indices = tasks.sampler(10, 3, seed=0)
    passes = [torch.cat([indices(3 * epoch + i) for i in range(3)]) for epoch in range(2)]
    assert all(len(set(one.tolist())) == 9 for one in passes) and not torch.equal(*passes)
    assert not torch.equal(tasks.sampler(100, 50, seed=0)(0), tasks.sampler(100, 50, seed=1)(0))
    x = torch.randn(20, 2, 6, 6)
    found = tasks.crop_and_flip(x)
    kinds = set()
    for before, after in zip(F.pad(x, (4, 4, 4, 4)), found, strict=True):
        windows = {(r, c): before[:, r : r + 6, c : c + 6] for r in range(9) for c in range(9)}
        fits = [
            (rc, flip) for rc, w in windows.items() for flip in (0, 1) if torch.equal(w.flip(2) if flip else w, after)
        ]
        assert len(fits) == 1
        kinds.add(fits[0])
    assert len(kinds) > 10 and {flip for _, flip in kinds} == {0, 1}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("base", RULES)
def test_every_optimizer_trains(base):
    if RULES[base].module:
        pytest.importorskip(RULES[base].module)
    problem = TINY.build(0)
    before = [p.detach().clone() for p in problem.model.parameters()]
    trainer = Trainer(Name(base), problem, 20, TINY.weight_decay)
    for _ in range(20):
        trainer.step()
    assert all(torch.isfinite(p).all() for p in problem.model.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))
    held = [p.detach().clone() for p in problem.model.parameters()]
    with trainer.evaluating():
        same = all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), held, strict=True))
    assert same != RULES[base].modes  # Schedule-Free is judged by its average, and trains on where it was
    for p, q in zip(problem.model.parameters(), held, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {TINY.weight_decay}


def test_kfac_without_damping_is_natural_gradient():
    """Of one linear layer and squared error the Fisher matrix is the Kronecker product, so one step solves it."""
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 1), torch.randn(50, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.7
    opt = KFAC(model, F.mse_loss, lr=1.0, damping=0.0, momentum=0.0)
    before = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    F.mse_loss(model(x), y).backward()
    opt.measure(x, y)
    opt.step()
    moved = torch.cat([model.weight.detach().flatten(), model.bias.detach()]) - before
    solution = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.7]) - before
    # The factor of the outputs is of sampled labels, so the length is right on average only; the direction is.
    assert torch.cosine_similarity(moved, solution, dim=0) > 0.9999
    assert 0.5 < moved.norm() / solution.norm() < 2


def test_kfac_averages_its_factors_and_refuses_what_it_does_not_know():
    pytest.importorskip("curvlinops")
    problem = TINY.build(0)
    opt = KFAC(problem.model, problem.criterion, every=1, keep=0.5)
    measured = []
    for step in range(3):
        alone = KFAC(problem.model, problem.criterion, every=1)
        alone.steps = step  # its draws
        alone.measure(*problem.batch(step))
        measured.append(alone.factors[1])
        opt.measure(*problem.batch(step))
        opt.steps += 1
    for name, factor in opt.factors[1].items():
        expected = (measured[0][name] / 4 + measured[1][name] / 2 + measured[2][name]) / 1.75
        torch.testing.assert_close(factor, expected)
    with pytest.raises(ValueError, match="loss must be"):
        KFAC(problem.model, F.l1_loss)
    with pytest.raises(ValueError, match="1.weight is of no linear"):
        KFAC(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), F.mse_loss)


def test_layers_and_products_of_ours_can_be_chosen():
    counts = {}
    for layers in ("", ":layers=tensor", ":layers=whole"):
        counts[layers] = len(Trainer(Name.parse(f"adamwlw{layers}"), TINY.build(0), 1, 0.0).optimizer.rates())
    assert list(counts.values()) == [2, 4, 1]
    differences = trained("adamwlw:hvp=finite_difference", TINY.steps)  # crosses kinks of the ReLUs: other numbers
    assert differences.curve.rates != trained("adamwlw", TINY.steps).curve.rates
    assert differences.train < differences.start


def test_what_is_hidden_is_the_only_target():
    text = torch.arange(200).reshape(2, 100) % 7
    x, y = tasks.hide(text, 7)
    assert 5 < (x == 7).sum() < 60
    assert torch.equal(x == 7, y != tasks.IGNORED) and torch.equal(torch.where(x == 7, y, x), text)


def test_names_have_one_spelling_and_errors_say_what_is_wrong():
    assert Name.parse("adamw:schedule=cosine,lr=1e-3") == Name.parse("adamw:lr=0.001,schedule=cosine")
    assert str(Name.parse("adamwlw:noise_exponent=0.25")) == "adamwlw:noise_exponent=0.25"
    for text, message in (
        ("adam", "unknown optimizer"),
        ("sgd:lr", "not option=value"),
        ("sgd:schedule=step", "one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Name.parse(text)
    with pytest.raises(TypeError, match="no keyword 'nonsense'"):
        trained("adamwlw:nonsense=1", 2)
    with pytest.raises(SystemExit):
        run.parse(["--tasks", "no_such_task"])
    chosen = run.parse(["--optimizers", "adamwlw,sgd:lr=0.1,schedule=cosine", "adamw", "--sweep", "--seeds", "1-3"])
    assert chosen.optimizers == [Name("adamwlw"), *sweep(Name("sgd")), *sweep(Name("adamw"))] and chosen.seeds == [
        1,
        2,
        3,
    ]
    assert len(set(map(str, sweep(Name("sgd"))))) == 32
    assert str(Name.parse("adamwlw:betas=(0.95,0.999),cap=0.1")) == "adamwlw:betas=(0.95,0.999),cap=0.1"
    assert Name.parse("sgd:lr=0.1,schedule=constant") == Name.parse("sgd:lr=0.1")
    assert {str(Name.parse(f"sgd:lr={lr}")) for lr in ("3", "3.0", "3e0")} == {"sgd:lr=3"}
    assert str(run.parse(["--optimizers", "adamw,sgd:lr=.1,schedule=cosine"]).optimizers[1]) == (
        "sgd:lr=0.1,schedule=cosine"
    )


def test_a_missing_package_is_told_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setitem(RULES, "prodigy", dataclasses.replace(RULES["prodigy"], module="no_such_module"))
    with pytest.raises(SystemExit):
        run.parse(["--optimizers", "prodigy"])
    assert "prodigy needs no_such_module: pip install prodigyopt" in capsys.readouterr().err


def test_run_writes_what_it_promises_and_resumes(tmp_path, monkeypatch, capsys):
    table = tmp_path / "tiny.csv"
    go(tmp_path, "--optimizers", "adamwlw,adamw:lr=1e-2,schedule=cosine", "--seeds", "0-1")
    first = store.read_all(tmp_path)
    assert [run_.key[1:] for run_ in first] == [
        ("adamwlw", 0), ("adamw:lr=0.01,schedule=cosine", 0), ("adamwlw", 1), ("adamw:lr=0.01,schedule=cosine", 1),
    ]  # fmt: skip
    one = first[0]
    assert one.taken == one.steps == TINY.steps and one.weight_decay == TINY.weight_decay
    assert not one.collapsed and one.peak_mib > 10 and one.train < one.start and one.commit == run.commit()
    assert {run_.environment for run_ in first} == {1}
    made_in = store.environments(tmp_path)["1"]
    assert made_in["torch"] == torch.__version__ and made_in["threads"] == "1" and "node" not in made_in
    curve = one.curve
    assert len(curve.loss) == 50 and store.points(TINY.steps)[-1] == TINY.steps
    assert all(a < b for a, b in zip(curve.seconds[:-1], curve.seconds[1:], strict=True))
    assert {metric: len(values) for metric, values in curve.checks.items()} == {"train": 13, "test": 2, "accuracy": 2}
    assert set(curve.rates) == {"1", "3"} and len(store.checked(one)) == 13
    assert curve.checks["train"][-1] == pytest.approx(one.train, rel=1e-3) and curve.checks["test"][
        -1
    ] == pytest.approx(one.test, rel=1e-3)
    assert {len(rates) for rates in curve.rates.values()} == {50} and not first[1].curve.rates
    again = trained("adamwlw", TINY.steps)
    assert again.curve.loss == pytest.approx(curve.loss, rel=1e-5) and again.test == pytest.approx(one.test, rel=1e-6)
    assert again.curve.loss != pytest.approx(trained("adamwlw", TINY.steps, seed=1).curve.loss, rel=1e-3)
    # Only what is missing is run, and lines of an option that no package has any more are left as they are.
    lines = table.read_text().splitlines(keepends=True)
    old = lines[-1].replace("schedule=cosine", "probe=update")
    table.write_text("".join([*lines[:-1], old]))
    ran = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda r, *rest: (ran.append((str(r[1]), r[2])), train(r, *rest))[1])
    go(tmp_path, "--optimizers", "adamwlw,adamw:lr=0.01,schedule=cosine", "--seeds", "0-1")
    assert ran == [("adamw:lr=0.01,schedule=cosine", 1)] and table.read_text().startswith("".join([*lines[:-1], old]))
    assert "adamw:lr=0.01,probe=update" in report.load(tmp_path)["tiny"]
    with pytest.raises(SystemExit, match="tiny.csv has adamwlw, seed 0, with 60 steps"):
        go(tmp_path, "--optimizers", "adamwlw", "--steps", "7")
    with pytest.raises(SystemExit):
        run.parse(["--seeds", "4-0"])
    assert "4-0 are no seeds" in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    with pytest.raises(
        SystemExit, match="1 of 2 runs failed; the first was tiny, adamwlw:nonsense=1, seed 0: .*nonsen"
    ):
        go(tmp_path, "--optimizers", "adamwlw:nonsense=1,sgd")
    assert [str(run_.name) for run_ in store.read_all(tmp_path)] == ["sgd"]
    assert "FAILED tiny, adamwlw:nonsense=1" in capsys.readouterr().out


def test_curve_is_the_mean_of_the_steps_since_the_last_point(monkeypatch):
    monkeypatch.setattr(store, "POINTS", 2)
    coarse = trained("sgd", 10).curve.loss
    monkeypatch.setattr(store, "POINTS", 10)
    fine = trained("sgd", 10).curve.loss
    assert coarse == pytest.approx([sum(fine[:5]) / 5, sum(fine[5:]) / 5])


def trained_for_a_while(name: str):
    """A problem, its trainer, and the weights after 25 steps."""
    problem = TINY.build(0)
    trainer = Trainer(Name.parse(name), problem, 40, 0.0)
    for _ in range(25):
        trainer.step()
    return problem, trainer, [p.detach().clone() for p in problem.model.parameters()]


def test_schedule_free_the_average_is_judged():
    problem, trainer, before = trained_for_a_while("adamwlw")
    offset = trainer.optimizer.state[next(problem.model.parameters())]["offset"].clone()
    with trainer.evaluating():
        torch.testing.assert_close(next(problem.model.parameters()).detach(), before[0] - 0.1 * offset)
    for p, a in zip(problem.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), a)


@pytest.mark.parametrize("name", ["sgd:lr=0.1", "adamwlw", "adamwlw:average=0.5,schedule_free=False"])
def test_batchnorm_is_judged_with_statistics_of_its_weights_whatever_the_optimizer(name):
    problem = TINY.build(0)
    norm = torch.nn.BatchNorm1d(problem.batch(0)[0].flatten(1).shape[1])
    problem.model.insert(0, torch.nn.Flatten())
    problem.model.insert(1, norm)
    trainer = Trainer(Name.parse(name), problem, 40, 0.0)
    for _ in range(25):
        trainer.step()
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    means = [problem.batch(step)[0].flatten(1).mean(0) for step in range(BATCHES_FOR_NORM)]
    with trainer.evaluating():
        torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
        assert not torch.allclose(norm.running_mean, before["1.running_mean"])
    assert problem.model.training and norm.momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())


def add_forty(folder: Path, first: store.Run, mine: str, start: Barrier) -> None:
    start.wait()
    for seed in range(1, 41):
        run_ = dataclasses.replace(first, seed=seed, commit=mine, curve=store.Curve([1.0], [float(seed)], {}, {}))
        store.add(folder, run_, {"device": str(seed % 4)})


def test_two_processes_in_one_folder_write_every_run_once(tmp_path):
    store.add(tmp_path, first := trained("sgd", 2), {"device": "0"})
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    workers = [fork.Process(target=add_forty, args=(tmp_path, first, name, start)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = store.read_all(tmp_path)
    assert sorted(run_.seed for run_ in found) == list(range(41))
    made_in = store.environments(tmp_path)
    assert sorted(e["device"] for e in made_in.values()) == ["0", "1", "2", "3"]
    for run_ in found[1:]:
        assert made_in[str(run_.environment)]["device"] == str(run_.seed % 4) and run_.curve.loss == [run_.seed]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.jsonl", "environments.json", "tiny.csv"]


def test_divergence_is_recorded(tmp_path, capsys):
    go(tmp_path, "--optimizers", "adamw:lr=1e30,adamw:lr=30,adamw:lr=1e-2")
    assert capsys.readouterr().out.count("COLLAPSED") == 2
    broken, risen, well = store.read_all(tmp_path)
    assert broken.collapsed and broken.taken < broken.steps and math.isnan(broken.train)
    assert risen.collapsed and risen.taken == risen.steps and risen.train > risen.start and not well.collapsed
    report.main([str(tmp_path), "--out", str(tmp_path / "pictures")])
    table = capsys.readouterr().out
    assert "(0.01)" in table and "1 of 3" not in table  # the collapsed rates are not the best
    assert (tmp_path / "pictures" / "tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_the_average_is_judged_and_the_weights_are_trained_on():
    problem, trainer, before = trained_for_a_while("adamwlw:average=0.5,schedule_free=False")
    with trainer.evaluating():
        for p, a in zip(problem.model.parameters(), trainer.average.module.parameters(), strict=True):
            assert torch.equal(p, a)
        assert not torch.equal(before[0], next(problem.model.parameters()))
    assert all(torch.equal(p, b) for p, b in zip(problem.model.parameters(), before, strict=True))
