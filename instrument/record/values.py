"""What TensorBoard is given of a step: scalars and histograms of all tensors.

They are worked out for many tensors together, since the arrays of one are shorter than the calls of NumPy, and slice
by slice: between two slices the training thread may have the interpreter lock, which is never held for long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from instrument.config import SECTIONS
from instrument.measure.histogram import FloatArray, Histograms, IntArray, Knots, histograms, log10_histograms
from instrument.measure.sketch import Sketch
from instrument.record.buffer import StepRecord
from instrument.record.statistics import SLICE, yield_lock
from instrument.record.tags import COUNTS, LOG10, LOG10_KINDS, STATISTICS

__all__ = ["HistogramSlice", "histogram_slices", "scalar_values"]

_SPREAD_SECTIONS = frozenset(SECTIONS[kind] for kind in LOG10_KINDS)

_STATISTICS, _COUNTS = tuple(STATISTICS), tuple(COUNTS)

_Measured: TypeAlias = "list[tuple[str, Sketch]]"


class HistogramSlice(NamedTuple):
    """Several histograms, one behind the other."""

    tags: Sequence[str]
    low: FloatArray
    """Left edge of the first bucket of each."""
    high: FloatArray
    """Right edge of the last."""
    num: FloatArray
    """Values of each."""
    total: FloatArray
    """Their sum."""
    total_squares: FloatArray
    """The sum of their squares."""
    limits: FloatArray
    """Right edges of all buckets."""
    counts: FloatArray
    """Counts of all buckets."""
    ends: IntArray
    """Where the buckets of each end."""

    def rows(self) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
        """Tag, the five numbers from `low` to `total_squares`, right edges and counts of each histogram."""
        numbers = np.stack(self[1:6], axis=1).tolist()
        limits, counts = self.limits.tolist(), self.counts.tolist()
        start = 0
        for tag, five, end in zip(self.tags, numbers, self.ends.tolist(), strict=True):
            yield tag, five, limits[start:end], counts[start:end]
            start = end


def scalar_values(record: StepRecord, counted: set[str]) -> tuple[list[str], FloatArray]:
    """Tags and numbers of the scalars of a step record.

    Args:
        record: The sketches of a step.
        counted: Tags of counts of NaN and Inf that were above zero before; added to here.

    Returns:
        Tags, and as many numbers of shape (n,).
    """
    table = record.statistics()
    has_values = ~np.isnan(table[:, 0])
    is_spoilt = table[:, len(_STATISTICS) :].any()
    if has_values.all() and not is_spoilt and not counted:
        tags = [scalar_tag for tag in record for scalar_tag in _tags_under(tag, _STATISTICS)]
        return tags, table[:, : len(_STATISTICS)].ravel()
    tags, numbers = [], []
    for tag, has_value, row in zip(record, has_values.tolist(), table.tolist(), strict=True):
        if has_value:
            tags += _tags_under(tag, _STATISTICS)
            numbers += row[: len(_STATISTICS)]
        for scalar_tag, number in zip(_tags_under(tag, _COUNTS), row[len(_STATISTICS) :], strict=True):
            if number or scalar_tag in counted:
                counted.add(scalar_tag)
                tags.append(scalar_tag)
                numbers.append(number)
    return tags, np.array(numbers, np.float64)


@functools.lru_cache(maxsize=65_536)
def _tags_under(tag: str, statistics: tuple[str, ...]) -> tuple[str, ...]:
    """Tags of the statistics of what is under a tag; they come again each step."""
    section, _, name = tag.partition("/")
    return tuple(f"{section}.{statistic}/{name}" for statistic in statistics)


def histogram_slices(record: StepRecord) -> Iterator[HistogramSlice]:
    """The histograms of a step record, a slice at a time.

    NaN and Inf reach no edge and no bucket: one such step would blank the card for every step.

    Args:
        record: The sketches of a step.

    Yields:
        Histograms of the values, and of log10 of magnitudes where those are spread over decades.
    """
    even: _Measured = []
    spread: _Measured = []
    for tag, sketch in record.items():
        if sketch.count:
            is_spread = tag.partition("/")[0] in _SPREAD_SECTIONS and sketch.count > sketch.zero_count
            (spread if is_spread else even).append((tag, sketch))
    for measured, with_log10 in ((even, False), (spread, True)):
        for start in range(0, len(measured), SLICE):
            yield_lock()
            yield from _slices(measured[start : start + SLICE], with_log10)


def _slices(measured: _Measured, with_log10: bool) -> Iterator[HistogramSlice]:
    knots = Knots([sketch.finite() for _, sketch in measured])
    total, squares = np.array([(sketch.total, sketch.total_squares) for _, sketch in measured]).T
    yield _slice([tag for tag, _ in measured], histograms(knots), knots.count, total, squares)
    if with_log10:
        yield_lock()
        tags = [_tags_under(tag, (LOG10,))[0] for tag, _ in measured]
        nothing = np.zeros(len(tags))
        yield _slice(tags, log10_histograms(knots), knots.count - knots.zeros, nothing, nothing)


def _slice(tags: list[str], found: Histograms, num: IntArray, total: FloatArray, squares: FloatArray) -> HistogramSlice:
    high, values = found.limits[found.ends - 1], num.astype(np.float64)
    return HistogramSlice(tags, found.first, high, values, total, squares, found.limits, found.counts, found.ends)
