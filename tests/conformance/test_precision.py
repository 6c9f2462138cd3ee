"""Mixed precision, clipping and scalers: gradients are those that the optimizer consumes, unscaled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import instrument
from instrument import measure

from .harness import data, of_kind, twins


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_clipped_gradients_are_recorded_as_they_are_applied(tmp_path: Path) -> None:
    """After `clip_grad_norm_(0.1)` the norm over all recorded gradients is at most 0.1."""

    def clipped(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (net(data(step)) * 100).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        assert norm > 1
        optimizer.step()
        return loss

    for record in twins(model, tmp_path, clipped).records:
        total = sum(sketch.l2**2 for sketch in of_kind(record, "Gradients").values()) ** 0.5
        assert total == pytest.approx(0.1, rel=1e-3)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "unfused": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
    "fused": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, fused=True),
}


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_of_activations_are_unscaled(kind: str, unscales: bool, scale: float, tmp_path: Path) -> None:
    """Under a gradient scaler, gradients of parameters and of activations are those without one."""

    def truth(net: Any, step: int) -> tuple[float, float]:
        hidden = net[0](data(step))
        hidden.retain_grad()
        net[2](net[1](hidden)).square().mean().backward()
        found = hidden.grad.norm().item(), net[0].weight.grad.norm().item()
        net.zero_grad()
        return found

    torch.manual_seed(3)
    net = model()
    optimizer = OPTIMIZERS[kind](net)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    kinds = ("activation_gradients", "gradients")
    watcher = instrument.watch(net, kinds=kinds, interval=1, logdir=tmp_path, strict=True)
    expected = []
    for step in range(4):
        instrument_free = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        twin = model()
        torch.nn.utils.vector_to_parameters(instrument_free, twin.parameters())
        expected.append(truth(twin, step))
        optimizer.zero_grad()
        scaler.scale(net(data(step)).square().mean()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    recorded = [(r["ActivationGradients/0"].l2, r["Gradients/0.weight"].l2) for r in watcher.history]
    assert np.array(recorded) == pytest.approx(np.array(expected), rel=1e-4)
    assert watcher.history[-1]["ActivationGradients/0"].quantile(1.0) < 1.0
    watcher.close()


def test_an_overflow_is_marked_and_the_next_step_is_clean(tmp_path: Path) -> None:
    """A fused optimizer that skips a step for Inf marks its record; the next gradients are finite and unscaled."""
    torch.manual_seed(3)
    net: Any = model()
    optimizer = OPTIMIZERS["fused"](net)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    watcher = instrument.watch(net, interval=1, logdir=tmp_path, strict=True)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(net(data(step)).square().mean()).backward()
        if step == 1:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert [record.skipped for record in watcher.history] == [False, True, False, False]
    assert [record["Gradients/0.weight"].inf_count for record in watcher.history] == [0, 1, 0, 0]
    assert watcher.history[2]["Gradients/0.weight"].abs_max < 10
    watcher.close()


def test_an_unfused_overflow_leaves_no_trace_in_the_next_record(tmp_path: Path) -> None:
    """Where the scaler skips the call of the optimizer, the activations of that pass do not join the next step's."""
    torch.manual_seed(3)
    net: Any = model()
    optimizer = OPTIMIZERS["unfused"](net)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    watcher = instrument.watch(
        net, kinds=("activations", "activation_gradients"), interval=1, logdir=tmp_path, strict=True
    )
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(net(data(step)).square().mean()).backward()
        if step == 1:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert watcher.current_step == 3
    assert [record["Activations/0"].count for record in watcher.history] == [48, 48, 48]
    assert [record["ActivationGradients/0"].count for record in watcher.history] == [48, 48, 48]
    watcher.close()


class TwoTowers(nn.Module):
    """Two networks of one input, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(x)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("overflows", [(0,), (4,), (0, 1, 4)])
def test_an_optimizer_whose_steps_were_skipped_is_level_again(
    overflows: tuple[int, ...], interval: int, tmp_path: Path
) -> None:
    """Where one of two optimizers overflows, the next step but one has the gradients of both, of the same pass."""
    torch.manual_seed(3)
    net = TwoTowers()
    optimizers = [torch.optim.SGD(tower.parameters(), lr=0.05) for tower in (net.left, net.right)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    truth = []
    with instrument.watch(net, interval=interval, logdir=tmp_path, strict=True) as watcher:
        for step in range(10):
            left, right = net(data(step))
            factor = float("inf") if step in overflows else 1.0
            loss = left.square().mean() * factor + right.square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            truth.append([p.grad.norm().item() / scale for p in net.parameters() if p.grad is not None and p.ndim == 2])
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert watcher.current_step == 10
        records = {record.step: record for record in watcher.history}
    assert sorted(records) == list(range(0, 10, interval))
    disturbed = {step for overflow in overflows for step in range(overflow, overflow + 1 + interval)}
    for step, record in records.items():
        if step in disturbed:
            continue
        found = [record[f"Gradients/{tower}.weight"].l2 for tower in ("left", "right")]
        assert found == pytest.approx(truth[step], rel=1e-5), step


def test_autocast_is_recorded_in_its_own_type(tmp_path: Path) -> None:
    """Under bfloat16 autocast activations are recorded as bfloat16 values, parameters as float32, bit-identically."""

    def autocast(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = net(data(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    record = twins(model, tmp_path, autocast).records[0]
    torch.manual_seed(3)
    net: Any = model()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net[0](data(0))
    assert hidden.dtype is torch.bfloat16
    assert record["Activations/0"].max == hidden.float().max().item()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(-20, 20))
def test_dividing_a_sketch_by_a_power_of_two_loses_nothing(values: list[float], exponent: int) -> None:
    """Dividing a sketch by a power of two equals measuring the divided values, where none becomes subnormal."""
    tensor = torch.tensor(values, dtype=torch.float64)
    tensor = torch.where(tensor.abs() < 1e-25, 0.0, tensor)
    scale = 2.0**exponent
    assert measure(tensor).divided(scale) == measure(tensor / scale)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.floats(0.01, 1e5))
def test_dividing_a_sketch_by_any_number_keeps_counts_and_moments(values: list[float], scale: float) -> None:
    """For other numbers counts, signs and moments are exact, and quantiles right within the width of a code."""
    tensor = torch.tensor(values, dtype=torch.float64)
    tensor = torch.where(tensor.abs() < 1e-25, 0.0, tensor)
    divided, truth = measure(tensor).divided(scale), measure(tensor / scale)
    assert (divided.count, divided.zero_count) == (truth.count, truth.zero_count)
    assert divided.counts.sum() == truth.counts.sum()
    assert divided.rms == pytest.approx(truth.rms, rel=1e-9)
    assert divided.min == pytest.approx(truth.min, rel=1e-9)
    assert divided.max == pytest.approx(truth.max, rel=1e-9)
    negative = [int(s.counts[s.codes > 2048].sum()) for s in (divided, truth)]
    assert negative[0] == negative[1]


def test_an_engine_without_gradients_is_said_and_no_zeros_are_logged(tmp_path: Path) -> None:
    """Where `.grad` is None at the step although gradients flowed, as with DeepSpeed, that is said once."""

    class Engine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return None

    torch.manual_seed(3)
    net = model()
    optimizer = Engine(net.parameters(), lr=0.1)
    watcher = instrument.watch(net, interval=1, logdir=tmp_path, strict=True)
    with pytest.warns(instrument.InstrumentWarning, match="does not expose gradients") as caught:
        for step in range(3):
            net(data(step)).square().mean().backward()
            net.zero_grad()
            optimizer.step()
    assert len(caught) == 1
    assert watcher.current_step == 3
    assert not any(of_kind(record, "Gradients") for record in watcher.history)
    watcher.close()
