"""Timing on a machine that others share: interleaved, by medians, with the spread beside them.

OpenMP's threads spin for a while after each parallel region and so steal time from whatever is measured next, and so
do those of OpenBLAS; what tells them not to is read when they are loaded, so the process starts itself anew.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

PINNED = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OPENBLAS_NUM_THREADS": "1", "MKL_DYNAMIC": "FALSE"}


class Timing(NamedTuple):
    """Seconds a call, of one contestant."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


def pin() -> None:
    """Start this process anew with what no library can be told later, unless that is so already."""
    if any(os.environ.get(name) != value for name, value in PINNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **PINNED})


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, Timing]:
    """Time every contestant once a round, in turn, so that noise of the machine meets all alike.

    Args:
        contestants: Name to function.
        rounds: How often each is timed.
        calls: Calls a timing, for functions of a few microseconds.

    Returns:
        Seconds a call for each.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():
        function()
    for _ in range(rounds):
        for name, function in contestants.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: spread(taken) for name, taken in times.items()}


def ratios(pairs: list[tuple[float, float]]) -> Timing:
    """Second over first of each pair, of timings taken one right after the other."""
    return spread([second / first for first, second in pairs])


def spread(values: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine(threads: int | None = None) -> str:
    """What was measured on, in one line.

    Args:
        threads: Of torch, where that was done in other processes.
    """
    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} on "
        f"{threads or torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}"
    )
