"""Whole training steps, MuonLW and AdamWLW against torch's fused AdamW, SGDLW against fused SGD.

Forward and backward are included.

Both sides train models of their own from equal weights, in turns. Ours measures every fifth step here, so that steps
with and without a measurement are timed in one run; from the two kinds follows the mean over any schedule, which
depends on nothing but how many steps of each it has. Told are the ratios of

* an ordinary step (medians),
* a step that measures (medians),
* the mean of 500 and of 5000 steps at the default schedule, and at fixed intervals of 1 to 100 steps,
* `opt.step()` alone in an ordinary step, on the weights and statistics that this training has left (medians),

what a measuring step is made of, and the peak memory of an ordinary step beyond what is there before it.

    pytest bench/test_step.py --benchmark-json=out.json && python bench/draw.py out.json
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from models import MODELS, Problem
from torch.nn.attention import SDPBackend, sdpa_kernel

from lwas_fast import SGDLW, AdamWLW, MuonLW, optimizer
from lwas_fast.measure import routes
from lwas_fast.rates import refresh
from lwas_fast.update import step as steps

CUDA = torch.cuda.is_available()
PAIRS, EVERY, STEPS, LONG = 60, 5, 500, 5000
INTERVALS = (1, 2, 5, 10, 20, 50, 100)
RULES = {
    "Muon": (MuonLW, lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),  # in whose place it is taken
    "AdamW": (AdamWLW, lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),
    "SGD-m": (SGDLW, lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True)),
}
Step = Callable[[], None]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def usual(problem: Problem, opt: torch.optim.Optimizer) -> Step:
    def step() -> None:
        opt.zero_grad()
        problem.loss().backward()
        opt.step()

    return step


def by_autograd(problem: Problem, opt: optimizer.LayerwiseOptimizer) -> Step:
    """Fused attention has no second derivative: the steps that measure do without it."""

    def step() -> None:
        opt.zero_grad()
        with sdpa_kernel(SDPBackend.MATH) if opt.curvature_due else nullcontext():
            loss = problem.loss()
        opt.backward(loss)
        opt.step()

    return step


def by_closure(problem: Problem, opt: optimizer.LayerwiseOptimizer) -> Step:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    return lambda: opt.step(closure)


ROUTES = {"autograd": by_autograd, "finite differences": by_closure}


def timed(step: Step) -> float:
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def refreshes(rule: str, steps: int) -> int:
    """How many of the first steps measure at the default schedule."""
    opt = RULES[rule][0]([torch.zeros(1, requires_grad=True)])
    count = 0
    for _ in range(steps):
        count += opt.curvature_due
        opt.zero_grad()
        opt.backward(opt.param_groups[0]["params"][0].square().sum())
        opt.step()
    return count


@contextmanager
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[float]]]:
    """Time the package's own ranges, waiting for the device at both ends of each."""
    found: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def span(name: str) -> Iterator[None]:
        wait()
        start = time.perf_counter()
        yield
        wait()
        found[name].append(time.perf_counter() - start)

    with monkeypatch.context() as patch:
        for module in (routes, refresh, steps):
            patch.setattr(module, "span", span)
        yield found


def update_alone(problem: Problem, opt: torch.optim.Optimizer) -> float:
    """Seconds that `opt.step()` takes by itself, behind a gradient taken anew."""
    opt.zero_grad()
    problem.loss().backward()
    return timed(opt.step)


def peak_bytes(step: Step, model: torch.nn.Module) -> int:
    """The most that a step has allocated at once, beyond parameters and state; gradients count."""
    model.zero_grad()
    if CUDA:
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare(
    benchmark, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Problem], rule: str, route: str, pairs: int = PAIRS
) -> None:
    """Time both sides in turns; what was found goes into the benchmark's JSON."""
    kind, torchs = RULES[rule]
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append(make())
    other_opt = torchs(sides[0].model.parameters())
    opt = kind(sides[1].model.named_parameters(), update_every=EVERY)
    theirs, ours = usual(sides[0], other_opt), ROUTES[route](sides[1], opt)
    for _ in range(2):  # state is made, memory is touched
        theirs()
        ours()
    other: list[float] = []
    measures: list[bool] = []

    def before() -> None:
        other.append(timed(theirs))
        measures.append(opt.curvature_due)

    def mine() -> None:
        ours()
        wait()

    benchmark.pedantic(mine, setup=before, rounds=pairs, iterations=1)
    seconds = list(zip(benchmark.stats.stats.data, measures, strict=True))
    base = statistics.median(other)
    ratio = statistics.median(s for s, due in seconds if not due) / base
    extra = statistics.median(s for s, due in seconds if due) / base - ratio
    count, count_long = refreshes(rule, STEPS), refreshes(rule, LONG)
    opt.param_groups[0]["update_every"] = 1
    with spans(monkeypatch) as found:
        steps = []
        for _ in range(5):
            opt.param_groups[0]["next_refresh"] = 0
            steps.append(timed(ours))
    whole = statistics.median(steps) / base
    parts = {name: statistics.median(times) / base for name, times in found.items()}
    opt.param_groups[0]["next_refresh"] = 0
    measuring = peak_bytes(ours, sides[1].model)
    opt.param_groups[0]["next_refresh"] = 10**9
    ours()
    alone = [(update_alone(sides[0], other_opt), update_alone(sides[1], opt)) for _ in range(pairs // 2)]
    update = [statistics.median(times) for times in zip(*alone, strict=True)]
    parameters = [p.numel() for p in sides[1].model.parameters()]
    benchmark.extra_info.update(
        case=f"{rule}, {route}",
        parameters=sum(parameters),
        tensors=len(parameters),
        theirs_median=base,
        ratio=ratio,
        ratio_measuring=ratio + extra,
        ratio_update=update[1] / update[0],
        ratio_mean=ratio + extra * count / STEPS,
        ratio_mean_long=ratio + extra * count_long / LONG,
        refreshes=count,
        by_interval={interval: ratio + extra / interval for interval in INTERVALS},
        parts={"forward and backward": whole - sum(parts.values()), **parts},
        peak_bytes=peak_bytes(ours, sides[1].model),
        peak_bytes_measuring=measuring,
        theirs_peak_bytes=peak_bytes(theirs, sides[0].model),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark, device, monkeypatch, model, rule, route):
    compare(benchmark, monkeypatch, lambda: MODELS[model](device, full=CUDA), rule, route)
    benchmark.extra_info["workload"] = model
