"""Timing on a machine that others share: interleaved, by medians, with the spread beside them.

OpenMP's threads spin for a while after each parallel region and so steal time from whatever is measured next; the
wait policy is set to passive before torch is imported.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Timing(NamedTuple):
    """Seconds a call, of one contestant."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


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
    return {name: _timing(taken) for name, taken in times.items()}


def ratios(pairs: list[tuple[float, float]]) -> Timing:
    """Second over first of each pair, of timings taken one right after the other."""
    return _timing([second / first for first, second in pairs])


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine() -> str:
    """What was measured on, in one line."""
    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} on {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}"
    )
