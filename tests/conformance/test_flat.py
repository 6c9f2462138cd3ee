"""Ten thousand watches and ten thousand steps leave nothing behind, each counted in a process of its own.

In the process of the suite the tests before still let go of threads, files and pages at moments of their own. What is
in use is asked of the two allocators themselves: the pages of a process also grow when the C heap is fragmented, by
megabytes at once.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import instrument
from instrument.config import KINDS

from ..training import hooks_on
from .harness import plain_step


class HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later: bytes and counts over all arenas."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


class InUse(NamedTuple):
    """What a process holds once the collector has run."""

    objects: int
    blocks: int
    heap_bytes: int
    threads: int
    files: int


def in_use() -> InUse:
    """Objects the collector knows, blocks of the interpreter's allocator, bytes of the C heap, threads, open files."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = HeapInfo
    heap = library.mallinfo2()
    return InUse(
        objects=len(gc.get_objects()),
        blocks=sys.getallocatedblocks(),
        heap_bytes=heap.uordblks + heap.hblkhd,
        threads=threading.active_count(),
        files=len(list(Path("/proc/self/fd").iterdir())),
    )


def in_a_process_of_its_own(work: Callable[[Path], list[InUse]], path: Path) -> list[InUse]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, path).result()


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def watch_and_unwatch(path: Path) -> list[InUse]:
    model = make()
    writer = instrument.SummaryWriter(path)
    found = []
    for number in range(10_000):
        instrument.watch(model, writer=writer, interval=1)
        instrument.unwatch(model)
        if number % 5000 == 4999:
            found.append(in_use())
    assert hooks_on(model) == 0
    writer.close()
    return found


def watch_train_and_close(path: Path) -> list[InUse]:
    torch.manual_seed(3)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for number in range(201):
        with instrument.watch(model, kinds=KINDS, interval=1, logdir=path / str(number), strict=True) as watcher:
            plain_step(model, optimizer, number)
        assert len(watcher.history) == 1
        if number % 100 == 0:
            found.append(in_use())
    assert hooks_on(model) == 0
    return found


def train(path: Path) -> list[InUse]:
    torch.manual_seed(3)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    config = {"scalar_interval": 1}
    with instrument.watch(model, kinds=KINDS, interval=10**6, config=config, logdir=path, strict=True) as watcher:
        for step in range(10_000):
            plain_step(model, optimizer, step)
            if step % 5000 == 4999:
                watcher.flush()
                found.append(in_use())
    return found


def test_ten_thousand_watches_leave_nothing_behind(tmp_path: Path) -> None:
    """Watching and unwatching leaves no hook, object, thread or file, and fewer than ten bytes of the C heap each."""
    half, whole = in_a_process_of_its_own(watch_and_unwatch, tmp_path)
    assert whole.objects - half.objects < 50
    assert whole.blocks - half.blocks < 500
    assert whole.heap_bytes - half.heap_bytes < 50_000
    assert (whole.threads, whole.files) == (half.threads, half.files)


def test_watches_with_runs_of_their_own_leave_no_thread_and_no_file_open(tmp_path: Path) -> None:
    """After two hundred watches that each made a run and trained, no more threads and files are open than after one."""
    first, _, last = in_a_process_of_its_own(watch_train_and_close, tmp_path)
    assert (last.threads, last.files) == (first.threads, first.files)


def test_ten_thousand_sampled_steps_take_no_more_memory_than_five_thousand(tmp_path: Path) -> None:
    """Five thousand more sampled steps leave less than half an object and a hundred bytes of the C heap each."""
    half, whole = in_a_process_of_its_own(train, tmp_path)
    assert whole.blocks - half.blocks < 2500
    assert whole.heap_bytes - half.heap_bytes < 500_000
