"""On a real GPU: the sketches of the CPU engine, and no wait on the training thread."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import instrument
from instrument.errors import InstrumentWarning
from instrument.measure.device import Devices
from instrument.measure.slopes import slopes_named
from instrument.measure.units import UnitTally, rows_together, tally_on_device, tally_rows
from instrument.torch_private import Unseen
from tests.measure.test_device import assert_same

DEVICE = torch.device("cuda")


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 1000, 300_000, 5_000_000])
def test_codes_are_those_of_the_cpu_engine(dtype: torch.dtype, size: int) -> None:
    """Code for code, NaN, Inf, zeros and the smallest numbers included."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    if size >= 1000:
        values[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40], dtype=torch.float64)
    values = values.to(dtype)
    assert_same(instrument.measure(values.to(DEVICE)), instrument.measure(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 1), 1), ((37, 10), 1), ((70_000, 96), 1), ((8, 512, 3072), 2), ((9, 65, 7, 7), 1), ((64, 64, 56, 56), 1)],
)
@pytest.mark.parametrize("function", [None, "relu", "tanh"])
def test_units_are_tallied_as_by_operations_of_torch(
    dtype: torch.dtype, shape: tuple[int, ...], axis: int, function: str | None
) -> None:
    """In one launch that waits for nothing: ranges, flat samples and dead units are those of the CPU, NaN included."""
    z = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z.select(axis, 0).fill_(-5.0)
    if shape[axis] > 2:
        z.select(axis, 1).fill_(2.5)
        z.select(axis, 2)[0] = float("nan")
    z = z.to(dtype)
    slopes, devices, on_device = slopes_named(function) if function else None, Devices(), z.to(DEVICE)
    with Unseen():
        expected = tally_on_device(z.float(), axis, slopes).fetch()
        assert devices.can_tally(on_device)
        with no_wait():
            late = tally_on_device(on_device, axis, slopes, devices)
            devices.send()
    found = late.fetch()
    for field in ("low", "high", "flat", "dead_flat", "never_flat"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    assert (found.samples, found.counted) == (expected.samples, expected.counted)
    np.testing.assert_allclose(found.square_mean, expected.square_mean, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_zeros_are_found_in_one_launch(dtype: torch.dtype) -> None:
    """Of gradients of every shape, with rows that are zero, but for their last value, and in whole."""
    gradients = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for shape in ((5, 3), (3072, 768), (1, 1), (64, 3, 7, 7), (70, 130))
    ]
    gradients[1][3] = gradients[1][40, :-1] = gradients[4][:] = 0
    gradients[0][1] = float("nan")
    devices, on_device = Devices(), [gradient.to(DEVICE) for gradient in gradients]
    with Unseen(), no_wait():
        assert all(devices.can_find_rows(gradient) for gradient in on_device)
        lates = rows_together(on_device, [4] * len(gradients), devices)
        devices.send()
    for gradient, late in zip(gradients, lates, strict=True):
        found, expected = late.fetch(), tally_rows(gradient, 0, 4)
        assert isinstance(expected, UnitTally)
        assert found.dead_flat.tolist() == expected.dead_flat.tolist()
        assert (found.samples, found.counted) == (expected.samples, expected.counted)


def train(model: nn.Module, steps: int, stream: Any = None, **arguments: Any) -> instrument.Watcher:
    inputs = torch.randn(steps, 16, 32, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, next(model.parameters()).dtype
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = ["activations", "activation_gradients", "parameters", "gradients", "updates"]
    watcher = instrument.watch(model, interval=1, kinds=kinds, strict=True, **arguments)
    with torch.cuda.stream(stream), no_wait():
        for step in range(steps):
            optimizer.zero_grad()
            model(inputs[step]).square().mean().backward()
            optimizer.step()
    return watcher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampled_step_waits_for_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """With every step sampled and all kinds watched, no operation of the training thread waits for the device."""
    watcher = train(network(dtype), 5, logdir=tmp_path)
    watcher.close()
    assert [record.step for record in watcher.history] == list(range(5))
    assert watcher.history[-1]["Activations/1"].count == 16 * 64


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Losses and parameters with and without the watch are equal in every bit, on a side stream too."""
    plain, watched = network(), network()
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        inputs = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for step in range(5):
            optimizer.zero_grad()
            plain(inputs[step]).square().mean().backward()
            optimizer.step()
    torch.cuda.synchronize()
    watcher = train(watched, 5, torch.cuda.Stream(), logdir=tmp_path)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert_same(
        watcher.history[-1]["Parameters/0.weight"],
        instrument.measure(dict(watched.named_parameters())["0.weight"].cpu()),
    )
    watcher.close()


def test_a_scaler_divides_without_a_wait(tmp_path: Path) -> None:
    """Gradients of activations are divided by the scale, which stays on the device until somebody reads."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    inputs = torch.ones(4, 32, device=DEVICE)
    kinds = ["activation_gradients"]
    with instrument.watch(model, interval=1, kinds=kinds, logdir=tmp_path, strict=True) as watcher:
        scaler.scale(model(inputs).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        watcher.flush()
        assert watcher.history[0]["ActivationGradients/2"].max == pytest.approx(1.0)


def test_a_captured_step_is_left_alone(tmp_path: Path) -> None:
    """A step that is captured into a CUDA graph replays as without the watch, and that it is not seen is said once."""
    model = network()
    inputs = torch.ones(4, 32, device=DEVICE)
    for _ in range(3):
        functional.mse_loss(model(inputs), torch.zeros(4, 8, device=DEVICE)).backward()
    with (
        pytest.warns(InstrumentWarning, match="CUDA graph"),
        instrument.watch(model, interval=1, logdir=tmp_path, strict=True) as watcher,
    ):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = model(inputs).square().mean()
        graph.replay()
        torch.cuda.synchronize()
        assert loss.item() == model(inputs).square().mean().item()
        assert len([notice for notice in watcher.notices if "captured" in notice]) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_devices_in_one_model(tmp_path: Path) -> None:
    """Layers on two GPUs are measured each where it lies."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4).to("cuda:0"), nn.Linear(4, 4).to("cuda:1")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x).to("cuda:1"))
            return out

    model = Split()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with instrument.watch(model, interval=1, logdir=tmp_path, strict=True) as watcher:
        model(torch.ones(2, 4, device="cuda:0")).sum().backward()
        optimizer.step()
        watcher.flush()
        assert watcher.history[0]["Activations/first"].count == watcher.history[0]["Activations/second"].count == 8
