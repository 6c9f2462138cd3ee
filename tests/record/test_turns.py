"""The writer leaves the interpreter lock to forward passes, and yet nothing waits for long."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import instrument
from instrument.record import turns
from instrument.record.turns import TURNS, Turns
from instrument.record.worker import AT_LEISURE, Worker

LONG, SHORT = 30.0, 0.3
PROJECT = Path(__file__).parents[2]


def raised(error: Exception) -> None:
    raise error


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker("test-writer", raised)
    yield found
    TURNS.end()
    found.close(LONG)


def test_a_job_waits_for_the_end_of_a_pass(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is submitted during a forward pass is done after it, and not before."""
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", LONG)
    done = threading.Event()
    TURNS.begin()
    worker.submit(done.set)
    assert not done.wait(SHORT)
    TURNS.end()
    assert done.wait(LONG)


def test_a_pass_that_never_ends_is_not_waited_for(worker: Worker) -> None:
    """An exception that left the model, or a pass of many seconds, holds nothing up: a second job waits no more."""
    first, second = threading.Event(), threading.Event()
    TURNS.begin()
    worker.submit(first.set)
    assert first.wait(LONG)
    worker.submit(second.set)
    assert second.wait(LONG)


def test_much_that_waits_is_not_held_up(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a slow job only the last few wait for the pass, so that what is to be written does not pile up."""
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", LONG)
    started, released = threading.Event(), threading.Event()
    done = [threading.Event() for _ in range(AT_LEISURE + 3)]

    def slow() -> None:
        started.set()
        released.wait(LONG)

    worker.submit(slow)
    assert started.wait(LONG)
    TURNS.begin()
    for event in done:
        worker.submit(event.set)
    released.set()
    assert done[1].wait(LONG)
    assert not done[2].wait(SHORT)
    TURNS.end()
    assert done[-1].wait(LONG)


def test_whoever_flushes_has_it_written_at_once(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush in the middle of a pass waits for the writer alone."""
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", 10 * LONG)
    done = threading.Event()
    TURNS.begin()
    worker.submit(done.set)
    assert worker.flush(LONG)
    assert done.is_set()


def test_a_signal_in_the_middle_of_it_holds_up_nobody() -> None:
    """A handler that flushes may run inside of any of the methods, a thousand times a second, and each returns."""
    script = """
import signal, time
from instrument.record.turns import Turns
turns, seen = Turns(), []
def handler(number, frame):
    turns.end()
    seen.append(number)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
until = time.monotonic() + 3
while time.monotonic() < until:
    turns.begin()
    turns.end()
    turns.wait()
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(seen) > 100)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=PROJECT)
    assert found.stdout.strip() == "True", found.stderr


def test_a_signal_that_flushes_while_a_flush_waits_holds_up_neither() -> None:
    """As a handler of SIGTERM does that saves what there is: each flush, the outer and the inner, has all written."""
    script = """
import random, signal, time
from instrument.record.worker import Worker
worker, found = Worker("test-writer", print), []
def handler(number, frame):
    found.append(worker.flush(20))
signal.signal(signal.SIGALRM, handler)
until = time.monotonic() + 5
while time.monotonic() < until:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))
    worker.submit(lambda: time.sleep(1e-4))
    found.append(worker.flush(20))
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(found) > 100 and all(found))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=PROJECT)
    assert found.stdout.strip() == "True", found.stderr


def test_the_gate_is_closed_in_the_forward_pass_of_a_sampled_step_and_open_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks on the model close and open it, and the training is what it is without them."""
    calls: list[str] = []
    for name in ("begin", "end"):
        told = getattr(Turns, name)

        def call(self: Turns, name: str = name, told: object = told) -> None:
            calls.append(name)
            told(self)  # type: ignore[operator]

        monkeypatch.setattr(Turns, name, call)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append("forward")
            out: torch.Tensor = self.fc(x)
            return out

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with instrument.watch(model, interval=1, logdir=tmp_path, strict=True) as watcher:
        for _ in range(2):
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
        watcher.flush()
    passes = [place for place, name in enumerate(calls) if name == "forward"]
    assert len(passes) == 2
    for place in passes:
        assert calls[place - 1 : place + 2] == ["begin", "forward", "end"]
