"""A whole training measured as on a GPU, with a CPU in its place and a list for its queue: only readers wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import instrument
from instrument.diagnose.report import Report
from instrument.measure import batch as batches
from instrument.measure.device import batch as device_batch
from instrument.measure.device import devices, late
from instrument.watcher import collector

from .measure.test_device import Queue, assert_same
from .training import batch, mlp, read_back

STEPS = 6


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Queue]:
    """From the call on, tensors are taken for tensors on a device."""

    def begin() -> Queue:
        found = Queue()
        for module in (devices, late, batches, collector):
            monkeypatch.setattr(module, "edge_for", lambda device: found)
        monkeypatch.setattr(batches, "small", lambda tensor: (0, 0))
        return found

    return begin


def train(logdir: Path, micro_batches: int = 1, scaled: bool = False) -> instrument.Watcher:
    """Train under watch; everything is on disk then."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=scaled)
    kinds = ["activations", "activation_gradients", "parameters", "gradients", "updates"]
    watcher = instrument.watch(model, logdir=logdir, interval=2, scalar_interval=1, kinds=kinds, strict=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro_batches):
            loss = model(batch(micro_batches * step + part)).square().mean()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    watcher.flush()
    return watcher


def assert_twins(ours: instrument.Watcher, plain: instrument.Watcher) -> None:
    assert [record.step for record in ours.history] == [record.step for record in plain.history] == list(range(STEPS))
    for found, expected in zip(ours.history, plain.history, strict=True):
        assert list(found) == list(expected)
        for tag in expected:
            assert_same(found[tag], expected[tag])
        assert found.traits.keys() == expected.traits.keys()
        scales = [(float(found.traits[tag].scale), float(traits.scale)) for tag, traits in expected.traits.items()]
        assert all(first == second for first, second in scales)


@pytest.mark.parametrize("micro_batches", [1, 12])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_on_a_device_is_recorded_as_on_the_host(
    queue: Callable[[], Queue], micro_batches: int, scaled: bool, tmp_path: Path
) -> None:
    """Every sketch of every step is that of the CPU engine, code for code, and no wait is on the training thread."""
    plain = train(tmp_path / "plain", micro_batches, scaled)
    waits = queue()
    ours = train(tmp_path / "ours", micro_batches, scaled)
    assert_twins(ours, plain)
    assert waits.waits
    assert "MainThread" not in waits.waits
    ours.close()
    plain.close()
    assert read_back(tmp_path / "ours")[0] == read_back(tmp_path / "plain")[0]
    assert (
        str(Report.of_run(tmp_path / "ours")).split("Findings")[0]
        == (str(Report.of_run(tmp_path / "plain")).split("Findings")[0])
    )


def test_a_step_makes_one_copy(queue: Callable[[], Queue], tmp_path: Path) -> None:
    """All sketches of a sampled step travel together."""
    found = queue()
    train(tmp_path).close()
    assert len(found.copies) == STEPS


def test_many_micro_batches_do_not_pile_up(
    queue: Callable[[], Queue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is full is sent within the step, and what has arrived is merged while the step goes on."""
    plain = train(tmp_path / "plain", micro_batches=40)
    found = queue()
    monkeypatch.setattr(device_batch, "_MOST_ROWS", 64)
    monkeypatch.setattr(Queue, "query", lambda self: self.synchronize() or True)  # copies arrive at once
    held: list[int] = []
    close = collector.Collector.close

    def counting(self: Any) -> Any:
        parts = self.buffer._parts.values()
        held.append(max(len(part) if isinstance(part, list) else 1 for part in parts))
        return close(self)

    monkeypatch.setattr(collector.Collector, "close", counting)
    ours = train(tmp_path / "ours", micro_batches=40)
    assert len(found.copies) > 2 * STEPS
    assert max(held) < 40
    assert_twins(ours, plain)
    ours.close()
    plain.close()


def test_a_captured_graph_is_left_alone_and_said_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured nothing is measured, with one sentence for all tensors; afterwards all is."""
    capturing = True
    monkeypatch.setattr(collector, "is_capturing", lambda: capturing)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(instrument.InstrumentWarning, match="a CUDA graph is being captured"),
        instrument.watch(model, logdir=tmp_path, interval=1, strict=True) as watcher,
    ):
        for step in range(4):
            capturing = step < 2
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        history = {record.step: len(record) for record in watcher.history}
    # The last captured step ends when the next begins, and its parameters are read then.
    assert [history.get(step, 0) for step in range(4)] == [0, 2, 7, 7]
    assert len([notice for notice in watcher.notices if "captured" in notice]) == 1
