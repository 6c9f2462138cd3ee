"""Where the time of a sampled step goes: what the training thread spends, what the writer's, and the least there is.

Each part is timed by itself, in the processor time of the thread that does it. Together they take longer than that in a
training: whoever has the interpreter lock holds up the other.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import instrument
from instrument.config import Config
from instrument.diagnose.doctor import Doctor
from instrument.diagnose.units import UnitWindows
from instrument.measure.batch import measure_later
from instrument.measure.columns import Sketches
from instrument.measure.sketch import Sketch
from instrument.measure.small import SMALL
from instrument.record.buffer import StepRecord
from instrument.record.packing import SketchStore
from instrument.record.values import histogram_slices, scalar_values
from instrument.record.wire import ScalarLayout, histogram_values

from .harness import machine
from .workloads import WORKLOADS, Workload

ROUNDS = 9


def run(console: Console) -> None:
    """Print a table for each training, with parameters and gradients, and with activations besides."""
    threads = torch.get_num_threads()
    for workload in WORKLOADS.values():
        torch.set_num_threads(workload.threads or threads)
        for kinds in (("parameters", "gradients"), ("parameters", "gradients", "activations")):
            console.print(_table(workload, kinds))
    torch.set_num_threads(threads)


def _table(workload: Workload, kinds: tuple[str, ...]) -> Table:
    twin, training = workload.make(), workload.make()
    with tempfile.TemporaryDirectory() as directory, instrument.watch(
        training.model, interval=1, kinds=kinds, logdir=directory
    ) as watcher:  # fmt: skip
        pairs = []
        for _ in range(ROUNDS + 1):
            watcher.flush()
            pairs.append((_spent(twin.step), _spent(training.step)))
        record = watcher.history[-1]
    bare = statistics.median(first for first, _ in pairs[1:])
    extra = statistics.median(second - first for first, second in pairs[1:])
    size = sum(sketch.count for sketch in record.values())
    table = Table(title=f"{workload.title}; {', '.join(kinds)} ({machine()})")
    for heading in ("what one sampled step takes", "ms", "of the bare step", "us a tensor"):
        table.add_column(heading, justify="right" if heading != "what one sampled step takes" else "left")
    rows = [
        ("bare step", bare),
        ("least: one read of what is measured", _milliseconds(_reading(size))),
        ("training thread: hooks, measuring or copying", extra),
        *_of_the_writer(record, kinds),
    ]
    for what, spent in rows:
        of_tensor = "" if what == "bare step" else f"{1e3 * spent / len(record):.1f}"
        table.add_row(what, f"{spent:.1f}", f"{100 * spent / bare:.0f} %", of_tensor)
    return table


class _Made:
    """Sketches that are made already, as they stand when they have been measured together."""

    def __init__(self, sketches: Sketches) -> None:
        self._sketches = sketches

    def sketches(self) -> Sketches:
        """All of them."""
        return self._sketches

    @property
    def held(self) -> int:
        """None, as it has been measured."""
        return 0

    def item(self, place: int) -> Sketch:
        """The one at a place."""
        return self._sketches[place]


def _of_the_writer(record: StepRecord, kinds: tuple[str, ...]) -> list[tuple[str, float]]:
    """What the writer's thread does with a record, part by part."""
    made = _Made(record.columns())
    layouts: dict[str, ScalarLayout] = {}

    def fresh() -> StepRecord:
        store = SketchStore(dict(zip(record, range(len(record)), strict=True)), [made])
        return StepRecord(record.step, store, 0.0, traits=record.traits)

    def scalars() -> None:
        tags, numbers = scalar_values(fresh(), set())
        if "layout" not in layouts:
            layouts["layout"] = ScalarLayout(tags)
        layouts["layout"].values(numbers)

    known = fresh()
    known.statistics()

    def histograms() -> None:
        for part in histogram_slices(known):
            histogram_values(part)

    config = Config(kinds=kinds)
    doctor, step = Doctor(config, UnitWindows(config)), iter(range(10**9))

    def examine() -> None:
        doctor.add(StepRecord(next(step), known._sketches, 0.0, traits=record.traits), True)
        doctor.catch_up()

    sizes = [size for sketch in record.values() if 0 < (size := sketch.count) <= SMALL]
    copied = iter([measure_later([torch.randn(size) for size in sizes]) for _ in range(ROUNDS)])
    waiting = iter([fresh() for _ in range(ROUNDS)])
    return [
        ("writer: measuring small tensors that were copied", _milliseconds(lambda: next(copied).sketches())),
        ("writer: statistics and scalars", _milliseconds(scalars)),
        ("writer: histograms, framed", _milliseconds(histograms)),
        ("writer: findings, without units", _milliseconds(examine)),
        ("writer: packing for the history", _milliseconds(lambda: next(waiting).pack())),
    ]


def _reading(size: int) -> Callable[[], Any]:
    values = torch.ones(max(1, size))

    def read() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        values.sum()
        torch.set_num_threads(threads)

    return read


def _milliseconds(job: Callable[[], object]) -> float:
    """Processor time of this thread, the median."""
    return statistics.median(_spent(job) for _ in range(ROUNDS))


def _spent(job: Callable[[], object]) -> float:
    start = time.thread_time()
    job()
    return 1e3 * (time.thread_time() - start)
