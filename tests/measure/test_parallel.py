"""Large tensors measured in parts, by several threads: the same sketch whoever measures what."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from instrument import measure
from instrument.errors import UnmeasurableError
from instrument.measure import batch, cpu, parallel
from instrument.measure.batch import measure_many

from .twin import assert_measures


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of a million elements, and torch's number of threads as it was."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(parallel, "PART", 1 << 20)
    monkeypatch.setattr(cpu, "PART", 1 << 20)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that are started from now on."""
    names: list[str] = []
    start = threading.Thread.start

    def watched(self: threading.Thread) -> None:
        names.append(self.name)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", watched)
    return names


def large(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(3_500_001, generator=torch.Generator().manual_seed(0))
    values[[5, 1_000_000, 3_500_000]] = torch.tensor([float("nan"), float("inf"), 0.0])
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sketch_is_the_same_with_any_number_of_threads(dtype: torch.dtype, started: list[str]) -> None:
    """To the bit, and that of a float64 twin; three threads are there for the call and gone after it."""
    tensor, before = large(dtype), threading.active_count()
    torch.set_num_threads(1)
    alone = measure(tensor)
    assert started == []
    torch.set_num_threads(3)
    together = measure(tensor)
    assert started == ["instrument-measure"] * 2
    assert threading.active_count() == before
    assert together == alone
    assert_measures(together, tensor.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tensors_are_measured_by_several_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """Each in its place and to the bit as by itself: small ones, large ones, one in parts, one whose memory is gone."""
    monkeypatch.setattr(batch, "PART", 1 << 20)
    generator = torch.Generator().manual_seed(1)
    sizes = [400_000, 7, 1_000_000, 8193, 8192, 2_000_000, 900_000, 700_000]
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    tensors[2][5] = float("nan")
    gone = torch.ones(300_000, dtype=dtype)
    gone.untyped_storage().resize_(0)
    tensors.insert(3, gone)
    found = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found[threads] = measure_many(tensors)
        # Two for 3.3 million elements that are neither small nor in parts, and one for the second half of two million.
        assert started == ["instrument-measure"] * (0 if threads == 1 else 3)
        started.clear()
    for index, (tensor, one, other) in enumerate(zip(tensors, found[1], found[3], strict=True)):
        if index == 3:
            assert isinstance(one, UnmeasurableError)
            assert str(other) == str(one)
        else:
            assert one == other == measure(tensor)


def test_where_no_thread_can_be_started_the_caller_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter, and where the system has no more threads, the sketch is the same."""
    torch.set_num_threads(3)
    tensor = large(torch.float32)
    expected = measure(tensor)

    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    assert measure(tensor) == expected


def test_what_a_part_raises_is_raised() -> None:
    """Whichever thread met it, the caller gets the error, and every thread is gone."""
    torch.set_num_threads(3)
    before = threading.active_count()
    for bad in range(4):
        with pytest.raises(ZeroDivisionError):
            parallel.each(lambda part, bad=bad: 1 // (part - bad), range(4))  # type: ignore[misc]
    assert threading.active_count() == before
    assert parallel.each(lambda part: part * part, range(7)) == [n * n for n in range(7)]


def test_once_a_part_has_failed_no_other_is_begun() -> None:
    """Who raises waits for the parts that others are at, and not for the forty behind them."""
    begun: list[int] = []
    caller = threading.get_ident()

    def fail(part: int) -> None:
        begun.append(part)
        time.sleep(0.05)
        if threading.get_ident() == caller:
            raise ValueError("the caller's")

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="the caller's"):
        parallel.each(fail, range(40))
    assert len(begun) <= 4


@pytest.mark.parametrize("size", [1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_parts_hold_each_element_once(size: int) -> None:
    """Parts are of about the same size, none above the limit."""
    parts = parallel.parts_of(torch.arange(size))
    sizes = [part.numel() for part in parts]
    assert np.array_equal(torch.cat(list(parts)), torch.arange(size))
    assert max(sizes) <= 1 << 20
    assert max(sizes) - min(sizes) < len(sizes)


ENDING = """
import sys
import torch
from instrument import measure


class Last:
    def __init__(self):
        self.values, self.measure, self.sys = torch.ones(10_000_000), measure, sys
        self.measure(self.values)

    def __del__(self):
        print(self.sys.is_finalizing(), self.measure(self.values).count, flush=True)


torch.set_num_threads(2)
last = Last()
last.itself = last
"""


def test_a_measurement_while_the_interpreter_ends_starts_no_thread() -> None:
    """A finalizer of the last moment measures a large tensor, or hears that it cannot; the process ends."""
    result = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.strip() == "True 10000000" or "likely shutting down" in result.stderr, result.stderr[-2000:]


def test_an_interrupt_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the caller waits for its helpers is raised when they have ended."""
    torch.set_num_threads(3)
    before, join, interrupts = threading.active_count(), threading.Thread.join, [KeyboardInterrupt()]

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if interrupts:
            raise interrupts.pop()
        join(self, timeout)

    caller, everybody = threading.get_ident(), threading.Barrier(3)

    def work(part: int) -> None:
        everybody.wait(30.0)  # so that each has one
        if threading.get_ident() != caller:
            time.sleep(0.2)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.each(work, range(3))
    assert threading.active_count() == before
    assert not interrupts
