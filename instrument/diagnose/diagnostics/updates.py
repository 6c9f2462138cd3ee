"""How far steps go: the size of updates over the size of weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from instrument.capture.names import Site
from instrument.config import Config
from instrument.diagnose.findings import Finding, Level
from instrument.diagnose.readings import Reading
from instrument.measure.histogram import FloatArray, IntArray

__all__ = ["update_ratio"]


def update_ratio(readings: Sequence[Reading], config: Config) -> Iterator[Finding]:
    """WARN above the band, INFO below it: a matrix changes by too much or too little of itself, step after step."""
    high, low = config.update_ratio_high, config.update_ratio_low
    names, ratios = readings[-1].ratios
    if not ((ratios > high) | (ratios < low)).any():
        return
    least, most = _extremes(readings, config.update_ratio_checks)
    for place in np.flatnonzero((least > high) | (most < low)).tolist():
        name, ratio = names[place], float(ratios[place])
        site = Site("updates", name)
        if ratio > high:
            yield Finding(
                Level.WARN, "update_ratio", site, readings[-1].step, ratio, high, "log10",
                f"each step changes {name} by {100 * 10**ratio:.2g} % of its size, and has done so for "
                f"{config.update_ratio_checks} readings; 0.1 % is usual. Lower the learning rate, at least for this "
                "layer.",
            )  # fmt: skip
        else:
            yield Finding(
                Level.INFO, "update_ratio", site, readings[-1].step, ratio, low, "log10",
                f"each step changes {name} by only {100 * 10**ratio:.2g} % of its size, and has done so for "
                f"{config.update_ratio_checks} readings; 0.1 % is usual. At the end of a schedule and in fine-tuning "
                "that is meant; at the beginning of a training, raise the learning rate.",
            )  # fmt: skip


def _extremes(readings: Sequence[Reading], checks: int) -> tuple[FloatArray, FloatArray]:
    """The least and the largest of the last so many ratios of each parameter that has one now.

    Readings without one are passed over. It is NaN where there are fewer in all, or one is.
    """
    names, _ = readings[-1].ratios
    table = np.zeros((len(readings), len(names)))
    is_there = np.zeros(table.shape, np.bool_)
    for row, reading in enumerate(reversed(readings)):
        known, found = reading.ratios
        if known is names:
            table[row], is_there[row] = found, True
        elif known:
            places, others = _common(names, known)
            table[row, places], is_there[row, places] = found[others], True
    is_recent = is_there & (np.cumsum(is_there, axis=0) <= checks)
    least = np.where(is_recent, table, np.inf).min(axis=0)
    most = np.where(is_recent, table, -np.inf).max(axis=0)
    are_enough = is_there.sum(axis=0) >= checks
    return np.where(are_enough, least, np.nan), np.where(are_enough, most, np.nan)


@functools.lru_cache(maxsize=256)
def _common(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[IntArray, IntArray]:
    """Where the names that both have stand among these, and among the others."""
    places = {name: place for place, name in enumerate(others)}
    common = [(place, places[name]) for place, name in enumerate(names) if name in places]
    found: IntArray = np.array(common, np.intp).reshape(-1, 2)
    return found[:, 0], found[:, 1]
