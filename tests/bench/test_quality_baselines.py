"""What ours is compared with is what its authors say it is.

Catches: a schedule of another shape or length; a sweep without its schedules or its average; Muon on the wrong weights,
on several matrices at once or at a rate of its own; Schedule-Free's later kinds with another formula.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no package that one installs
from bench.quality import models, run, tasks  # noqa: E402
from bench.quality.muon import MuonWithAdamW  # noqa: E402
from bench.quality.optimizers import SWEPT, Name, Trainer, sweep  # noqa: E402
from bench.quality.schedule_free_plus import RefinedScheduleFree, ScheduleFreePlus  # noqa: E402

TINY = tasks.EVERY_TASK["tiny"]


def rates(name: str, steps: int) -> list[list[float]]:
    """Of each group, relative to the first option, at every step and after the last."""
    trainer = Trainer(Name.parse(name), TINY.build(0), steps, 0.0)
    groups = trainer.optimizer.param_groups
    found = [[group["lr"] for group in groups]]
    for _ in range(steps):
        trainer.step()
        found.append([group["lr"] for group in groups])
    return [list(of) for of in zip(*found, strict=True)]


@pytest.mark.parametrize("base", ["adamw", "sgd", "muon", "sgdlw", "sf_plus"])
def test_schedules_have_their_shape(base):
    for of in rates(f"{base}:lr=0.1,schedule=cosine", 10):
        assert of == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(11)])
    for of in rates(f"{base}:lr=0.1,schedule=warmup", 40):
        assert of == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 38)
    for of in rates(f"{base}:lr=0.1,schedule=warmup_cosine", 40):
        assert of == pytest.approx(
            [0.025, 0.05, 0.075, 0.1] + [0.05 * (1 + math.cos(math.pi * k / 36)) for k in range(37)]
        )
    for schedule in ("cosine", "warmup", "warmup_cosine"):
        assert all(map(math.isfinite, rates(f"{base}:lr=0.1,schedule={schedule}", 1)[0]))
    assert set(rates(f"{base}:lr=0.1", 3)[0]) == {0.1}


def test_a_sweep_has_its_schedules_and_keeps_what_else_is_asked_for(capsys):
    def swept(*arguments: str) -> list[str]:
        return [str(name) for name in run.parse(["--sweep", "--optimizers", *arguments]).optimizers]

    every = ("constant", "cosine", "warmup", "warmup_cosine")
    for base, schedules in {
        "adamw": every,
        "sgd": every,
        "muon": every,
        "kfac": every[:2],
        "sf_refined": every[:1],
    }.items():
        assert sweep(Name(base)) == [
            Name.parse(f"{base}:lr={lr},schedule={schedule}") for schedule in schedules for lr in SWEPT[base]
        ]
    assert swept("sf_plus") == ["sf_plus"]
    assert swept("sf_refined", "--schedules", "warmup")[0] == "sf_refined:lr=0.0003,schedule=warmup"
    averaged = swept("adamw:average=0.05", "--schedules", "constant,warmup")
    assert averaged[0] == "adamw:average=0.05,lr=0.0001" and len(averaged) == 2 * len(SWEPT["adamw"])
    assert averaged[-1] == "adamw:average=0.05,lr=0.3,schedule=warmup"
    with pytest.raises(SystemExit):
        swept("adamw", "--schedules", "constant,linear")
    assert "unknown linear: choose from constant, cosine" in capsys.readouterr().err


MODELS = {
    "transformer": (lambda: models.CharTransformer(9, 5, 8, 1, 2), (4, 5), {"token.weight", "position.weight"}),
    "lstm": (lambda: models.CharLSTM(9, 8), (4, 5), {"token.weight", "output.weight"}),
    "resnet": (lambda: models.resnet(4, 1), None, {"8.weight"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_muon_makes_each_hidden_matrix_orthogonal_and_adamw_has_the_rest(kind):
    torch.manual_seed(0)
    make, shape, not_hidden = MODELS[kind]
    model = make()
    x = torch.randint(9, shape) if shape else torch.randn(4, 3, 32, 32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr = 0.01
    opt = MuonWithAdamW(model, lr=lr)
    model(x).logsumexp(-1).mean().backward()
    opt.step()
    hidden = set()
    for name, p in model.named_parameters():
        moved = (before[name] - p).detach()
        signs = torch.where(p.grad.abs() > 1e-6, lr * p.grad.sign(), moved)  # Adam's first step
        if p.ndim > 1 and not torch.allclose(moved, signs, atol=1e-4):
            hidden.add(name)
            stacked = 3 if "qkv" in name else 4 if "lstm" in name else 1
            for update in moved.flatten(1).chunk(stacked):
                values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5 * lr)
                assert values[0] < 1.4 and values[min(update.shape) // 2] > 0.5, name
        else:
            torch.testing.assert_close(moved, signs, rtol=0, atol=1e-4)
    assert hidden == {name for name, p in model.named_parameters() if p.ndim > 1} - not_hidden


def test_muon_is_torchs_and_so_is_the_adamw_beside_it():
    problem, theirs = TINY.build(0), TINY.build(0)
    trainer = Trainer(Name.parse("muon:lr=0.02,schedule=warmup"), problem, 20, 0.1)
    hidden, *rest = theirs.model.parameters()
    rest[0], rest[1] = rest[1], rest[0]
    muon = torch.optim.Muon([hidden], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    for step in range(5):
        trainer.step()
        for opt in (muon, adamw):
            opt.zero_grad()
            opt.param_groups[0]["lr"] = 0.01 if step == 0 else 0.02
        theirs.loss(theirs.model, step).backward()
        muon.step()
        adamw.step()
    for p, q in zip(problem.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)


A = np.array([[3.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.2]])
B = np.array([1.0, -2.0, 0.5])
FLOOR = 20.0  # keeps the loss above 0


def quadratic(x: np.ndarray) -> tuple[float, np.ndarray]:
    return float(0.5 * x @ A @ x - B @ x + FLOOR), A @ x - B


def trained(opt: torch.optim.Optimizer, p: torch.nn.Parameter, steps: int) -> list[np.ndarray]:
    """The averages after each step."""
    found = []
    opt.train()
    for _ in range(steps):
        loss, p.grad = quadratic(p.detach().numpy())[0], torch.tensor(quadratic(p.detach().numpy())[1])
        opt.step(*([loss] if isinstance(opt, ScheduleFreePlus) else []))
        y = p.detach().clone()
        opt.eval()
        found.append(p.detach().numpy().copy())
        opt.train()
        torch.testing.assert_close(y, p.detach(), rtol=1e-12, atol=1e-12)
    return found


PLUS = [
    {},
    {"weight_decay": 0.5, "power": 2.0, "norm_average": 0.9, "average_after": 4, "anneal_steps": 10, "lr": 0.7},
]


@pytest.mark.parametrize("options", PLUS, ids=["defaults", "options"])
def test_schedule_free_plus_is_its_papers(options):
    """Against the authors' loop, written out for one vector."""
    o = {
        "weight_decay": 0.0,
        "power": 0.0,
        "norm_average": 0.0,
        "average_after": 0,
        "anneal_steps": 0,
        "lr": 1.0,
        **options,
    }
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    x, y, z = (p.detach().numpy().copy() for _ in range(3))
    m, v, norm, weights, largest, ahead = np.zeros(3), np.zeros(3), 0.0, 0.0, 0.0, []
    expected = []
    for t in range(1, 31):
        loss, g = quadratic(y)
        beta = 0.9
        if o["anneal_steps"]:
            done = min((t - 1) / o["anneal_steps"], 1)
            beta = 1 - math.exp(math.log(0.1) * (1 - done) + math.log(0.035) * done)
        norm = o["norm_average"] * norm + (1 - o["norm_average"]) * np.abs(g).sum() * math.sqrt(math.pi / 2)
        ahead.append(beta * g @ (z - x))
        rate = o["lr"] * max(0.0, loss + ahead[-1]) / (norm / (1 - o["norm_average"] ** t))
        largest = max(largest, rate)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        z = z - rate**2 * o["weight_decay"] * y - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        c = 1.0
        if t > o["average_after"]:
            weight = t ** o["power"] * largest**2
            weights += weight
            c = weight / weights
        x = (1 - c) * x + c * z
        y = beta * x + (1 - beta) * z
        expected.append(x)
    assert max(map(abs, ahead)) > 0.5  # or the inner product would not be tested
    found = trained(ScheduleFreePlus([p], **options), p, 30)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(p.detach().numpy(), y, rtol=1e-10)


@pytest.mark.parametrize(("beta", "C"), [(0.95, 200.0), (0.5, 50.0)])
def test_refined_schedule_free_is_its_papers(beta, C):
    """Against the paper's algorithm 2, written out for one vector."""
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    x, z, v, squares, expected = p.detach().numpy().copy(), p.detach().numpy().copy(), np.zeros(3), 0.0, []
    for t in range(1, 61):
        y = (1 - beta) * z + beta * x
        _, g = quadratic(y)
        v = 0.99 * v + 0.01 * g * g
        z = z - 0.1 * g / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) - 0.1 * 0.2 * y
        squares += 0.1**2
        c = min(0.1**2 / squares * (1 - beta) * C, 1)
        x = (1 - c) * x + c * z
        expected.append(x)
    opt = RefinedScheduleFree([p], lr=0.1, betas=(beta, 0.99), C=C, weight_decay=0.2)
    np.testing.assert_allclose(trained(opt, p, 60), expected, rtol=1e-10)


def test_refined_schedule_free_with_the_first_ones_window_is_the_first_one():
    theirs = pytest.importorskip("schedulefree")
    p, q = (torch.nn.Parameter(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)) for _ in range(2))
    ours = RefinedScheduleFree([p], lr=0.1, betas=(0.9, 0.99), C=10.0, weight_decay=0.2)
    other = theirs.AdamWScheduleFree([q], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    np.testing.assert_allclose(trained(ours, p, 20), trained(other, q, 20), rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["sf_plus", "sf_refined:lr=1e-2", "muon:lr=1e-2", "adamw:lr=1e-2,schedule=warmup_cosine"]
)
def test_each_learns_the_tiny_task(name):
    done = run.train((TINY, Name.parse(name), 0), 300, False, "cpu")
    assert done.train < 0.35 * done.start and done.accuracy > 0.8 and not done.collapsed
