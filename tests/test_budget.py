"""The budget: how far the interval is stretched, with a clock that stands still unless it is moved."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import instrument
from instrument.errors import ConfigError
from instrument.watcher.budget import Budget, Meter
from instrument.watcher.schedule import Schedule

from .training import mlp, read_back, train


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(share: float, length: float, cost: float, written: float, steps: int) -> tuple[list[int], Schedule]:
    """Train with steps of one length; a sampled one costs the training thread and the writer's thread something.

    Returns:
        The sampled steps, and the schedule in the end.
    """
    clock, sampled, spent = Clock(), [], [0.0]
    meter, schedule = Meter(clock), Schedule(100, 10)
    budget = Budget(share, 10, meter, lambda: spent[0], clock)
    for step in range(steps):
        clock.now += length
        if schedule.is_sampled(step):
            sampled.append(step)
            with meter:
                clock.now += cost if sampled[1:] else 50 * cost  # the first time everything is slow
            spent[0] += written
            schedule.stretch(budget.factor_after(step))
    return sampled, schedule


@pytest.mark.parametrize(
    ("cost", "written", "interval", "histograms"),
    [
        (0.01, 0.0, 10, 100),  # 10 steps of 0.1 s, 1 % of which is 0.01 s
        (0.0999, 0.0, 100, 100),
        (0.05, 0.045, 100, 100),
        (0.15, 0.0, 200, 200),
        (0.4, 0.0, 500, 500),
        (0.035, 0.0, 50, 100),
        (0.0151, 0.0, 20, 100),
    ],
)
def test_the_interval_is_the_least_that_the_budget_allows(
    cost: float, written: float, interval: int, histograms: int
) -> None:
    """With steps of 0.1 s and a budget of 1 %, the interval is the cost over the share, rounded up."""
    _, schedule = simulate(0.01, 0.1, cost, written, 6000)
    assert (schedule.scalar_interval, schedule.histogram_interval) == (interval, histograms)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("cost", [1e-5, 0.003, 0.08, 2.0])
def test_the_share_is_kept(share: float, cost: float) -> None:
    """Whatever the cost, steady state takes at most the share given, and no less than it needs to."""
    steps = 200_000
    sampled, schedule = simulate(share, 0.1, cost, 0.0, steps)
    late = [step for step in sampled if step > steps // 10]
    taken = len(late) * cost
    assert taken <= share * (0.9 * steps * 0.1 + taken) * (1 + 2 / max(1, len(late)))
    assert all(step % schedule.scalar_interval == 0 for step in late)
    assert schedule.histogram_interval % schedule.scalar_interval == 0


def test_the_interval_shrinks_again_where_the_cost_is_gone() -> None:
    """An interval that was stretched goes back when a sampled step has become cheap, and not before it has."""
    clock = Clock()
    meter = Meter(clock)
    budget = Budget(0.01, 1, meter, float, clock)
    factors: list[int] = []
    step = 0
    for cost in [0.2] * 10 + [0.19] * 10 + [0.01] * 20:
        clock.now += factors[-1] if factors else 1.0
        step += factors[-1] if factors else 1
        with meter:
            clock.now += cost
        factors.append(budget.factor_after(step))
    assert factors[2] == factors[19] == 20
    assert factors[-1] == 1
    assert set(factors) <= {1, 2, 5, 10, 20}


def test_calls_within_calls_are_counted_once_and_threads_apart() -> None:
    """What is entered twice in one thread counts once; two threads add up."""
    clock = Clock()
    meter = Meter(clock)

    def spend() -> None:
        with meter:
            clock.now += 1.0
            with meter:
                clock.now += 1.0

    spend()
    thread = threading.Thread(target=spend)
    thread.start()
    thread.join()
    assert meter.seconds == 4.0


def test_without_a_budget_the_steps_are_those_given(tmp_path: Path) -> None:
    """Without a budget steps 0, N, 2N are sampled, nothing else is written, and nothing is said of an interval."""
    model = mlp()
    watcher = instrument.watch(model, interval=6, scalar_interval=3, logdir=tmp_path, strict=True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 13)
    assert [record.step for record in watcher.history] == [0, 3, 6, 9, 12]
    assert "every" not in repr(watcher)
    watcher.close()
    assert "instrument/interval" not in read_back(tmp_path)[1]


def test_a_real_run_stretches_its_interval_and_says_so(tmp_path: Path) -> None:
    """A tiny budget on a real run stretches the interval: a scalar and the watcher's text say how far."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)), nn.Linear(8, 1))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = instrument.watch(model, interval=4, scalar_interval=2, budget=0.001, logdir=tmp_path, strict=True)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        watcher.flush()
    steps = [record.step for record in watcher.history]
    text = repr(watcher)
    watcher.close()
    histograms, scalars = read_back(tmp_path)
    intervals = scalars["instrument/interval"]
    assert list(intervals)[: len(steps)] == steps
    assert steps[:2] == [0, 2]
    assert len(steps) < 30
    last = int(max(intervals.values()))
    assert last > 2
    assert f"every {last} steps, histograms every {-(-4 // last) * last}, " in text
    assert set(histograms["Parameters/0.weight"]) <= {*steps, 59}


@pytest.mark.parametrize("budget", [-0.1, 1, 1.5, True, "1%", float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: object, tmp_path: Path) -> None:
    """A budget outside 0 to 1 is told with what is allowed, and nothing is left behind."""
    with pytest.raises(ConfigError, match=r"budget: found .*, allowed is a share from 0 \(no limit\) to below 1"):
        instrument.watch(mlp(), budget=budget, logdir=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
